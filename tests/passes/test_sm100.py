"""torchao on Blackwell: hardware casts, swizzled scales, ``_scaled_mm``, traced without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from reference import build_llama, token_ids
from sm100 import Emulated, functional_graph, sm100, to_fake_cuda
from torch import Tensor, fx, nn
from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear
from torchao.prototype.mx_formats import kernels, mx_tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs, to_mx
from torchao.prototype.mx_formats.utils import from_blocked, to_blocked
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

import mxnorm_pass
from mxnorm_pass import MXNormConfig, SkipReason, functional
from mxnorm_pass.compilation import inductor_passes
from mxnorm_pass.numerics.e8m0 import round_up_to_e8m0
from mxnorm_pass.numerics.formats import ELEMENT_DTYPES, BlockFormat
from mxnorm_pass.numerics.layout import blocked_scales
from mxnorm_pass.passes.joint import run_pass
from mxnorm_pass.passes.match.casts.find import Cast, find_casts

aten = torch.ops.aten
BF16, E8M0 = torch.bfloat16, torch.float8_e8m0fnu
AUTO = KernelPreference.AUTO
EPS = 1e-5
modes = pytest.mark.parametrize("mode", ["RCEIL", "FLOOR"])


@pytest.mark.parametrize("columns", [1, 3, 4, 18, 128])
@pytest.mark.parametrize("rows", [1, 32, 127, 128, 129, 300])
def test_blocked_layout_is_torchaos(rows: int, columns: int) -> None:
    scales = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    got = blocked_scales(scales)
    assert torch.equal(got.flatten(), to_blocked(scales))
    assert torch.equal(from_blocked(got, rows, columns), scales)
    assert torch.equal(blocked_scales(scales.view(1, rows, columns)), got)


def test_round_up_to_e8m0_is_the_smallest_scale_that_is_not_below() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800000, (20_000,), generator=generator, dtype=torch.int32)
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float32)
    near = torch.cat([powers.view(torch.int32) + d for d in (-1, 0, 1)]).clamp(0, 0x7F7FFFFF)
    x = torch.cat([bits, near]).view(torch.float32).double()
    exponent = round_up_to_e8m0(x.float()).double()
    assert (torch.exp2(exponent - 127) >= x)[exponent < 254].all()
    assert (torch.exp2(exponent - 128) < x)[exponent > 0].all()
    special = torch.tensor([0.0, float("inf"), float("nan"), 2.0**127, 1.5 * 2.0**127])
    assert round_up_to_e8m0(special).tolist() == [0, 254, 255, 254, 254]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("elem", ELEMENT_DTYPES, ids=str)
def test_rceil_by_ptx_is_exact(elem: torch.dtype, dtype: torch.dtype) -> None:
    def cast(x: Tensor) -> list[Tensor]:
        return list(to_mx(x, elem, 32, ScaleCalculationMode.RCEIL))

    with sm100():
        traced = functional_graph(cast, torch.empty(4, 64, dtype=dtype, device="cuda"))
    if not any("asm_str" in n.kwargs for n in traced.graph.nodes):
        pytest.skip(f"torchao uses no PTX on torch {torch.__version__}")
    (found,) = find_casts(traced.graph)
    assert isinstance(found, Cast), found
    assert found.format == BlockFormat.of(elem, "rceil")


# Whole Llama, inference


@dataclass(frozen=True)
class Operand:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, node: fx.Node) -> Operand:
        value = node.meta["val"]
        return cls(tuple(value.shape), value.stride(), value.dtype)


def matmul_operands(graph: fx.Graph, *targets: Any) -> list[list[Operand]]:
    nodes = [n for n in graph.nodes if n.target in targets]
    return [[Operand.of(i) for i in n.all_input_nodes] for n in nodes]


@contextlib.contextmanager
def watch_operands(*targets: Any) -> Iterator[list[list[list[Operand]]]]:
    """The matmuls' operands before and after each run of the pass."""
    seen: list[list[list[Operand]]] = []

    def watched(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        seen.append(matmul_operands(graph, *targets))
        result = run_pass(graph, *args, **kwargs)
        seen.append(matmul_operands(graph, *targets))
        return result

    with mock.patch.object(inductor_passes, "run_pass", watched):
        yield seen


def is_converted(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


@pytest.mark.full
@pairwise(
    estimator=["mxnorm", "exact"],
    length={"padded": 16, "whole tiles": 128},
    mode=["RCEIL", "FLOOR"],
)
def test_llama_inference(estimator: str, length: int, mode: str) -> None:
    model = build_llama(BF16, layers=1, hidden=128)
    config = MXDynamicActivationMXWeightConfig(
        kernel_preference=AUTO, scaling_mode=ScaleCalculationMode[mode]
    )
    options = {"inner": "aot_eager", "estimator": estimator}
    with sm100(), torch.no_grad(), watch_operands(aten._scaled_mm.default) as operands:
        quantize_(to_fake_cuda(model), config, filter_fn=is_converted)
        ids = token_ids(2, length).to("cuda")
        report = mxnorm_pass.explain(model, ids, use_cache=False, options=options)
    before, after = operands
    assert len(before) == 7 and before == after
    assert len(report.fused) == 2 and [s.norm for s in report.skipped] == ["model.norm"]
    assert {s.format for s in report.fused} == {f"mxfp8 e4m3fn {mode.lower()} block 32"}
    (graph,) = report.graphs
    fused = [line for line in graph.after.splitlines() if "norm_cast.default(" in line]
    assert len(fused) == 2 and all("'blocked'" in line for line in fused)
    # Of the seven swizzles o_proj's and down_proj's are left.
    swizzles = "aten.transpose.int"
    assert graph.ops_before[swizzles] - graph.ops_after[swizzles] == 5


# Numbers: the rewritten graph, interpreted on the CPU


def hf_norm(x: Tensor, gain: Tensor) -> Tensor:
    h = x.float()
    return gain * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


@dataclass(frozen=True)
class Block:
    """x -> norm -> two linears whose weights arrive quantised, scales swizzled."""

    x: Tensor
    gain: Tensor
    weights: tuple[Tensor, Tensor]
    mode: ScaleCalculationMode

    @classmethod
    def make(cls, rows: int, mode: str) -> Block:
        generator = torch.Generator().manual_seed(rows)
        x, first, second = (
            torch.randn(n, 160, generator=generator).to(BF16) for n in (rows, 64, 128)
        )
        gain = (torch.rand(160, generator=generator) + 0.5).to(BF16)
        return cls(x, gain, (first, second), ScaleCalculationMode[mode])

    def inputs(self) -> list[Tensor]:
        found = [self.x, self.gain]
        for weight in self.weights:
            scales, values = to_mx(weight, torch.float8_e4m3fn, 32, self.mode, True)
            found += [values, scales]
        return found

    def forward(self, x: Tensor, gain: Tensor, *quantized: Tensor) -> tuple[Tensor, ...]:
        y = hf_norm(x, gain)
        activation = QuantizeTensorToMXKwargs(
            torch.float8_e4m3fn, 32, self.mode, AUTO, is_swizzled_scales=True
        )
        weights = [
            MXTensor(v, s, torch.float8_e4m3fn, 32, BF16, AUTO, activation, True)
            for v, s in zip(quantized[::2], quantized[1::2], strict=True)
        ]
        return tuple(F.linear(y, w) for w in weights)

    def trace(self) -> fx.GraphModule:
        with sm100():
            fakes = [torch.empty_like(t, device="cuda") for t in self.inputs()]
            return functional_graph(self.forward, *fakes)

    def reference(self, estimator: str) -> tuple[Tensor, ...]:
        options = {"format": BlockFormat.of(scale_mode=self.mode.name.lower())}
        rounding = {"norm_dtype": BF16, "out_dtype": BF16}
        *quantized, _ = functional.mxnorm_cast(
            self.x, self.gain, eps=EPS, estimator=estimator, **options, **rounding
        )
        return tuple(
            functional.mx_linear(self.x, w, quantized=tuple(quantized), **options)
            for w in self.weights
        )


@pairwise(estimator=["mxnorm", "exact"], rows=[8, 128, 200], mode=["RCEIL", "FLOOR"])
def test_rewritten_graph_computes_functional(estimator: str, rows: int, mode: str) -> None:
    block = Block.make(rows, mode)
    traced = block.trace()
    original = Emulated(traced).run(*block.inputs())
    result = run_pass(traced.graph, MXNormConfig(estimator=estimator))
    traced.recompile()
    assert [s.status for s in result.sites] == ["fused"]
    assert "'blocked'" in result.graph.after and "aten.transpose.int" not in result.graph.after
    got = Emulated(traced).run(*block.inputs())
    want = block.reference(estimator)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if estimator == "exact":
        assert all(torch.equal(a, b) for a, b in zip(got, original, strict=True))


def other_order(scales: Tensor) -> Tensor:
    """Tiles of 128 by 4, but row 4 i + j of a tile lies at [i, j]."""
    rows, columns = scales.shape
    tiles = scales.view(rows // 128, 32, 4, columns // 4, 4).permute(0, 3, 1, 2, 4)
    return tiles.reshape(-1)


def test_another_rearrangement_stays_in_the_graph() -> None:
    """Near miss: the op's scales are row-major then, and the graph moves them as before."""
    square = torch.ones(128, 128, dtype=BF16)
    block = Block(square, square[0], (square, square), ScaleCalculationMode.RCEIL)
    with mock.patch.object(mx_tensor, "to_blocked", other_order):
        traced = block.trace()
    result = run_pass(traced.graph, MXNormConfig())
    assert [s.status for s in result.sites] == ["fused"]
    assert "'row-major'" in result.graph.after
    assert "aten.permute.default" in result.graph.after


# Training: torchao's casts along both dimensions are ops of its own


def _fake_rows(x: Tensor, inner_block_size: int = 32, scaling_mode: str = "rceil") -> Any:
    scales = x.new_empty((*x.shape[:-1], x.shape[-1] // inner_block_size), dtype=E8M0)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scales


def _fake_columns(x: Tensor, scaling_mode: str) -> Any:
    values = x.new_empty((x.shape[1], x.shape[0]), dtype=torch.float8_e4m3fn).t()
    return values, x.new_empty((x.shape[1], x.shape[0] // 32), dtype=E8M0)


@pytest.fixture
def torchao_ops() -> Iterator[None]:
    """Stand-ins for the ops that torchao registers where it finds such a chip."""
    with torch.library._scoped_library("torchao", "FRAGMENT") as library:
        library.define(
            "triton_to_mxfp8_dim0(Tensor x, int inner_block_size=32, str scaling_mode='rceil') "
            "-> (Tensor, Tensor)"
        )
        library.define("quantize_columns(Tensor x, str scaling_mode) -> (Tensor, Tensor)")
        torch.library.register_fake("torchao::triton_to_mxfp8_dim0", _fake_rows, lib=library)
        torch.library.register_fake("torchao::quantize_columns", _fake_columns, lib=library)
        rows, columns = torch.ops.torchao.triton_to_mxfp8_dim0, torch.ops.torchao.quantize_columns

        def quantize_cuda(x: Tensor, rowwise: bool, colwise: bool, scaling_mode: str) -> Any:
            values, scales = columns(x, scaling_mode)
            return None, values, None, scales

        with (
            mock.patch.object(mx_tensor, "triton_to_mxfp8_dim0", rows),
            mock.patch.object(kernels, "mxfp8_quantize_cuda", quantize_cuda),
        ):
            yield


class TrainingBlock(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(128, dtype=BF16)
        options = {"scale_calculation_mode": ScaleCalculationMode[mode], "dtype": BF16}
        self.first = MXFP8Linear(128, 256, bias=False, **options)
        self.second = MXFP8Linear(128, 128, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.first(y).sum() + self.second(y).sum()


@modes
def test_training(mode: str, torchao_ops: None) -> None:
    model, x = TrainingBlock(mode), torch.randn(2, 128, 128, dtype=BF16, requires_grad=True)
    # On "cpu": autograd's engine asks an accelerator that is not there, and these ops do not.
    with watch_operands(aten._scaled_mm.default) as operands:
        report = mxnorm_pass.explain(model, x, options={"inner": "aot_eager"})
    before, after = operands
    assert len(before) == 6 and before == after
    (site,) = report.fused
    assert site.consumers == ("first", "second") and not report.skipped
    assert site.gain == "fold" and site.format == f"mxfp8 e4m3fn {mode.lower()} block 32"
    (graph,) = report.graphs
    # Both weights' casts include the gain, both weight gradients read one renewed output, and
    # nothing of the exact norm is left.
    assert graph.ops_after["mxnorm_pass.norm_cast.default"] == 1
    assert graph.ops_after["mxnorm_pass.cast.default"] == 2
    columns = "torchao.quantize_columns.default"
    assert graph.ops_before[columns] == graph.ops_after[columns] == 6
    eps = "aten.add.Scalar"
    assert graph.ops_before[eps] == 1 and eps not in graph.ops_after


def test_unknown_cast_op_is_named() -> None:
    """A library's cast of which nobody knows what it computes."""
    with torch.library._scoped_library("somebody", "FRAGMENT") as library:
        library.define("fp8_cast(Tensor x) -> (Tensor, Tensor)")
        torch.library.register_fake("somebody::fp8_cast", _fake_rows, lib=library)

        def block(x: Tensor, gain: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
            values, scale = torch.ops.somebody.fp8_cast(hf_norm(x, gain))
            return torch._scaled_mm(values, weight.t(), scale, scales, out_dtype=BF16)

        with sm100():
            inputs = [torch.empty(shape, dtype=BF16, device="cuda") for shape in ((128, 128), 128)]
            inputs.append(torch.empty(64, 128, dtype=torch.float8_e4m3fn, device="cuda"))
            inputs.append(torch.empty(128, 4, dtype=E8M0, device="cuda"))
            traced = functional_graph(block, *inputs)
    (site,) = run_pass(traced.graph, MXNormConfig()).sites
    assert site.reason is SkipReason.CAST_NOT_RECOGNIZED
    assert site.detail == "somebody::fp8_cast is not known"


def test_scaled_mm_with_lists_of_scales() -> None:
    """``F.scaled_mm`` is another op, ``aten._scaled_mm_v2``."""
    block = Block.make(128, "RCEIL")
    swizzle, recipe = F.SwizzleType.SWIZZLE_32_4_4, F.ScalingType.BlockWise1x32

    def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **_: Any) -> Tensor:
        return F.scaled_mm(
            a, b, scale_a, recipe, scale_b, recipe, swizzle, swizzle, output_dtype=BF16
        )

    with mock.patch.object(torch, "_scaled_mm", scaled_mm):
        traced = block.trace()
    targets = {n.target for n in traced.graph.nodes}
    assert aten._scaled_mm_v2.default in targets and aten._scaled_mm.default not in targets
    result = run_pass(traced.graph, MXNormConfig())
    traced.recompile()
    assert "'blocked'" in result.graph.after
    got = Emulated(traced).run(*block.inputs())
    want = block.reference("mxnorm")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
