"""The backward's cast of the norm's output along T comes out of the forward's fused op.

Without that cast the rewrite recomputes the output and the graph casts it: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import (
    BF16,
    EPS,
    F32,
    GRADIENT_TOLERANCE,
    assert_close,
    huggingface,
    in_its_own_dtype,
    rms_norm,
    rms_norm_no_gain,
)
from numerics import E4M3, E5M2
from pairwise import pairwise, some
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torchao.prototype.moe_training.mxfp8_linear import mx_mm
from torchao.prototype.mx_formats.config import (
    MXFP8Dim0CastKernelChoice,
    MXFP8Dim1CastKernelChoice,
    ScaleCalculationMode,
)
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
from transposed_casts import (
    BOTH,
    FEATURES,
    IN_ROWS,
    WIDTH,
    assert_same_step,
    rows,
    step,
    step_without,
)

from mxnorm_pass import functional, ops
from mxnorm_pass.passes import lower


class TorchaoLinear(nn.Linear):
    """torchao's MXFP8 training linear in any element type and scale mode."""

    def __init__(self, elem_dtype: torch.dtype, mode: str, hp_wgrad: bool, **kwargs: Any) -> None:
        super().__init__(WIDTH, FEATURES, bias=False, **kwargs)
        self.options = (
            *(3 * [elem_dtype]),
            32,
            KernelPreference.EMULATED,
            MXFP8Dim0CastKernelChoice.TRITON,
            MXFP8Dim1CastKernelChoice.CUDA,
            ScaleCalculationMode[mode.upper()],
            hp_wgrad,
        )

    def forward(self, x: Tensor) -> Tensor:
        return mx_mm.apply(x, self.weight, *self.options)


class Site(nn.Module):
    """norm -> q, k, v."""

    def __init__(
        self,
        norm: Callable[..., Tensor] = huggingface,
        elem_dtype: torch.dtype = E4M3,
        mode: str = "rceil",
        hp_wgrad: bool = False,
        dtype: torch.dtype = BF16,
        gain_dtype: torch.dtype | None = None,
        other_mode: str | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm
        gain = nn.Parameter((torch.rand(WIDTH) + 0.5).to(gain_dtype or dtype))
        self.gain = None if norm is rms_norm_no_gain else gain
        modes = (mode, other_mode or mode, mode)
        linears = (TorchaoLinear(elem_dtype, m, hp_wgrad, dtype=dtype) for m in modes)
        self.q, self.k, self.v = linears

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x, self.gain, EPS).to(self.q.weight.dtype)
        return self.q(y), self.k(y), self.v(y)


# torchao's training linears


MODELS: dict[str, dict[str, Any]] = {
    "huggingface": {},
    "F.rms_norm": {"norm": rms_norm},
    "no gain": {"norm": rms_norm_no_gain},
    # No block's absmax / 448 is just above a power of two, where torchao's log2 is not exact.
    "fp32": {"dtype": F32},
    "fp32 gain": {"gain_dtype": F32},
    "floor": {"mode": "floor"},
    "e5m2": {"elem_dtype": E5M2},
}


@pytest.mark.full
@some(
    ["huggingface-exact", "fp32-mxnorm", "floor-mxnorm"],
    model=MODELS,
    estimator=["mxnorm", "exact"],
)
def test_changes_no_bit(model: dict[str, Any], estimator: str, monkeypatch: Any) -> None:
    module, x = Site(**model), rows(dtype=model.get("dtype", BF16))
    want = step_without(monkeypatch, module, x, estimator=estimator)
    got = step(module, x, estimator=estimator)
    assert got.fused_ops == BOTH and want.fused_ops == IN_ROWS
    assert_same_step(got, want)
    # Three casts of the output, made by the backward, are gone.
    reductions = [s.report.graphs[0].ops_after["aten.amax.default"] for s in (want, got)]
    assert reductions[0] - reductions[1] == 3
    if estimator == "exact":
        assert_same_step(got, step(module, x, backend="aot_eager"))


@pytest.mark.full
@some(
    ["gain"],
    options={"p": {"p": 1}, "gain": {"gain": "activation"}, "gradient": {"gradient": "orthogonal"}},
)
def test_options_change_no_bit(options: dict[str, Any], monkeypatch: Any) -> None:
    module, x = Site(), rows()
    got = step(module, x, **options)
    assert got.fused_ops == BOTH
    assert_same_step(got, step_without(monkeypatch, module, x, **options))


@pytest.mark.full
def test_a_norm_that_rounds_on_its_way_changes_no_bit(monkeypatch: Any) -> None:
    module, x = Site(in_its_own_dtype), rows()
    got = step(module, x)
    assert got.fused_ops == BOTH
    assert_same_step(got, step_without(monkeypatch, module, x))


@pytest.mark.full
@some(["mxnorm"], estimator=["mxnorm", "exact"])
def test_each_format_has_its_own_casts(estimator: str, monkeypatch: Any) -> None:
    module, x = Site(other_mode="floor"), rows()
    got = step(module, x, estimator=estimator)
    assert got.fused_ops == {"norm_cast_both": 2}
    assert_same_step(got, step_without(monkeypatch, module, x, estimator=estimator))


@some(["2-fold"], p=[1, 2], gain=["fold", "activation"])
def test_step_is_that_of_functional(p: float, gain: str) -> None:
    """Outputs and weight gradients bit for bit; the others' sums may have another order."""
    module, x = Site(), rows()
    got = step(module, x, p=p, gain=gain)
    assert got.fused_ops == BOTH

    def rounded(t: Tensor) -> Tensor:
        return functional.mx_dequantize(*functional.mx_cast(t.contiguous()), t.dtype)

    leaf = x.detach().clone().requires_grad_()
    rounding = {"norm_dtype": BF16, "out_dtype": BF16}
    y = functional.mxnorm(leaf, module.gain, eps=EPS, p=p, **rounding)
    in_cast = module.gain if gain == "activation" else None
    in_rows = functional.mxnorm_cast(leaf, in_cast, eps=EPS, p=p)[:2]
    generator = torch.Generator().manual_seed(2)
    grad_y = torch.zeros_like(y)
    for name, output in zip("qkv", got.outputs, strict=True):
        weight = getattr(module, name).weight.detach()
        folded = module.gain.detach() if gain == "fold" else None
        want = functional.mx_linear(y.detach(), weight, quantized=in_rows, gain=folded)
        assert torch.equal(output, want)
        cotangent = torch.randn(want.shape, generator=generator).bfloat16()
        grad, flat = cotangent.flatten(0, -2), y.detach().flatten(0, -2)
        grad_weight = rounded(grad.t()) @ rounded(flat.t()).t()
        assert torch.equal(got.gradients[f"{name}.weight"], grad_weight)
        grad_y = grad_y + (rounded(grad) @ rounded(weight.t()).t()).view_as(y)
    wanted = torch.autograd.grad(y, (leaf, module.gain), grad_y)
    pair = [got.gradients[name] for name in ("x", "gain")]
    assert_close(pair, wanted, ("x", "gain"), GRADIENT_TOLERANCE[BF16])


@pytest.mark.full
@some(["mxnorm"], estimator=["mxnorm", "exact"])
def test_high_precision_weight_gradient_keeps_one_direction(estimator: str) -> None:
    assert step(Site(hp_wgrad=True), rows(), estimator=estimator).fused_ops == IN_ROWS


@pytest.mark.full
@some(["mxnorm"], estimator=["mxnorm", "exact"])
def test_symbolic_number_of_rows_keeps_one_direction(estimator: str) -> None:
    module, x = Site(), rows(2, 32)
    got = step(module, x, estimator=estimator, dynamic=True)
    assert got.fused_ops == IN_ROWS
    assert_same_step(got, step(module, x, estimator=estimator))


@pytest.mark.full
@some(["mxnorm"], estimator=["mxnorm", "exact"])
def test_consumer_that_is_off_casts_the_exact_output(estimator: str, monkeypatch: Any) -> None:
    module, x = Site(), rows()
    options = {"estimator": estimator, "modules": {"k": False}}
    got = step(module, x, **options)
    assert got.report.fused[0].consumers == ("q", "v") and got.fused_ops == BOTH
    assert_same_step(got, step_without(monkeypatch, module, x, **options))
    exact = step(module, x, estimator="exact")
    assert torch.equal(got.gradients["k.weight"], exact.gradients["k.weight"])


# What is kept for the backward


@pytest.mark.full
@some(["mxnorm"], estimator=["mxnorm", "exact"])
def test_the_forward_saves_one_cast_for_all_and_no_output(estimator: str, monkeypatch: Any) -> None:
    module, x = Site(), rows()
    before = sorted(
        map(_described, step_without(monkeypatch, module, x, estimator=estimator).saved)
    )
    after = sorted(map(_described, step(module, x, estimator=estimator).saved))
    for added in (("torch.float8_e4m3fn", (WIDTH, 64)), ("torch.uint8", (WIDTH, 2))):
        after.remove(added)
    assert after == before


def _described(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype), tuple(tensor.shape)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = Site()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(self.site, x * 2, use_reentrant=False)


@pytest.mark.full
@some(["exact"], estimator=["mxnorm", "exact"])
def test_checkpointing_recomputes_both_casts(estimator: str, monkeypatch: Any) -> None:
    module, x = Checkpointed(), rows()
    got = step(module, x, estimator=estimator)
    assert got.fused_ops == BOTH
    assert all(t.dtype == BF16 for t in got.saved)
    assert_same_step(got, step_without(monkeypatch, module, x, estimator=estimator))


@pairwise(add=[False, True], gain_in_rows=[True, False], read=[3, 4, 5])
def test_cast_that_nobody_reads_is_dropped(add: bool, gain_in_rows: bool, read: int) -> None:
    """As in the forward of a checkpointed region."""
    op = ops.add_norm_cast_both if add else ops.norm_cast_both
    options = (None, None, EPS, "mxnorm", 2.0, "mxfp8", BF16, BF16, "row-major", gain_in_rows)

    def function(x: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        results = op(*([x, x] if add else [x]), gain, *options)
        return tuple(t.view(torch.uint8) for t in results[: read + add])

    x, gain = rows(64).detach(), torch.rand(WIDTH).bfloat16()
    traced = make_fx(function, tracing_mode="fake")(x, gain)
    lower.drop_unread_casts(traced.graph)
    narrower = ops.add_norm_cast if add else ops.norm_cast
    called = {node.target for node in traced.graph.nodes} & {op, narrower}
    assert called == ({narrower} if read == 3 else {op})
    traced.recompile()
    want = function(x, gain)
    assert all(torch.equal(a, b) for a, b in zip(traced(x, gain), want, strict=True))


# Inductor


@pytest.mark.full
def test_inductor_error_is_that_of_aot_eager() -> None:
    """Error against the uncast step in float64 at most 1.5 times that of aot_eager."""
    module, x = Site(), rows()
    truth = Site(dtype=torch.float64)
    truth.load_state_dict(module.state_dict())
    for name in "qkv":
        setattr(truth, name, _plain(getattr(truth, name)))
    want = step(truth, x.double(), backend="eager").gradients
    errors = {}
    for inner in ("aot_eager", "inductor"):
        got = step(module, x, inner=inner)
        assert got.fused_ops == BOTH
        pairs = [(got.gradients[n].double().flatten(), want[n].flatten()) for n in want]
        a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
        errors[inner] = float((a - b).norm() / b.norm())
    assert errors["inductor"] <= 1.5 * errors["aot_eager"] < 0.5, errors


def _plain(linear: nn.Linear) -> nn.Linear:
    plain = nn.Linear(WIDTH, FEATURES, bias=False, dtype=linear.weight.dtype)
    plain.weight = linear.weight
    return plain
