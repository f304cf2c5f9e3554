"""compare: its numbers against models put together from functional, and its predictions."""

from __future__ import annotations

import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Recipe, build_llama, reference_of
from torch import Tensor, nn
from usage import Block, inputs

import mxnorm_pass
from mxnorm_pass import Comparison, functional

ROWS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def outlier_llama() -> nn.Module:
    """Channels that stick out, as trained models have them, and logits that mean something."""
    model = build_llama(layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :1] *= 30
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 200
            layer.mlp.down_proj.weight *= 200
        model.lm_head.weight *= 30
    return model


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    """Labels that the model itself finds likely, so that an error costs."""
    with torch.no_grad():
        likely = model(ROWS, use_cache=False).logits.argmax(-1)
    labels = torch.cat([torch.full((2, 1), -100), likely[:, :-1]], 1)
    return {"input_ids": ROWS, "labels": labels}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return outlier_llama()


@pytest.fixture(scope="module")
def comparison(model: nn.Module) -> Comparison:
    torch._dynamo.reset()
    return mxnorm_pass.compare(model, batch_of(model))


def loss_and_logits(model: Any, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    with torch.no_grad():
        logits = model(batch["input_ids"], use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), targets)), logits


@pytest.mark.full
def test_losses_and_divergences(model: nn.Module, comparison: Comparison) -> None:
    batch = batch_of(model)
    exact = Recipe(norm={"estimator": "exact"}, gain="activation")
    models = (model, reference_of(model, exact), reference_of(model, Recipe()))
    results = [loss_and_logits(m, batch) for m in models]
    got = (comparison.loss_as_is, comparison.loss_exact, comparison.loss)
    assert got == pytest.approx([loss for loss, _ in results], rel=1e-5)
    *references, last = (logits.double().log_softmax(-1) for _, logits in results)
    found = (comparison.from_as_is, comparison.from_exact)
    for reference, divergence in zip(references, found, strict=True):
        kl = F.kl_div(last, reference, log_target=True, reduction="sum") / ROWS.numel()
        assert divergence.kl == pytest.approx(float(kl), rel=1e-4)
        same = (reference.argmax(-1) == last.argmax(-1)).double().mean()
        assert divergence.top1 == float(same)
    assert comparison.tokens == ROWS.numel()


def test_a_site() -> None:
    """One norm: all is known."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    x, model = inputs(3, 5, 64), Model()
    with torch.no_grad():
        x[1, 2, 0] *= 200  # the token whose estimate is worst
        found = mxnorm_pass.compare(model, x, {"p": 1, "gain": "activation"})
    norm = model.block.norm
    rho = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.eps)
    with torch.no_grad():
        values, scales, estimated = functional.mxnorm_cast(
            x, norm.weight, eps=norm.eps, p=1, out_dtype=x.dtype
        )
        y = x.double() * rho * norm.weight
    ratios = (estimated / rho).flatten()
    (site,) = found.sites
    want = ratios.quantile(torch.tensor([0.01, 0.5, 0.99]).double())
    assert (site.ratio.low, site.ratio.median, site.ratio.high) == pytest.approx(
        want.tolist(), rel=1e-5
    )
    assert site.ratio.token == (1, 2) and site.ratio.worst == pytest.approx(float(ratios[7]), 1e-5)
    error = (functional.mx_dequantize(values, scales).double() - y).norm() / y.norm()
    assert site.input_error == pytest.approx(float(error), rel=1e-5)
    exact = functional.mx_dequantize(*functional.mx_cast(y.float()))
    assert site.cast_error == pytest.approx(float((exact - y).norm() / y.norm()), rel=1e-3)
    assert found.loss is None and site.loss_increase is None and not found.steps


@pytest.mark.full
def test_turning_the_worst_off_gives_the_predicted_loss(
    model: nn.Module, comparison: Comparison
) -> None:
    assert comparison.loss is not None and comparison.loss_exact is not None
    increase = comparison.loss - comparison.loss_exact
    assert increase > 0.1 and comparison.steps
    for step in comparison.steps:
        modules = {name: {"estimator": "exact"} for name in step.exact}
        options = {"inner": "aot_eager", "modules": modules}
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="mxnorm", options=options)
        loss, _ = loss_and_logits(compiled, batch_of(model))
        assert abs(loss - step.loss) <= 0.1 * increase


@pytest.mark.full
def test_a_calibration_and_single_norms(model: nn.Module) -> None:
    """Weights that are the Gaussian's change nothing; exact norms are exact."""
    names = [f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    gaussian = torch.full((2,), 0.5 / functional.rms_constant(2, 32) ** 2)
    made = mxnorm_pass.Calibration(dict.fromkeys(names, gaussian), exact=names[:1])
    torch._dynamo.reset()
    found = mxnorm_pass.compare(model, ROWS, {"calibration": made})
    first, *others = found.sites
    assert (first.ratio.low, first.ratio.high) == pytest.approx((1, 1), abs=1e-6)
    assert first.loss_increase is None and "by calibration" in first.how
    assert first.input_error == pytest.approx(first.cast_error)
    assert all(
        "block weights" in site.how and site.ratio.high - site.ratio.low > 0.01 for site in others
    )


def test_the_model_is_left_as_it_was(model: nn.Module, comparison: Comparison) -> None:
    fresh = outlier_llama()
    assert all(map(torch.equal, model.state_dict().values(), fresh.state_dict().values()))
    assert model.training == fresh.training
    assert not any(m._forward_hooks for m in model.modules())


def test_text_json_and_plot(comparison: Comparison, tmp_path: Path) -> None:
    text = str(comparison)
    assert all(site.norm in text for site in comparison.sites)
    entry = json.loads(comparison.to_json())
    assert entry["loss"] == comparison.loss and len(entry["sites"]) == 4
    comparison.plot(tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["ratios.png"]
    with pytest.raises(OSError):
        comparison.plot(tmp_path / "nowhere" / "ratios.png")


def test_without_matplotlib(comparison: Comparison, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*mxnorm_pass\[report\]"):
        comparison.plot(tmp_path / "a.png")


def test_wrong_batches(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        mxnorm_pass.compare(model, ROWS[:0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        mxnorm_pass.compare(Block(), torch.full((1, 2, 64), float("nan")))
    with pytest.raises(ValueError, match="must be a dict"):
        mxnorm_pass.compare(model, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nearest valid one"):
        mxnorm_pass.compare(model, ROWS, {"estimater": "exact"})


@pytest.mark.full
def test_models_that_compare_refuses(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="fuses no norm"):
        mxnorm_pass.compare(nn.Sequential(nn.Linear(64, 64)), inputs(1, 2, 64))
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.lm_head.weight, float("inf"))
    with pytest.raises(ValueError, match="outputs on row 0 hold NaN"):
        mxnorm_pass.compare(broken, ROWS)


@pytest.mark.full
def test_flags_in_a_batch_do_no_harm(model: nn.Module) -> None:
    plain = mxnorm_pass.compare(model, {"input_ids": ROWS[:1]})
    flagged = mxnorm_pass.compare(model, {"use_cache": False, "input_ids": ROWS[:1]})
    assert flagged.loss == plain.loss
    tokens = [site.ratio.token for site in plain.sites]
    assert [site.ratio.token for site in flagged.sites] == tokens


@pytest.mark.full
def test_padding_does_not_count(model: nn.Module) -> None:
    """Neither in front of tokens nor as a row of its own, here the first."""
    padded = F.pad(ROWS, (4, 0, 1, 0))
    mask = F.pad(torch.ones_like(ROWS), (4, 0, 1, 0))
    positions = (torch.arange(20) - 4).clamp(min=0).expand(3, 20)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    plain, found = mxnorm_pass.compare(model, ROWS), mxnorm_pass.compare(model, batch)
    assert found.tokens == plain.tokens == ROWS.numel()
    assert found.from_as_is.top1 == plain.from_as_is.top1
    # Attention with a mask is rounded otherwise, by some units of float32.
    near = partial(pytest.approx, rel=1e-6)
    assert (found.loss, found.from_exact.kl) == near((plain.loss, plain.from_exact.kl))
    for a, b in zip(found.sites, plain.sites, strict=True):
        assert (a.ratio.median, a.input_error) == near((b.ratio.median, b.input_error))
        # A difference of two losses.
        assert a.loss_increase == pytest.approx(b.loss_increase, abs=1e-6 * plain.loss)
        row, position = b.ratio.token
        assert a.ratio.token == (row + 1, position + 4)


@pytest.mark.full
def test_a_batch_of_padding_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="all padding"):
        mxnorm_pass.compare(model, {"input_ids": ROWS, "attention_mask": torch.zeros_like(ROWS)})
