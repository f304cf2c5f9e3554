"""examples/nvfp4_scales.py on few rows and a small model."""

from __future__ import annotations

import json
from pathlib import Path

import nvfp4_scales
import pytest
import torch
from checkpointlib import BadInput
from nvfp4_scales import Case, Input, Norm, measure, norm_inputs, one_cast, summary
from reference import build_llama
from run_examples import run_example_here

KINDS = list(nvfp4_scales.TENSOR_SCALES)


def test_random_rows_without_a_model(tmp_path: Path) -> None:
    saved, picture = tmp_path / "scales.json", tmp_path / "scales.png"
    sizes = ["--without-model", "--widths", "64", "4096", "--rows", "4", "--p", "0.5"]
    done = run_example_here("nvfp4_scales.py", *sizes, "--json", str(saved), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Student t") == 2 * 2 * 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(saved.read_text())
    assert content["machine"]["torch"] == torch.__version__ and "--p 0.5" in content["command"]
    results = content["results"]
    assert [r["tensor_scale"] for r in results] == 2 * 3 * 2 * KINDS
    for result in results:
        blocks = result["width"] // 16 * 4
        assert sum(result["exponents"].values()) == blocks
        assert result["largest"] <= 448 * (1 + 1e-6)
    # Where the bound leaves too little of the range, and only there, the error says so.
    lost = {(r["norm"], r["width"], r["tensor_scale"]) for r in results if r["below"] > 0.5}
    assert lost == {("mxnorm, p = 0.5", 4096, "bound")}
    assert all((r["block_error"] > 0.12) == (r["below"] > 0.5) for r in results)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--widths", "100"], "--widths must be positive multiples of 16"),
        (["--p", "0"], "--p must be finite and at least 0.25"),
        (["--rows", "0"], "--rows and --tokens must be positive"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = run_example_here("nvfp4_scales.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    # Of a hub's name the answer may take as long as the network.
    missing = str(tmp_path / "no_such_checkpoint")
    done = run_example_here("nvfp4_scales.py", "--model", missing)
    assert done.returncode == 2 and done.stdout == ""
    assert f"nvfp4_scales.py: cannot load {missing!r}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cast_that_loses_nothing() -> None:
    y = torch.zeros(2, 64)
    # Scales of 448, 1 and, below the normal values, 2^-7, whose elements of up to 3 are exact.
    y[0, 3], y[1, 16], y[1, 40] = 448 * 6.0, -6.0, 6 * 2.0**-7
    cast = one_cast(y, y.double(), torch.ones(()))
    assert cast.error == 0 and not cast.block_errors.any()
    assert cast.scales.tolist() == [448.0, 1.0, 2.0**-7]
    result = summary(Case("planted", [Input("planted", y)]), Norm("exact"), "1", {"planted": cast})
    assert (result.below, result.at_largest) == (1 / 3, 1 / 3)
    assert (result.smallest, result.largest) == (2.0**-7, 448.0)
    assert result.exponents == {-7: 1, 0: 1, 8: 1}


def test_an_element_of_half_a_step_is_lost() -> None:
    y = torch.zeros(1, 16)
    y[0, :2] = torch.tensor([6.0, 0.25])
    cast = one_cast(y, y.double(), torch.ones(()))
    assert cast.error == pytest.approx(0.25 / (36 + 0.25**2) ** 0.5)
    assert cast.block_errors.tolist() == pytest.approx([cast.error])


def test_errors_of_several_inputs() -> None:
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    inputs = [Input("one", rows), Input("other", rows.flip(0) * torch.linspace(0.1, 10, 64))]
    norm = Norm("mxnorm", 2.0)
    alone = [measure(Case(given.name, [given]), norm) for given in inputs]
    for one, other, both in zip(*alone, measure(Case("both", inputs), norm), strict=True):
        assert one.error != other.error
        assert both.error == pytest.approx(((one.error**2 + other.error**2) / 2) ** 0.5)
        worst = max((one, other), key=lambda result: result.error)
        assert (both.worst, both.worst_error) == (worst.case, worst.error)
        assert both.smallest == min(one.smallest, other.smallest)


def test_inputs_are_those_of_the_models_norms() -> None:
    model = build_llama(layers=1)
    ids = torch.arange(32).reshape(2, 16)
    found = {given.name: given for given in norm_inputs(model, ids)}
    assert list(found) == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.norm",
    ]
    first = found["model.layers.0.input_layernorm"]
    assert torch.equal(first.x, model.model.embed_tokens(ids).flatten(0, 1).float())
    assert torch.equal(first.gain, model.model.layers[0].input_layernorm.weight.float())
    assert first.eps == model.config.rms_norm_eps
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_norms_is_refused() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return input_ids

    with pytest.raises(BadInput, match="no RMSNorm"):
        norm_inputs(Plain(), torch.zeros(1, 4, dtype=torch.long))
