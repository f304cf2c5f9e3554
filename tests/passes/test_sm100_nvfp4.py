"""torchao's NVFP4 inference on Blackwell, traced without a GPU and interpreted on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from sm100 import Emulated, functional_graph, sm100
from torch import Tensor, fx
from torchao.prototype.mx_formats.nvfp4_tensor import (
    NVFP4Tensor,
    QuantizeTensorToNVFP4Kwargs,
    nvfp4_quantize,
    per_tensor_amax_to_scale,
)
from torchao.prototype.mx_formats.utils import to_blocked

from mxnorm_pass import MXNormConfig, SkipReason, functional
from mxnorm_pass.passes.joint import run_pass

aten = torch.ops.aten
BF16, EPS, WIDTH = torch.bfloat16, 1e-5, 192
# Of the activation: of its largest element, calibrated, or none.
Scaled = Literal["dynamic", "static", "none"]
# Calibrated linear by linear, although one norm feeds both.
STATIC = (0.004, 0.003)
# Of e4m3 times of e2m1: by which torchao divides the largest element.
LARGEST = 448.0 * 6.0


def hf_norm(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return gain * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def swizzled(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    scales, values = nvfp4_quantize(weight, 16, scale)
    rows, columns = weight.shape
    padded = (-(-rows // 128) * 128, -(-columns // 64) * 4)
    return values, to_blocked(scales.view(rows, -1)).view(padded)


@dataclass(frozen=True)
class Block:
    """x -> norm -> two linears whose weights arrive quantised, as torchao has them."""

    x: Tensor
    gain: Tensor
    weights: tuple[Tensor, Tensor]
    scaled: Scaled

    @classmethod
    def make(cls, rows: int, scaled: Scaled) -> Block:
        generator = torch.Generator().manual_seed(rows)
        x, *weights = (torch.randn(n, WIDTH, generator=generator).to(BF16) for n in (rows, 64, 128))
        gain = (torch.rand(WIDTH, generator=generator) + 0.5).to(BF16)
        return cls(x, gain, (weights[0], weights[1]), scaled)

    @property
    def weight_scales(self) -> list[Tensor | None]:
        """torchao's weights have one wherever the activation has."""
        if self.scaled == "none":
            return [None, None]
        return [per_tensor_amax_to_scale(w.abs().max()) for w in self.weights]

    def inputs(self) -> list[Tensor]:
        found = [self.x, self.gain, *map(torch.tensor, STATIC)]
        for weight, scale in zip(self.weights, self.weight_scales, strict=True):
            found += [*swizzled(weight, scale), torch.tensor(1.0) if scale is None else scale]
        return found

    def forward(self, x: Tensor, gain: Tensor, *inputs: Tensor) -> list[Tensor]:
        y = hf_norm(x, gain)
        outputs = []
        columns = (inputs[:2], *(inputs[2 + i :: 3] for i in range(3)))
        for static, values, scales, scale in zip(*columns, strict=True):
            weight = NVFP4Tensor(
                values,
                scales,
                16,
                BF16,
                None if self.scaled == "none" else scale,
                static if self.scaled == "static" else None,
                True,
                False,
                QuantizeTensorToNVFP4Kwargs(
                    is_swizzled_scales=True,
                    use_dynamic_per_tensor_scale=self.scaled == "dynamic",
                ),
            )
            outputs.append(F.linear(y, weight))
        return outputs

    def trace(self) -> fx.GraphModule:
        inputs = self.inputs()
        with sm100():
            fakes = [torch.empty_like(t, device="cuda") for t in inputs]
            return functional_graph(self.forward, *fakes)

    def reference(self, estimator: str, p: float, tensor_scale: str) -> list[Tensor]:
        rounding = {"norm_dtype": BF16, "out_dtype": BF16}
        options = {"eps": EPS, "estimator": estimator, "p": p, **rounding}
        outputs = []
        columns = (self.weights, self.weight_scales, STATIC)
        for weight, weight_scale, static in zip(*columns, strict=True):
            scale = self._activation_scale(options, tensor_scale, static)
            *quantized, _ = functional.mxnorm_cast(
                self.x, self.gain, format="nvfp4", tensor_scale=scale, **options
            )
            # ``_scaled_mm`` gets values and scales of blocks, and its result those of tensors.
            activation = functional.mx_dequantize(*quantized, BF16, format="nvfp4")
            values, scales = functional.mx_cast(weight, "nvfp4", tensor_scale=weight_scale)
            y = activation @ functional.mx_dequantize(values, scales, BF16, format="nvfp4").t()
            if scale is not None and weight_scale is not None:
                y = y * (scale * weight_scale).to(BF16)
            outputs.append(y)
        return outputs

    def _activation_scale(
        self, options: dict[str, Any], tensor_scale: str, static: float
    ) -> Tensor | None:
        if self.scaled == "none":
            return None
        if self.scaled == "static":
            return torch.tensor(static)
        estimator, p = options["estimator"], options["p"]
        if estimator == "mxnorm" and tensor_scale == "bound":
            bound = functional.bound_of_normalized("mxnorm", p, WIDTH, 16)
            return functional.nvfp4_norm_tensor_scale(bound, self.gain)
        if estimator == "mxnorm":
            options = options | {"norm_dtype": None, "out_dtype": torch.float32}
        y = functional.mxnorm(self.x, self.gain, block_size=16, **options)
        return functional.nvfp4_tensor_scale(y)


@pytest.mark.parametrize(("scaled", "estimator"), [("dynamic", "mxnorm"), ("static", "exact")])
def test_two_linears(scaled: Scaled, estimator: str) -> None:
    check(8, scaled, estimator, 2, "bound")


@pytest.mark.full
@pairwise(
    rows=[8, 128, 200],
    scaled=["dynamic", "static", "none"],
    estimator=["mxnorm", "exact"],
    p=[1, 2],
    tensor_scale=["bound", "amax"],
)
def test_rewritten_graph_computes_functional(
    rows: int, scaled: Scaled, estimator: str, p: float, tensor_scale: str
) -> None:
    check(rows, scaled, estimator, p, tensor_scale)


def check(rows: int, scaled: Scaled, estimator: str, p: float, tensor_scale: str) -> None:
    block = Block.make(rows, scaled)
    traced = block.trace()
    original = Emulated(traced).run(*block.inputs())
    result = run_pass(
        traced.graph, MXNormConfig(estimator=estimator, p=p, tensor_scale=tensor_scale)
    )
    traced.recompile()
    assert [s.status for s in result.sites] == ["fused"], str(result.sites)
    assert result.sites[0].format == "nvfp4 e2m1 nearest block 16"
    assert "'blocked'" in result.graph.after
    got = Emulated(traced).run(*block.inputs())
    want = block.reference(estimator, p, tensor_scale)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if estimator == "exact":
        assert all(torch.equal(a, b) for a, b in zip(got, original, strict=True))


@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
def test_a_tensor_scale_that_something_else_reads(estimator: str) -> None:
    """The exact norm keeps it; an estimate would have to replace it for that reader, too."""
    graph = Block.make(8, "dynamic").trace().graph
    scale = next(n for n in graph.nodes if n.target is aten.div.Tensor and n.args[1] == LARGEST)
    (outputs,) = graph.output_node().args
    graph.output_node().args = ([*outputs, scale],)
    (site,) = run_pass(graph, MXNormConfig(estimator=estimator)).sites
    reason = None if estimator == "exact" else SkipReason.CAST_ESCAPES
    assert site.reason == reason, str(site)


def test_the_bound_takes_no_pass_over_the_output() -> None:
    result = run_pass(Block.make(8, "dynamic").trace().graph, MXNormConfig())
    # Of the gain alone; the norm itself is gone.
    assert result.graph.ops_after.get("aten.max.default", 0) == 0
    assert result.graph.ops_after["aten.amax.default"] == 1
    assert "aten.rsqrt.default" not in result.graph.ops_after


@pytest.mark.parametrize(("rows", "width"), [(128, 64), (64, 64), (128, 48)])
@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
def test_heads_are_normalised_one_by_one(rows: int, width: int, estimator: str) -> None:
    """The matmul's scales lie as its own rows want it, not as the norm's shorter ones."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(rows, 2, width, generator=generator).to(BF16)
    gain = torch.logspace(-2, 1, width).to(BF16)
    weight = torch.randn(64, 2 * width, generator=generator).to(BF16)

    def forward(x: Tensor, gain: Tensor, values: Tensor, scales: Tensor) -> list[Tensor]:
        kwargs = QuantizeTensorToNVFP4Kwargs(
            is_swizzled_scales=True, use_dynamic_per_tensor_scale=False
        )
        cast = NVFP4Tensor(values, scales, 16, BF16, None, None, True, False, kwargs)
        return [F.linear(hf_norm(x, gain).flatten(1), cast)]

    inputs = [heads, gain, *swizzled(weight, None)]
    with sm100():
        traced = functional_graph(forward, *(torch.empty_like(t, device="cuda") for t in inputs))
    (site,) = run_pass(traced.graph, MXNormConfig(estimator=estimator)).sites
    traced.recompile()
    assert site.status == "fused", str(site)
    (got,) = Emulated(traced).run(*inputs)
    options = {"eps": EPS, "estimator": estimator, "norm_dtype": BF16, "out_dtype": BF16}
    *quantized, _ = functional.mxnorm_cast(heads, gain, format="nvfp4", **options)
    rows_of_matmul = functional.mx_dequantize(*quantized, BF16, format="nvfp4").flatten(1)
    quantized = functional.mx_cast(weight, "nvfp4")
    assert torch.equal(
        got, rows_of_matmul @ functional.mx_dequantize(*quantized, BF16, format="nvfp4").t()
    )
