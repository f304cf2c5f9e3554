"""A whole Llama in torchao's NVFP4 on Blackwell, traced without a GPU, interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from pairwise import some
from reference import Recipe, build_llama, expected_sites, reference_of, token_ids
from sm100 import Emulated, believed_sm100, sm100, to_fake_cuda
from torch import Tensor, fx, nn
from torchao.prototype.mx_formats import kernels
from torchao.prototype.mx_formats.inference_workflow import NVFP4DynamicActivationNVFP4WeightConfig
from torchao.quantization import quantize_

import mxnorm_pass
from mxnorm_pass import Report, SkipReason, functional
from mxnorm_pass.compilation import inductor_passes
from mxnorm_pass.passes.joint import run_pass

BF16 = torch.bfloat16
# As in test_sm100_nvfp4.py.
Scaled = Literal["dynamic", "static", "none"]


def llama() -> nn.Module:
    # Of CUDA the graph has other kernels for attention than a CPU runs.
    return build_llama(BF16, layers=1, hidden=128, attn_implementation="eager")


def is_converted(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def converted(model: nn.Module, scaled: Scaled, **options: Any) -> nn.Module:
    """By torchao, calibrated on what is no part of the tests where scales of tensors are static."""
    options = {"use_triton_kernel": False, **options}
    options["use_dynamic_per_tensor_scale"] = scaled == "dynamic"
    for step in ("prepare", "convert") if scaled == "static" else (None,):
        config = NVFP4DynamicActivationNVFP4WeightConfig(step=step, **options)
        quantize_(model, config, filter_fn=is_converted)
        if step == "prepare":
            model(token_ids(1, 128).to(model.device), use_cache=False)
    return model


@contextmanager
def kept_graphs() -> Iterator[list[fx.GraphModule]]:
    """The graphs as the pass leaves them."""
    graphs: list[fx.GraphModule] = []

    def keeping(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        result = run_pass(graph, *args, **kwargs)
        copied = fx.Graph()
        copied.output(copied.graph_copy(graph, {}))
        graphs.append(fx.GraphModule(graph.owning_module, copied))
        return result

    with mock.patch.object(inductor_passes, "run_pass", keeping):
        yield graphs


@torch.no_grad()
def traced(ids: Tensor, scaled: Scaled, **options: Any) -> tuple[Report, fx.GraphModule]:
    use_triton_kernel = options.pop("use_triton_kernel", False)
    options, model = {"inner": "aot_eager", **options}, llama()
    with sm100(), kept_graphs() as graphs:
        model = converted(to_fake_cuda(model), scaled, use_triton_kernel=use_triton_kernel)
        report = mxnorm_pass.explain(model, ids.to("cuda"), use_cache=False, options=options)
    (graph,) = graphs
    return report, graph


def run_eagerly(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what Dynamo's graph of the model gets, as AOTAutograd takes it apart."""
    inputs: list[Tensor] = []

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Tensor) -> Any:
            inputs.extend(part for arg in args for part in parts_of(arg))
            return graph(*args)

        return run

    torch._dynamo.reset()
    logits = torch.compile(model, backend=backend)(ids, use_cache=False).logits
    assert torch.equal(logits, model(ids, use_cache=False).logits)
    return logits, inputs


def parts_of(t: Tensor) -> list[Tensor]:
    if not hasattr(t, "__tensor_flatten__"):
        return [t]
    return [getattr(t, name) for name in t.__tensor_flatten__()[0]]


class ScaledLinear(nn.Module):
    """A matmul of blocks, of which only the result gets the scales of the tensors."""

    def __init__(self, weight: Tensor, has_tensor_scale: bool) -> None:
        super().__init__()
        self.weight, self.has_tensor_scale = weight, has_tensor_scale

    def forward(self, x: Tensor) -> Tensor:
        fused = getattr(x, "fused", None)
        values, scales, scale = self.cast(x) if fused is None else fused.quantized
        *weight, weight_scale = self.cast(self.weight)
        y = dequantized(values, scales) @ dequantized(*weight).t()
        return y if scale is None else y * (scale * weight_scale).to(BF16)

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = functional.nvfp4_tensor_scale(x) if self.has_tensor_scale else None
        return (*functional.mx_cast(x, "nvfp4", tensor_scale=scale), scale)


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    return functional.mx_dequantize(values, scales, BF16, format="nvfp4")


def reference(tensor_scale: str, ids: Tensor) -> Tensor:
    recipe = Recipe(
        norm={"block_size": 16},
        cast={"format": "nvfp4"},
        gain="activation",
        tensor_scale=tensor_scale,
    )
    original = llama()
    model = reference_of(original, recipe)
    for name, module in original.named_modules():
        if is_converted(module, name):
            linear = ScaledLinear(module.weight, has_tensor_scale=tensor_scale != "none")
            model.set_submodule(name, linear)
    return model(ids, use_cache=False).logits


def check_sites(report: Report) -> None:
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(1)
    assert {s.format for s in report.fused} == {"nvfp4 e2m1 nearest block 16"}
    (last,) = report.skipped
    assert (last.norm, last.reason) == ("model.norm", SkipReason.NO_MX_CAST)


LENGTHS = {"whole tiles": 64, "padded": 9}


@some(["bound-padded"], 1, tensor_scale=["bound", "amax", "none"], length=LENGTHS)
@torch.no_grad()
def test_logits_are_those_of_functional(tensor_scale: str, length: int) -> None:
    ids, scaled = token_ids(2, length), "none" if tensor_scale == "none" else "dynamic"
    options = {} if tensor_scale == "none" else {"tensor_scale": tensor_scale}
    report, graph = traced(ids, scaled, **options)
    check_sites(report)
    with believed_sm100():
        _, inputs = run_eagerly(converted(llama(), scaled), ids)
    (got,) = Emulated(graph).run(*inputs)
    assert torch.equal(got, reference(tensor_scale, ids))


@some(["static-whole tiles"], 1, scaled=["dynamic", "static", "none"], length=LENGTHS)
@torch.no_grad()
def test_exact_changes_no_bit(scaled: Scaled, length: int) -> None:
    ids = token_ids(2, length)
    report, graph = traced(ids, scaled, estimator="exact")
    check_sites(report)
    with believed_sm100():
        want, inputs = run_eagerly(converted(llama(), scaled), ids)
    (got,) = Emulated(graph).run(*inputs)
    assert torch.equal(got, want)


@some(["none"], scaled=["dynamic", "static", "none"])
def test_a_kernel_of_mslk_is_named(scaled: Scaled) -> None:
    """Of what torchao calls where it is installed the bits are not those of torchao's own cast."""
    # Of Triton its fake needs no more.
    cdiv = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    with mock.patch.object(kernels, "triton", cdiv, create=True):
        report, _ = traced(token_ids(2, 64), scaled, use_triton_kernel=True)
    *layers, last = report.sites
    assert [site.norm for site in layers] == [norm for norm, _ in expected_sites(1)]
    assert {site.reason for site in layers} == {SkipReason.CAST_NOT_RECOGNIZED}, str(report)
    assert {site.detail for site in layers} == {"ao::mslk_quantize_nvfp4 is not known"}
    assert (last.norm, last.reason) == ("model.norm", SkipReason.NO_MX_CAST)
    assert report.graphs[0].before == report.graphs[0].after
