"""Models of a norm and its linears, compiled with the pass, and what they must compute.

What fuses is compared bit for bit with ``mxnorm_pass.functional``; what does not is compared bit
for bit with the uncompiled model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from norm_spellings import UNUSUAL, WITHOUT_EPS, mean_square
from reference import quantize_with_torchao
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Report, Site, SkipReason, functional

# For ``pytestmark``: models that are not rewritten say so.
expected_warnings = pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
TRAIN = {"inference": False, "training": True}
in_both_modes = pytest.mark.parametrize("train", TRAIN.values(), ids=TRAIN)

WIDTH = 128
EPS = 1e-5
BF16, F32 = torch.bfloat16, torch.float32
CONSUMERS = ("first", "second")
NormFunction = Callable[[Tensor, Any, float], Tensor]

# Relative norm of the difference of two gradients. Both come from the same formulas with sums in
# another order: in fp32 a row of 128 terms is off by up to 128 * 2^-24 = 8e-6. In bf16 each
# rounding is off by up to 2^-9 = 2e-3, at most four of them (norm, gain, output, gradient) differ.
GRADIENT_TOLERANCE = {F32: 1e-5, BF16: 1e-2}


# Norms


def huggingface(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.to(torch.float32)
    return w * (h * torch.rsqrt(mean_square(h) + eps)).to(x.dtype)


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def rms_norm_no_gain(x: Tensor, w: None, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None, eps)


def gemma(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(mean_square(h) + eps) * (1.0 + w.float())).type_as(x)


def olmo(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (w * (h * torch.rsqrt(mean_square(h) + eps))).to(x.dtype)


def t5(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return w * (x * torch.rsqrt(mean_square(x.to(torch.float32)) + eps)).to(w.dtype)


def sum_and_sqrt(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    rms = torch.sqrt((h * h).sum(-1, keepdim=True) / x.shape[-1] + eps)
    return (h / rms * w).type_as(x)


def power_without_keepdim(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    rho = (h.square().mean(-1) + eps).pow(-0.5).unsqueeze(-1)
    return (h * rho).type_as(x) * w


def one_over_sqrt(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * (1.0 / (mean_square(h) + eps).sqrt()) * w).type_as(x)


def in_its_own_dtype(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(mean_square(x) + eps) * w


def two_upcasts(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (x.float() * torch.rsqrt(mean_square(x.float()) + eps) * w).type_as(x)


def input_computed_twice(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (x + x.tanh()) * torch.rsqrt(mean_square(x + x.tanh()) + eps) * w


def eps_before_the_division(x: Tensor, w: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    rho = torch.rsqrt((x.float().square().sum(-1, keepdim=True) + eps * width) / width)
    return (x.float() * rho * w).type_as(x)


def gain_on_x(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return (w * x.float() / torch.sqrt(mean_square(x.float()) + eps)).type_as(x)


def gain_on_rho(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * (torch.rsqrt(mean_square(h) + eps) * w)).type_as(x)


def vector_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """No eps at all."""
    h = x.float()
    return (h / (h.norm(2, -1, keepdim=True) * x.shape[-1] ** -0.5) * w).type_as(x)


def narrowed_first(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.to(BF16).float()
    return h * torch.rsqrt(mean_square(h) + eps) * w


# What resembles a norm that can be fused


def mean_over_tokens(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps) * w


def eps_outside_sqrt(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (torch.sqrt(mean_square(x)) + eps) * w


def layer_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, None, eps)


def layer_norm_by_hand(x: Tensor, w: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return w * (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + eps)


def layer_norm_of_variance(x: Tensor, w: Tensor, eps: float) -> Tensor:
    centered = x.float() - x.float().mean(-1, keepdim=True)
    variance = x.float().var(-1, unbiased=False, keepdim=True)
    return (centered / torch.sqrt(variance + eps)).type_as(x) * w


def layer_norm_of_var_mean(x: Tensor, w: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps) * w


def variance_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Divides by the deviation without subtracting the mean: neither norm."""
    return x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps) * w


# Models


class Norm(nn.Module):
    def __init__(self, function: NormFunction, gain: Tensor | None, eps: float) -> None:
        super().__init__()
        self.function, self.eps = function, eps
        self.weight = nn.Parameter(gain) if gain is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


class Model(nn.Module):
    """norm -> two linears, the first with a bias."""

    def __init__(
        self,
        function: NormFunction | None = huggingface,
        *,
        width: int = WIDTH,
        dtype: torch.dtype = F32,
        gain_dtype: torch.dtype | None = None,
        gain_shape: tuple[int, ...] | None = None,
        has_gain: bool = True,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        gain = torch.rand(gain_shape if gain_shape is not None else (width,)) + 0.5
        gain = gain.to(gain_dtype or dtype)
        if function is None:
            self.norm: nn.Module = nn.RMSNorm(width, eps=eps, dtype=gain.dtype)
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        else:
            self.norm = Norm(function, gain if has_gain else None, eps)
        self.first = nn.Linear(width, 64, dtype=dtype)
        self.second = nn.Linear(width, 32, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x).to(self.first.weight.dtype)
        return self.first(y), self.second(y)


def inputs(*shape: int, dtype: torch.dtype = F32, scale: float = 0.01, seed: int = 1) -> Tensor:
    """Rows of RMS 0.01, where eps = 1e-5 changes the norm by 5 %."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*(shape or (2, 8, WIDTH)), generator=generator) * scale).to(dtype)


# Runs


def run(
    model: nn.Module,
    *args: Tensor,
    train: bool = False,
    dynamic: bool | None = False,
    **options: Any,
) -> tuple[tuple[Tensor, ...], Report]:
    """Outputs of the compiled model, and what the pass says of it."""
    torch._dynamo.reset()
    with mxnorm_pass.record() as report, torch.set_grad_enabled(train):
        compiled = torch.compile(
            model, backend="mxnorm", dynamic=dynamic, options={"inner": "aot_eager", **options}
        )
        return compiled(*args), report


def uncompiled(model: nn.Module, *args: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(*args)


def only_site(report: Report) -> Site:
    (site,) = report.sites
    return site


def assert_fused(report: Report, consumers: Sequence[str] = CONSUMERS, gain: Any = "fold") -> None:
    site = only_site(report)
    assert (site.status, site.reason) == ("fused", None), str(site)
    assert site.norm == "norm"
    assert site.consumers == tuple(consumers)
    assert (site.estimator, site.gain) == ("mxnorm", gain)
    assert site.format == "mxfp8 e4m3fn rceil block 32"


def assert_skipped(report: Report, reason: SkipReason) -> Site:
    site = only_site(report)
    assert (site.status, site.reason) == ("skipped", reason), str(site)
    return site


def assert_explained(report: Report) -> None:
    """Every norm that is skipped, and not by choice, names a node of its graph and a line."""
    for graph in report.graphs:
        for site in graph.sites:
            miss = site.near_miss
            wanted = site.reason not in (None, SkipReason.DISABLED)
            assert (miss is not None) == wanted, str(site)
            if miss is not None:
                assert re.search(rf"^ +(# )?{miss.node}(: | = )", graph.before, re.M), str(site)
                assert miss.expected and miss.found == site.detail
                assert re.match(r".+\.py:\d+: .", miss.source), str(site)


def assert_untouched(report: Report) -> None:
    for graph in report.graphs:
        assert graph.before == graph.after
        assert graph.ops_before == graph.ops_after


def assert_same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.isfinite().all() and torch.equal(a, b)


def gradients(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], retain: bool = False
) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    cotangents = [torch.randn_like(y) for y in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=retain)


def assert_close(
    got: Sequence[Tensor], want: Sequence[Tensor], names: Sequence[str], tolerance: float
) -> None:
    for name, a, b in zip(names, got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= tolerance, f"{name}: {error}"


def assert_gradients(
    model: nn.Module, x: Tensor, got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float
) -> None:
    """Gradients of x and of all parameters, against autograd through the reference."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    leaves = (x, *parameters)
    assert_close(gradients(got, leaves), gradients(want, leaves), ("x", *names), tolerance)


def reference(
    model: Model,
    x: Tensor,
    gain: Tensor | None,
    *,
    fused: Sequence[str] = CONSUMERS,
    eps: float = EPS,
    norm_dtype: torch.dtype | None = None,
    gradient: str = "true",
) -> tuple[Tensor, ...]:
    """The model in ``functional``: fused linears read the estimate, others the exact norm."""
    dtype = model.first.weight.dtype
    rounding = {"norm_dtype": norm_dtype, "out_dtype": dtype}
    y = functional.mxnorm(x, gain, eps=eps, gradient=gradient, **rounding)
    exact = functional.mxnorm(x, gain, eps=eps, estimator="exact", **rounding)
    quantized = functional.mxnorm_cast(x, eps=eps)[:2]
    outputs = []
    for name in CONSUMERS:
        linear = getattr(model, name)
        if name in fused:
            outputs.append(
                functional.mx_linear(y, linear.weight, linear.bias, quantized=quantized, gain=gain)
            )
        else:
            outputs.append(linear(exact))
    return tuple(outputs)


def cast_reference(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """The model's own norm, then the casts that ``quantize="norm-fed"`` inserts."""
    with torch.no_grad():
        y = model.norm(x).to(model.first.weight.dtype)
        linears = (model.first, model.second)
        return tuple(functional.mx_linear(y, m.weight, m.bias) for m in linears)


# Spellings of the norm


@dataclass(frozen=True)
class Spelling:
    """A norm that must fuse.

    Attributes:
        function: None for ``nn.RMSNorm``.
        rounds: rounds to the input's dtype before the gain.
        one_plus: the gain is 1 + w.
    """

    function: NormFunction | None
    rounds: bool = False
    one_plus: bool = False
    has_gain: bool = True
    eps: float = EPS

    def model(self, **arguments: Any) -> Model:
        return Model(self.function, **{"eps": self.eps, "has_gain": self.has_gain, **arguments})

    def gain(self, model: Model) -> Tensor | None:
        weight = model.norm.weight
        return 1.0 + weight.float() if self.one_plus else weight

    def reference(self, model: Model, x: Tensor, **options: Any) -> tuple[Tensor, ...]:
        rounding = x.dtype if self.rounds else None
        options = {"eps": self.eps, "norm_dtype": rounding, **options}
        return reference(model, x, self.gain(model), **options)


SPELLINGS = {
    "huggingface": Spelling(huggingface, rounds=True),
    "nn.RMSNorm": Spelling(None),
    "F.rms_norm": Spelling(rms_norm),
    "F.rms_norm without gain": Spelling(rms_norm_no_gain, has_gain=False),
    "gemma": Spelling(gemma, one_plus=True),
    "olmo": Spelling(olmo),
    "t5": Spelling(t5, rounds=True),
    "sum and sqrt": Spelling(sum_and_sqrt),
    "power without keepdim": Spelling(power_without_keepdim, rounds=True),
    "one over sqrt": Spelling(one_over_sqrt),
    "own dtype": Spelling(in_its_own_dtype),
    "two upcasts": Spelling(two_upcasts),
    "gain on x": Spelling(gain_on_x),
    "gain on rho": Spelling(gain_on_rho),
    "eps before the division": Spelling(eps_before_the_division),
    "vector norm": Spelling(vector_norm, eps=0.0),
    **{name: Spelling(function) for name, function in UNUSUAL.items()},
    **{name: Spelling(function, eps=0.0) for name, function in WITHOUT_EPS.items()},
}
DTYPES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "bf16, fp32 gain": (BF16, F32),
    "fp32, bf16 gain": (F32, BF16),
}


def spellings(*names: str) -> Any:
    names = names or tuple(SPELLINGS)
    return pytest.mark.parametrize("spelling", [SPELLINGS[n] for n in names], ids=names)


def converted_model() -> Model:
    """Weights that torchao quantised ahead of time; its linears know no bias."""
    model = Model(dtype=BF16)
    model.first.bias = None
    return quantize_with_torchao(model)
