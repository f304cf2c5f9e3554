"""Llamas whose inserted casts have other formats than MXFP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pairwise import some
from reference import Recipe, build_llama, reference_of
from torch import nn
from training import IDS, assert_gradients_equal, relative_error, train

import mxnorm_pass
from mxnorm_pass.functional import block_format

FORMATS = ["mxfp6", "mxfp6 e3m2", "mxfp4", "nvfp4"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


@some(["mxfp4-bf16"], format=FORMATS, dtype=DTYPES)
def test_logits_and_gradients_are_those_of_functional(format: str, dtype: torch.dtype) -> None:
    model = build_llama(dtype, layers=1)
    norm = {"block_size": block_format(format).block_size}
    reference = reference_of(model, Recipe(norm=norm, cast={"format": format}))
    want, want_gradients = train(reference, reference)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, format=format), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)
    assert [site.format for site in report.fused] == 2 * [block_format(format).name]
    with torch.no_grad():
        got = compiled(model, format=format)(IDS, use_cache=False).logits
        assert torch.equal(got, reference(IDS, use_cache=False).logits)


@some([], format=FORMATS, estimator=["mxnorm", "exact"])
def test_gradients_are_verified(format: str, estimator: str) -> None:
    model = build_llama(torch.float32, layers=1)
    with mxnorm_pass.record() as report:
        train(compiled(model, format=format, estimator=estimator, verify=True), model)
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


@torch.no_grad()
def test_a_layer_of_another_format() -> None:
    model = build_llama(torch.bfloat16)
    options = {"format": "mxfp4", "modules": {"model.layers.1.*": {"format": "mxfp6"}}}
    sites = mxnorm_pass.explain(model, IDS, options=options, use_cache=False).fused
    names = [block_format(name).name for name in ("mxfp4", "mxfp4", "mxfp6", "mxfp6")]
    assert [site.format for site in sites] == names
