"""Gains of shape [1, D] or [1, 1, D], as in old checkpoints or computed for a batch of one."""

from __future__ import annotations

from typing import Any

import exporting
import pytest
import torch
import torch.nn.functional as F
from hand_casts import E4M3_FLOOR, dequantize
from matching import (
    BF16,
    F32,
    SPELLINGS,
    WIDTH,
    Model,
    assert_same_bits,
    cast_reference,
    expected_warnings,
    gradients,
    in_both_modes,
    inputs,
    only_site,
    run,
)
from pairwise import pairwise
from torch import Tensor, nn

from mxnorm_pass import SkipReason

pytestmark = expected_warnings

MODES: dict[str, dict[str, Any]] = {
    "fold": {"gain": "fold"},
    "activation": {"gain": "activation"},
    "exact": {"estimator": "exact"},
}
all_modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def flat(model: Model) -> Model:
    """The same model with its gain in shape [D]."""
    twin = Model(model.norm.function, dtype=model.first.weight.dtype, eps=model.norm.eps)
    weights = {n: w.reshape_as(twin.state_dict()[n]) for n, w in model.state_dict().items()}
    twin.load_state_dict(weights)
    return twin


@pytest.mark.full
@pytest.mark.parametrize(
    "spelling, mode",
    [
        *((name, mode) for name in ("huggingface", "gemma") for mode in MODES),
        ("gain on x", "activation"),
        ("gain on rho", "fold"),
    ],
)
def test_training_as_with_a_flat_gain(spelling: str, mode: str) -> None:
    shape, options = (1, 1, WIDTH), MODES[mode]
    model = SPELLINGS[spelling].model(gain_shape=shape)
    twin, x = flat(model), inputs().requires_grad_()
    results, grads = [], []
    for each in (model, twin):
        got, report = run(each, x, train=True, **options)
        assert only_site(report).status == "fused", str(report)
        leaves = (x, *each.parameters())
        results.append(got)
        grads.append(gradients(got, leaves))
        assert all(g.shape == leaf.shape for g, leaf in zip(grads[-1], leaves, strict=True))
    assert_same_bits(*results)
    assert_same_bits([g.flatten() for g in grads[0]], [g.flatten() for g in grads[1]])


@pytest.mark.full
@pairwise(dtype=[F32, BF16], shape=[(1, WIDTH), (1, 1, WIDTH)], options=MODES)
def test_inference(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = Model(gain_shape=shape, dtype=dtype), inputs(dtype=dtype)
    got, report = run(model, x, **options)
    assert only_site(report).status == "fused"
    assert_same_bits(got, run(flat(model), x, **options)[0])
    if "estimator" in options:
        assert_same_bits(got, cast_reference(model, x))
    assert_same_bits(exporting.run(model, x, **options)[0], got)


@all_modes
@in_both_modes
def test_more_dimensions_than_the_rows(options: dict[str, Any], train: bool) -> None:
    """[8, D] times [1, 1, D] is [1, 8, D]."""
    model, x = Model(gain_shape=(1, 1, WIDTH)), inputs(8, WIDTH).requires_grad_(train)
    got, report = run(model, x, train=train, **options)
    assert only_site(report).status == "fused", str(report)
    want, _ = run(flat(model), x, train=train, **options)
    assert [tuple(y.shape) for y in got] == [(1, 8, 64), (1, 8, 32)]
    assert_same_bits([y[0] for y in got], want)


class Adaptive(nn.Module):
    """A norm without a gain, then 1 + scale, one per row of the batch, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH, elementwise_affine=False, eps=1e-5)
        self.scale = nn.Linear(64, WIDTH)
        self.linear = nn.Linear(WIDTH, 64, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(self.norm(x) * (1 + self.scale(condition))[:, None])


@all_modes
def test_adaptive_norm_of_a_batch_of_one(options: dict[str, Any]) -> None:
    model, x, condition = Adaptive(), inputs(1, 8, WIDTH), inputs(1, 64, scale=1.0)
    (site,) = run(model, x, condition, **options)[1].sites
    assert site.status == "fused"
    assert run(model, inputs(), inputs(2, 64), **options)[1].sites[0].status == "skipped"


class DividedRows(nn.Module):
    """Each quarter of a row, and of a weight's row, is multiplied as a row of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        nn.init.uniform_(self.norm.weight, 0.1, 3.0)
        self.weight = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        quarters, weight = (t.view(-1, WIDTH // 4) for t in (self.norm(x), self.weight))
        return F.linear(dequantize(*E4M3_FLOOR(quarters)), dequantize(*E4M3_FLOOR(weight)))


def test_a_gain_of_rows_that_are_divided_is_not_folded() -> None:
    """It has other numbers for each part, which the weight's rows know nothing of."""
    model, x = DividedRows(), inputs()
    got, report = run(model, x, quantize="existing")
    assert [site.gain for site in report.sites] == ["activation"], str(report)
    with torch.no_grad():
        want = model(x)
    assert (got - want).norm() <= 0.3 * want.norm()
    (site,) = run(model, x, quantize="existing", gain="fold")[1].sites
    assert site.reason is SkipReason.NO_WEIGHT_CAST
