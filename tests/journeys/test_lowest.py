"""What the README promises first, in little time: CI runs it on the lowest versions, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    Recipe,
    build_llama,
    expected_sites,
    quantize_with_torchao,
    reference_of,
    token_ids,
)
from run_examples import run_example_here
from torch import Tensor, nn
from training import (
    assert_gradients_equal,
    relative_error,
    repeat_by_hand,
    train,
    train_with_trainer,
    with_lora,
)

import mxnorm_pass
from mxnorm_pass import Report, SkipReason

IDS = token_ids()
AOT = {"inner": "aot_eager"}


def logits(model: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def run(model: nn.Module, **options: Any) -> tuple[Tensor, Report]:
    torch._dynamo.reset()
    with mxnorm_pass.record() as report:
        return logits(torch.compile(model, backend="mxnorm", options={**AOT, **options})), report


def fused(report: Report) -> list[tuple[str, tuple[str, ...]]]:
    return [(site.norm, site.consumers) for site in report.fused]


@pytest.mark.full
def test_llama_without_an_option() -> None:
    """Through Inductor; norms are named as in the model."""
    model = build_llama()
    with mxnorm_pass.record() as report:
        got = logits(torch.compile(model, backend="mxnorm"))
    assert fused(report) == expected_sites(2)
    assert [(s.norm, s.reason) for s in report.skipped] == [("model.norm", SkipReason.NO_MX_CAST)]
    names = dict(model.named_modules())
    assert all(name in names for site in report.sites for name in (site.norm, *site.consumers))
    assert relative_error(got, logits(reference_of(model, Recipe()))) < 0.05


@pytest.mark.full
def test_toggles() -> None:
    model = build_llama()
    assert torch.equal(run(model)[0], logits(reference_of(model, Recipe())))
    _, report = run(model, modules={"model.layers.0.*": False})
    assert fused(report) == expected_sites(2)[2:]
    assert [s.norm for s in report.skipped if s.reason is SkipReason.DISABLED] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]


@pytest.mark.full
def test_torchao_inference_changes_no_bit() -> None:
    model = quantize_with_torchao(build_llama(torch.bfloat16))
    got, report = run(model, quantize="existing", estimator="exact")
    assert len(report.fused) == 4
    assert torch.equal(got, logits(model))


@pytest.mark.full
def test_training_step() -> None:
    model = build_llama().train()
    reference = reference_of(model, Recipe())
    got, gradients = train(torch.compile(model, backend="mxnorm", options=AOT), model)
    want, want_gradients = train(reference, reference)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@pytest.mark.full
def test_trainer(tmp_path: Path) -> None:
    """As the README has it: the model is compiled before the Trainer gets it."""
    model = build_llama(layers=1, use_cache=False)
    reference = reference_of(model, Recipe())
    with mxnorm_pass.record() as report:
        model.compile(backend="mxnorm", options=AOT)
        seen = train_with_trainer(model, tmp_path)
    assert len(report.fused) == 2
    assert all(map(torch.equal, (step.loss for step in seen), repeat_by_hand(reference, seen)))


@pytest.mark.full
def test_lora() -> None:
    _, report = run(with_lora(rank=8))
    assert len(report.fused) == 4


def test_exported_program() -> None:
    block = nn.Sequential(nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64))
    x = torch.randn(4, 64)
    program = mxnorm_pass.apply(torch.export.export(block, (x,)))
    with torch.no_grad():
        want = torch.compile(block, backend="mxnorm", options=AOT)(x)
    assert torch.equal(program.module()(x), want)


@pytest.mark.full
def test_calibration_comparison_and_page(tmp_path: Path) -> None:
    model = build_llama()
    calibration = mxnorm_pass.calibrate(model, [{"input_ids": token_ids(4)}] * 4)
    calibration.save(tmp_path / "calibration.safetensors")
    if calibration.order is not None:
        mxnorm_pass.permute_channels(model, calibration.order)
    options = {"calibration": tmp_path / "calibration.safetensors"}
    comparison = mxnorm_pass.compare(model, {"input_ids": IDS}, options=options)
    comparison.plot(tmp_path / "ratios.png")
    report = mxnorm_pass.explain(model, IDS, options=options)
    report.save_html(tmp_path / "report.html")
    assert fused(report) == expected_sites(2)
    assert all((tmp_path / name).stat().st_size > 0 for name in ("ratios.png", "report.html"))


def test_converted_weights(tmp_path: Path) -> None:
    model = build_llama(torch.bfloat16).eval()
    mxnorm_pass.convert(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    # The cast to bf16 took the rotary embedding along, whose frequencies no checkpoint has.
    loaded.model.rotary_emb = model.model.rotary_emb
    got, report = run(loaded, quantize="all")
    assert fused(report) == expected_sites(2)
    plain = build_llama(torch.bfloat16).eval()
    assert torch.equal(got, run(plain, quantize="all", gain="activation")[0])


@pytest.mark.full
def test_headline_example() -> None:
    sizes = ["--layers", "1", "--hidden", "64", "--tokens", "32", "--device", "cpu"]
    done = run_example_here("llama.py", *sizes, "--inner", "aot_eager", "--train", "1")
    assert done.returncode in (0, None), done.stderr
    assert "inference_0: 3 norms, 2 fused, 1 skipped" in done.stdout
