"""Where the match of a skipped norm failed: the node, what had to stand there, what stood there."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hand_casts import E4M3_FLOOR, HandCast, ReadsMore, dequantize, floor_by_bits, reads_values
from matching import (
    BF16,
    F32,
    WIDTH,
    Model,
    converted_model,
    eps_outside_sqrt,
    expected_warnings,
    in_its_own_dtype,
    inputs,
    layer_norm,
    layer_norm_by_hand,
    mean_over_tokens,
    mean_square,
    only_site,
    power_without_keepdim,
    rms_norm,
    sum_and_sqrt,
)
from norm_spellings import clamped_rms, einsum, halved, without_root
from torch import Tensor, nn
from usage import Block, Tagged

import mxnorm_pass
from mxnorm_pass import Graph, Report, SkipReason
from mxnorm_pass.compilation.job import CompileJob
from mxnorm_pass.options.parse import parse

pytestmark = expected_warnings


@dataclass(frozen=True)
class Case:
    """A norm that is skipped, and what its near miss says.

    Attributes:
        build: the model and its input.
        call: the op at the node where the match failed, or its kind of input.
        expected, found: parts of the texts.
        source: part of the model's line that made the node.
    """

    build: Callable[[], tuple[nn.Module, Tensor]]
    reason: SkipReason
    call: str
    expected: str
    found: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    train: bool = False


def model_of(*args: Any, dtype: torch.dtype = F32, **kwargs: Any) -> Callable[[], Any]:
    return lambda: (Model(*args, dtype=dtype, **kwargs), inputs(dtype=dtype))


class EpsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 64)
        self.register_buffer("eps", torch.tensor(1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * torch.rsqrt(mean_square(x) + self.eps))


class Reads(Model):
    """Another reader in the linears' place."""

    def __init__(self, read: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(rms_norm)
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self, self.norm(x))


class AfterLinear(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * torch.rsqrt(mean_square(x) + self.norm.eps)


def rotated(model: Model, y: Tensor) -> Tensor:
    heads = y.view(2, 8, 4, 32).transpose(1, 2)
    return heads @ heads.mT


def routed(model: Model, y: Tensor) -> Any:
    picked = model.first(y).softmax(-1).topk(2)
    return picked.values, y[:, picked.indices[0, 0]] @ y.mT


class SharedCast(Model):
    """One cast feeds two linears."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = dequantize(*E4M3_FLOOR(self.norm(x)))
        return self.first(y), self.second(y)


def unknown_cast() -> tuple[nn.Module, Tensor]:
    cast = HandCast(floor_by_bits, limit=240.0)
    return Reads(lambda m, y: F.linear(dequantize(*cast(y)), m.second.weight)), inputs()


def tagged() -> tuple[nn.Module, Tensor]:
    block = Block().requires_grad_(False)
    block.linear.weight = nn.Parameter(Tagged(block.linear.weight.detach()), False)
    return block, torch.randn(4, 64)


R = SkipReason
CASES = {
    "caller": Case(
        lambda: (Reads(lambda m, y: y), inputs()),
        R.NO_MX_CAST,
        "aten.mul.Tensor",
        "a linear with an MX cast",
        "an output of the graph",
        "F.rms_norm",
    ),
    "attention": Case(
        lambda: (Reads(rotated), inputs()),
        R.NO_MX_CAST,
        "aten.transpose.int",
        "a linear with an MX cast",
        "aten.transpose.int f32[2, 4, 8, 32], which feeds aten.bmm.default",
        "heads = y.view(2, 8, 4, 32).transpose(1, 2)",
    ),
    "router": Case(
        lambda: (Reads(routed), inputs()),
        R.NO_MX_CAST,
        "aten.addmm.default",
        "a linear with an MX cast",
        "first, a router in f32 that is cast only if `modules` names it; aten.index.Tensor",
        "picked = model.first(y)",
    ),
    "fp16": Case(
        model_of(dtype=torch.float16),
        R.NO_MX_CAST,
        "aten.addmm.default",
        "a linear with an MX cast",
        "first, a linear in f16 where only bf16 and f32 get casts; second, a linear",
        "return self.first(y), self.second(y)",
    ),
    "existing": Case(
        model_of(),
        R.NO_MX_CAST,
        "aten.addmm.default",
        "a linear with an MX cast",
        "first, a linear in f32 that quantize='existing' leaves without a cast",
        "return self.first(y), self.second(y)",
        {"quantize": "existing"},
    ),
    "unknown cast": Case(
        unknown_cast,
        R.CAST_NOT_RECOGNIZED,
        "aten._to_copy.default",
        "the bits of rceil, floor, ceil, even",
        "matches no MX scale mode",
        "return scaled.clamp(-self.limit, self.limit).to(self.elem_dtype)",
    ),
    "cast read by a sum": Case(
        lambda: (ReadsMore(reads_values), inputs(scale=1.0)),
        R.CAST_ESCAPES,
        "aten.sum.dim_IntList",
        "dequantisation and matmul",
        "aten.sum.dim_IntList f32[2, 8]",
        "return values, scales, values.float().sum(-1)",
        {"quantize": "existing"},
    ),
    "mean over tokens": Case(
        model_of(mean_over_tokens),
        R.NORM_DIMENSION,
        "aten.mean.dim",
        "a mean over dim 2 alone",
        "a mean over dim 1 of 3",
        "x.pow(2).mean(1, keepdim=True)",
    ),
    "eps outside": Case(
        model_of(eps_outside_sqrt),
        R.NORM_FORM,
        "aten.add.Tensor",
        "eps inside the root",
        "eps is added outside the root",
        "return x / (torch.sqrt(mean_square(x)) + eps) * w",
    ),
    "scaled sum": Case(
        model_of(lambda x, w, eps: x / torch.sqrt((x * x).sum(-1, True) / 100 + eps) * w),
        R.NORM_FORM,
        "aten.div.Tensor",
        "sum(x^2) / 128",
        "sum(x^2) is scaled by 0.01, not by 1/128",
        "/ 100 + eps",
    ),
    "clamp": Case(
        model_of(clamped_rms),
        R.NORM_FORM,
        "aten.clamp.default",
        "x / sqrt(mean(x^2) + eps)",
        "eps by clamp, not added: rms is at least 1e-05",
        "return x / mean_square(x).sqrt().clamp(min=eps) * w",
    ),
    "factor": Case(
        model_of(halved),
        R.NORM_FORM,
        "aten.mul.Tensor",
        "no factor but the gain",
        "x / rms is multiplied by 0.5",
        "return 0.5 * x * torch.rsqrt(mean_square(x) + eps) * w",
    ),
    "another function": Case(
        model_of(without_root),
        R.NORM_FORM,
        "aten.div.Tensor",
        "x / sqrt(mean(x^2) + eps)",
        "x is divided by another function of its norm",
        "return x / (mean_square(x) + eps) * w",
    ),
    "after the linear": Case(
        lambda: (AfterLinear(rms_norm), inputs()),
        R.AFTER_LINEAR,
        "aten.mul.Tensor",
        "the norm before the linear",
        "aten.addmm.default f32[16, 64] is divided by the norm of what it reads",
        "return self.first(x) * torch.rsqrt(mean_square(x) + self.norm.eps)",
    ),
    "LayerNorm": Case(
        model_of(layer_norm),
        R.LAYER_NORM,
        "aten.native_layer_norm.default",
        "the mean of x^2",
        "aten.native_layer_norm.default, which subtracts the mean",
        "F.layer_norm",
    ),
    "LayerNorm by hand": Case(
        model_of(layer_norm_by_hand),
        R.LAYER_NORM,
        "aten.sub.Tensor",
        "x itself",
        "x - mean(x) is normalised",
        "(x - mean).pow(2)",
    ),
    "eps input": Case(
        lambda: (EpsInput(), inputs()),
        R.EPS_INPUT,
        "aten.add.Tensor",
        "a constant eps",
        "eps is placeholder",
        "torch.rsqrt(mean_square(x) + self.eps)",
    ),
    "width": Case(
        lambda: (Model(rms_norm, width=48), inputs(2, 8, 48)),
        R.WIDTH,
        "aten.mul.Tensor",
        "whole blocks of 32",
        "width 48",
        "F.rms_norm",
    ),
    "float64": Case(
        model_of(in_its_own_dtype, dtype=torch.float64),
        R.DTYPE,
        "f64[2, 8, 128]",
        "one of torch.bfloat16, torch.float16, torch.float32",
        "the norm reads torch.float64",
        "return h.pow(2).mean(-1, keepdim=True)",
    ),
    "gain": Case(
        model_of(in_its_own_dtype, gain_shape=(8, WIDTH)),
        R.GAIN_SHAPE,
        "aten.mul.Tensor",
        "a gain of shape (128,)",
        "a gain of shape (8, 128), width 128",
        "return x * torch.rsqrt(mean_square(x) + eps) * w",
    ),
    "bf16 throughout": Case(
        model_of(in_its_own_dtype, dtype=BF16),
        R.ROUNDING,
        "bf16[2, 8, 128]",
        "f32",
        "bf16[2, 8, 128]",
        "return h.pow(2).mean(-1, keepdim=True)",
        {"estimator": "exact"},
    ),
    "einsum": Case(
        model_of(einsum),
        R.ROUNDING,
        "aten.mul.Tensor",
        "x * rsqrt(mean(x^2) + eps) and nothing else",
        "aten.mul.Tensor f32[2, 8, 128]",
        "return (x.float() * rho * w).type_as(x)",
        {"estimator": "exact"},
    ),
    "power": Case(
        model_of(power_without_keepdim),
        R.ROUNDING,
        "aten.pow.Tensor_Scalar",
        "aten.rsqrt",
        "aten.pow.Tensor_Scalar f32[2, 8]",
        "rho = (h.square().mean(-1) + eps).pow(-0.5).unsqueeze(-1)",
        {"estimator": "exact"},
    ),
    "gain first": Case(
        model_of(lambda x, w, eps: x * w * torch.rsqrt(mean_square(x) + eps)),
        R.ROUNDING,
        "aten.mul.Tensor",
        "the gain after x / rms",
        "aten.mul.Tensor f32[2, 8, 128]",
        "x * w * torch.rsqrt",
        {"estimator": "exact"},
    ),
    "sum": Case(
        model_of(sum_and_sqrt),
        R.ROUNDING,
        "aten.sum.dim_IntList",
        "aten.mean.dim",
        "aten.sum.dim_IntList f32[2, 8, 1]",
        "rms = torch.sqrt((h * h).sum(-1, keepdim=True) / x.shape[-1] + eps)",
        {"estimator": "exact"},
    ),
    "two block sizes": Case(
        model_of(rms_norm),
        R.BLOCK_SIZES,
        "aten.mm.default",
        "blocks of 32, as for first",
        "second casts blocks of 16, first of 32",
        "return self.first(y), self.second(y)",
        {"modules": {"second": {"format": "nvfp4"}}},
    ),
    "quantised weights": Case(
        lambda: (converted_model(), inputs(dtype=BF16)),
        R.NO_WEIGHT_CAST,
        "aten.mm.default",
        "a cast of each linear's [N, 128] weight",
        "first multiplies f8e4m3fn[64, 128] and f8e8m0fnu[32, 16]; second",
        "",
        {"gain": "fold"},
    ),
    "shared cast": Case(
        lambda: (SharedCast(rms_norm), inputs().requires_grad_()),
        R.BACKWARD,
        "aten.view.default",
        "a cast that feeds nothing but fused linears",
        "feeds fused and other linears",
        "values = self.elements(blocks, byte).view(x.shape)",
        {"quantize": "existing", "modules": {"second": False}},
        True,
    ),
    "subclass": Case(tagged, R.DTENSOR, "aten.mean.dim", "plain tensors", "Tagged", ""),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_near_miss(case: Case) -> None:
    report = traced(case)
    site = only_site(report)
    assert site.reason is case.reason, str(site)
    miss = site.near_miss
    assert miss is not None and site.detail == miss.found
    assert case.call in line_of(report.graphs[0], miss.node)
    assert case.expected in miss.expected
    assert case.found in miss.found
    assert case.source in code_at(miss.source)
    assert f"{site.reason.value}\n" in str(report) and f"           {miss}" in str(report)
    assert Report.from_json(report.to_json()).sites == [site]


def test_every_reason_has_a_case() -> None:
    assert {case.reason for case in CASES.values()} == set(SkipReason) - {SkipReason.DISABLED}


def traced(case: Case) -> Report:
    torch._dynamo.reset()
    model, x = case.build()
    with torch.set_grad_enabled(case.train):
        return mxnorm_pass.explain(model, x, options={"inner": "aot_eager", **case.options})


def line_of(graph: Graph, node: str) -> str:
    """Where the readable code defines the node."""
    (line,) = re.findall(rf"^ +(?:# )?{node}(?:: | = ).*$", graph.before, re.MULTILINE)
    return str(line)


def code_at(source: str) -> str:
    """The code that a near miss shows, which must stand at its line of the file."""
    path, number, code = re.fullmatch(r"(.+?\.py):(\d+): (.+)", source).groups()  # type: ignore[union-attr]
    if path.startswith("/"):
        assert linecache.getline(path, int(number)).strip() == code
    return str(code)


@pytest.mark.parametrize("modules", [{"norm": False}, {"first": False, "second": False}], ids=str)
def test_nothing_failed_where_modules_turn_the_norm_off(modules: dict[str, bool]) -> None:
    options = {"inner": "aot_eager", "modules": modules}
    site = only_site(mxnorm_pass.explain(Model(), inputs(), options=options))
    assert site.reason is SkipReason.DISABLED and site.near_miss is None


def test_a_fused_norm_has_no_near_miss() -> None:
    site = only_site(mxnorm_pass.explain(Model(), inputs(), options={"inner": "aot_eager"}))
    assert site.status == "fused" and site.near_miss is None


def report_key(source: str) -> str:
    """Under which the report of a compile of ``forward`` is kept for warm caches."""
    keys: list[str] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        keys.append(CompileJob.of(gm, example_inputs, parse(None)).report_key())
        return gm

    names: dict[str, Any] = {"__name__": __name__, "norm": nn.RMSNorm(WIDTH)}
    exec(compile(source, "model.py", "exec"), names)
    torch._dynamo.reset()
    torch.compile(names["forward"], backend=backend)(inputs())
    return keys[0]


def test_a_report_from_a_warm_cache_shows_no_old_lines() -> None:
    """torch's own lines are the innermost here, and they stay where they are."""
    source = "def forward(x):\n    return norm(x)\n"
    assert report_key(source) == report_key(source) != report_key(f"\n{source}")
