"""The row kernel next to ``functional``, for its tests. Results are compared on the CPU."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from edge_cases import bits_equal, describe_difference
from formats import spec_with
from given_rho import given_rho
from numerics import SPEC
from torch import Tensor

from mxnorm_pass import functional
from mxnorm_pass.kernels.norm_cast import norm_cast
from mxnorm_pass.numerics.norm_cast import NormCastSpec

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EPS = SPEC.eps


def spec(**options: Any) -> NormCastSpec:
    return spec_with(SPEC, **options)


class Quantized(NamedTuple):
    values: Tensor
    scales: Tensor
    rho: Tensor


def on_device(tensor: Tensor | None) -> Tensor | None:
    """On the kernel's device, strides kept."""
    if tensor is None or DEVICE == "cpu":
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    there = tensor.as_strided((size,), (1,), 0).to(DEVICE)
    return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def launched(
    x: Tensor,
    weight: Tensor | None,
    options: NormCastSpec,
    *,
    block_weights: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    residual: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, ...]:
    """The kernel's results on the CPU."""
    x_there, *others = (on_device(t) for t in (x, weight, block_weights))
    assert x_there is not None
    more |= {"tensor_scale": on_device(tensor_scale), "residual": on_device(residual)}
    results = norm_cast(x_there, others[0], others[1], options, **more)
    assert all(t.is_contiguous() for t in results)
    return tuple(t.cpu() for t in results)


def kernel(x: Tensor, weight: Tensor | None, options: NormCastSpec, **more: Any) -> Quantized:
    return Quantized(*launched(x, weight, options, **more))


def reference(
    x: Tensor,
    weight: Tensor | None,
    options: NormCastSpec,
    block_weights: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    rho: Tensor | None = None,
) -> Quantized:
    """``functional.mxnorm_cast``, with its own inverse RMS or with ``rho``."""
    keywords = options.keywords()
    keywords |= {"block_weights": block_weights, "tensor_scale": tensor_scale}
    if rho is None:
        return Quantized(*functional.mxnorm_cast(x, weight, **keywords))
    with given_rho(rho):
        return Quantized(*functional.mxnorm_cast(x, weight, **keywords))


def assert_same_bits(actual: Tensor, expected: Tensor, name: str) -> None:
    assert bits_equal(actual, expected), f"{name}: {describe_difference(actual, expected)}"


def assert_cast_equals(
    x: Tensor, weight: Tensor | None, options: NormCastSpec, **more: Any
) -> Quantized:
    """The kernel's values and scales are, bit for bit, those that belong to its own rho."""
    actual = kernel(x, weight, options, **more)
    given = [more.get(name) for name in ("block_weights", "tensor_scale")]
    expected = reference(x, weight, options, *given, rho=actual.rho)
    assert_same_bits(actual.values, expected.values, "values")
    assert_same_bits(actual.scales, expected.scales, "scales")
    return actual
