"""NVFP4's scales on a GPU, or in the interpreter, against ``numerics``, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from edge_cases import bits_equal, describe_difference
from kernel_rows import DEVICE, F32
from numerics import generator
from torch import Tensor

from mxnorm_pass.kernels.device.nvfp4 import nvfp4_quotient, nvfp4_reciprocal, nvfp4_scale
from mxnorm_pass.numerics.nvfp4 import block_scales, reciprocals

COUNT = 1 << 12


@triton.jit
def scale_kernel(absmax_ptr, tensor_scale_ptr, scales_ptr, reciprocals_ptr, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tensor_scale = None
    if tensor_scale_ptr is not None:
        tensor_scale = tl.load(tensor_scale_ptr)
    scale = nvfp4_scale(tl.load(absmax_ptr + at), tensor_scale)
    tl.store(scales_ptr + at, scale.to(tl.uint8))
    tl.store(reciprocals_ptr + at, nvfp4_reciprocal(scale, tensor_scale))


@triton.jit
def quotient_kernel(absmax_ptr, tensor_scale_ptr, quotients_ptr, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    quotient = nvfp4_quotient(tl.load(absmax_ptr + at), tl.load(tensor_scale_ptr))
    tl.store(quotients_ptr + at, quotient)


def scaled(absmax: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and what blocks are multiplied by, of non-negative float32."""
    there = absmax.view(torch.int32).to(DEVICE)
    scales = torch.empty_like(there, dtype=torch.uint8)
    inverse = torch.empty_like(there, dtype=F32)
    of_tensor = None if tensor_scale is None else tensor_scale.to(DEVICE)
    scale_kernel[(len(absmax) // COUNT,)](there, of_tensor, scales, inverse, COUNT)
    return scales.cpu().view(torch.float8_e4m3fn), inverse.cpu()


def absmaxes(tensor_scale: float) -> Tensor:
    """What becomes every e4m3, the ties between them and their neighbours, and any float32."""
    e4m3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ties = (e4m3[1:] + e4m3[:-1]) / 2
    near = (torch.cat([e4m3, ties]) * 6 * tensor_scale).float()
    near = (near.view(torch.int32)[:, None] + torch.arange(-8, 9, dtype=torch.int32)).clamp(min=0)
    special = torch.tensor([0.0, torch.inf, torch.nan, torch.finfo(F32).max, 2.0**-149])
    count = 4 * COUNT - near.numel() - len(special)
    bits = torch.randint(0, 0x7F800000, (count,), generator=generator(), dtype=torch.int32)
    return torch.cat([special, near.flatten().view(F32), bits.view(F32)])


@pytest.mark.parametrize("tensor_scale", [None, 1.0, 2.0**-120, 0.00037, 1 / 3, 5.1e7])
def test_scales_and_reciprocals(tensor_scale: float | None) -> None:
    absmax = absmaxes(tensor_scale or 1.0)
    of_tensor = None if tensor_scale is None else torch.tensor(tensor_scale, dtype=F32)
    scales, inverse = scaled(absmax, of_tensor)
    want = block_scales(absmax, of_tensor)
    assert bits_equal(scales, want), describe_difference(scales, want)
    want = reciprocals(want, of_tensor)
    assert bits_equal(inverse, want), describe_difference(inverse, want)


def test_divisions_are_rounded_to_nearest() -> None:
    """By tensor scales of any bits; of quotients that are normal numbers."""
    absmax = torch.rand(1 << 17, generator=generator()) * 3000
    for tensor_scale in torch.rand(32, generator=generator()) + 0.5:
        got = torch.empty_like(absmax, device=DEVICE)
        of_tensor = tensor_scale.to(DEVICE)
        quotient_kernel[(len(absmax) // COUNT,)](absmax.to(DEVICE), of_tensor, got, COUNT)
        assert bits_equal(got.cpu(), absmax / 6.0 / tensor_scale)
