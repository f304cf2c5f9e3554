"""Llamas whose inserted casts have other formats than MXFP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import some
from reference import Recipe, build_llama, expected_sites, quantize_with_torchao, reference_of
from torch import nn
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from training import IDS, assert_gradients_equal, relative_error, train

import mxnorm_pass
from mxnorm_pass.functional import block_format

FORMATS = ["mxfp8", "mxfp8 e5m2", "mxfp6", "mxfp6 e3m2", "mxfp4", "nvfp4"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def options_of(format: str) -> dict[str, Any]:
    return {"elem_dtype": torch.float8_e5m2} if format == "mxfp8 e5m2" else {"format": format}


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


@some(["mxfp4-bf16-mxnorm"], format=FORMATS, dtype=DTYPES, estimator=["mxnorm", "exact"])
def test_logits_and_gradients_are_those_of_functional(
    format: str, dtype: torch.dtype, estimator: str
) -> None:
    model = build_llama(dtype, layers=1)
    norm = {"block_size": block_format(format).block_size, "estimator": estimator}
    gain = "fold" if estimator == "mxnorm" else "activation"
    reference = reference_of(model, Recipe(norm=norm, cast={"format": format}, gain=gain))
    want, want_gradients = train(reference, reference)
    options = {**options_of(format), "estimator": estimator}
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, **options), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)
    assert [site.format for site in report.fused] == 2 * [block_format(format).name]
    with torch.no_grad():
        got = compiled(model, **options)(IDS, use_cache=False).logits
        assert torch.equal(got, reference(IDS, use_cache=False).logits)


@some([], 1, format=FORMATS, estimator=["mxnorm", "exact"])
def test_gradients_are_verified(format: str, estimator: str) -> None:
    model = build_llama(torch.float32, layers=1)
    options = {**options_of(format), "estimator": estimator}
    with mxnorm_pass.record() as report:
        train(compiled(model, **options, verify=True), model)
    assert len(report.fused) == 2


@some([], format=["mxfp4", "nvfp4"])
@torch.no_grad()
def test_inductor_error_is_that_of_aot_eager(format: str) -> None:
    """Against float64, the casts included, at most 1.5 times that of the aot_eager result."""
    model = build_llama(torch.bfloat16, layers=1)
    norm = {"block_size": block_format(format).block_size}
    recipe = Recipe(norm=norm, cast={"format": format}, every_linear=True)
    reference = reference_of(model, recipe)
    want = reference(IDS, use_cache=False).logits
    got = compiled(model, format=format, quantize="all")(IDS, use_cache=False).logits
    assert torch.equal(got, want)
    truth = reference.double()(IDS, use_cache=False).logits
    fast = compiled(model, format=format, quantize="all", inner="inductor")
    error = relative_error(fast(IDS, use_cache=False).logits, truth)
    assert error <= 1.5 * relative_error(want, truth)


@some(
    ["mxnorm-bound-fold", "exact-bound-activation", "mxnorm-amax-activation", "exact-amax-fold"],
    estimator=["mxnorm", "exact"],
    tensor_scale=["bound", "amax"],
    gain=["fold", "activation"],
)
def test_tensor_scales_are_those_of_functional(
    estimator: str, tensor_scale: str, gain: str
) -> None:
    """The exact estimator never folds, nor asks for a pass over what it has not normalised."""
    model = build_llama(torch.bfloat16, layers=1)
    recipe = Recipe(
        norm={"estimator": estimator, "block_size": 16},
        cast={"format": "nvfp4"},
        tensor_scale=tensor_scale,
        gain=gain if estimator == "mxnorm" else "activation",
    )
    reference = reference_of(model, recipe)
    want, want_gradients = train(reference, reference)
    options = {"estimator": estimator, "tensor_scale": tensor_scale, "gain": gain}
    got, gradients = train(compiled(model, format="nvfp4", **options), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@pytest.mark.parametrize("p", [0.5, 0.05, 0.007])
@torch.no_grad()
def test_a_bound_that_is_too_large_is_not_used(p: float) -> None:
    """It would leave blocks no scale, or is no number in float32, or none in float64."""
    model = nn.Sequential(nn.RMSNorm(4096, eps=1e-6), nn.Linear(4096, 32, bias=False))
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    options = {"format": "nvfp4", "p": p}
    want = compiled(model, tensor_scale="amax", **options)(x)
    assert torch.equal(compiled(model, **options)(x), want)


@pytest.mark.full
def test_a_calibration_for_blocks_of_16() -> None:
    model = build_llama(layers=1)
    batches = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS.flip(0), "labels": IDS.flip(0)}]
    calibration = mxnorm_pass.calibrate(model, batches, {"format": "nvfp4"}, max_loss_increase=1)
    assert calibration.block_size == 16 and len(calibration.weights) == 2
    if calibration.order is not None:
        mxnorm_pass.permute_channels(model, calibration.order)
    options = {"format": "nvfp4", "calibration": calibration}
    comparison = mxnorm_pass.compare(model, batches[0], options)
    assert all(site.input_error < 0.3 for site in comparison.sites)


@some([], quantize=["norm-fed", "all"], tensor_scale=["bound", "amax"])
@torch.no_grad()
def test_no_rows(quantize: str, tensor_scale: str) -> None:
    """As of an expert that no token reaches."""
    model = nn.Sequential(nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 32), nn.Linear(32, 32))
    run = compiled(model, format="nvfp4", quantize=quantize, tensor_scale=tensor_scale)
    assert run(torch.randn(0, 64)).shape == (0, 32)


@torch.no_grad()
def test_dynamic_shapes_of_torchaos_fp4() -> None:
    model = build_llama(torch.bfloat16, layers=1)
    quantize_with_torchao(model, "rceil", torch.float4_e2m1fn_x2)
    ids = IDS.clone()
    torch._dynamo.mark_dynamic(ids, (0, 1))
    with mxnorm_pass.record() as report:
        got = compiled(model, estimator="exact")(ids, use_cache=False).logits
    assert torch.equal(got, model(IDS, use_cache=False).logits)
    assert len(report.fused) == 2


@some([], 1, format=FORMATS, training={"inference": False, "training": True})
def test_two_norms_per_layer_are_fused(format: str, training: bool) -> None:
    labels = {"labels": IDS} if training else {}
    model, options = build_llama(torch.bfloat16, layers=1), options_of(format)
    with torch.set_grad_enabled(training):
        report = mxnorm_pass.explain(model, IDS, options=options, use_cache=False, **labels)
    assert [(site.norm, site.consumers) for site in report.fused] == expected_sites(1)
    assert [site.norm for site in report.skipped] == ["model.norm"]


TORCHAO = {
    "mxfp4 e2m1": torch.float4_e2m1fn_x2,
    "mxfp6 e2m3": DTYPE_FP6_E2M3,
    "mxfp6 e3m2": DTYPE_FP6_E3M2,
}


@some(
    ["mxfp4 e2m1-rceil-exact", "mxfp6 e3m2-even-mxnorm"],
    format=list(TORCHAO),
    mode=["rceil", "floor", "ceil", "even"],
    estimator=["mxnorm", "exact"],
)
@torch.no_grad()
def test_torchao_inference(format: str, mode: str, estimator: str) -> None:
    check_torchao_inference(format, TORCHAO[format], mode, estimator)


@some([], estimator=["mxnorm", "exact"])
@torch.no_grad()
def test_torchao_inference_in_e5m2(estimator: str) -> None:
    """Compiled, the other modes' casts keep infinite elements, which eager mode's do not."""
    check_torchao_inference("mxfp8 e5m2", torch.float8_e5m2, "rceil", estimator)


def check_torchao_inference(format: str, elements: Any, mode: str, estimator: str) -> None:
    model = build_llama(torch.bfloat16, layers=1)
    name = f"{format} {mode} block 32"
    recipe = Recipe(cast={"format": name}, gain="activation", every_linear=True)
    reference = reference_of(model, recipe)
    quantize_with_torchao(model, mode, elements)
    run = model if estimator == "exact" else reference
    want = run(IDS, use_cache=False).logits
    with mxnorm_pass.record() as report:
        got = compiled(model, estimator=estimator)(IDS, use_cache=False).logits
    assert torch.equal(got, want)
    assert [site.format for site in report.fused] == 2 * [name]


@torch.no_grad()
def test_a_layer_of_another_format() -> None:
    model = build_llama(torch.bfloat16)
    options = {"format": "mxfp4", "modules": {"model.layers.1.*": {"format": "mxfp6"}}}
    sites = mxnorm_pass.explain(model, IDS, options=options, use_cache=False).fused
    names = [block_format(name).name for name in ("mxfp4", "mxfp4", "mxfp6", "mxfp6")]
    assert [site.format for site in sites] == names
