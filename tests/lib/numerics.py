"""Inputs, float64 formulas and error bounds for the tests of ``mxnorm_pass.functional``.

``U`` is float32's unit roundoff: one operation rounded to nearest has a relative error of at
most ``U``. Tolerances count such operations.
"""

from __future__ import annotations

import math

import pytest
import torch
from edge_cases import BLOCK_SIZE, EDGE_CASES, WIDTH, bits_equal, describe_difference
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mxnorm_pass.functional import rms_constant
from mxnorm_pass.numerics.formats import CAST_MODES, BlockFormat
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.numerics.norm_cast import NormCastSpec

U = 2.0**-24
U64 = 2.0**-53
EPS = 1e-6
BLOCKS = WIDTH // BLOCK_SIZE
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# HuggingFace's norm in bfloat16, cast as in most tests.
SPEC = NormCastSpec(
    eps=EPS,
    estimator="mxnorm",
    p=2.0,
    format=BlockFormat.of(E4M3, "rceil", BLOCK_SIZE),
    norm_dtype=torch.bfloat16,
    out_dtype=torch.bfloat16,
    scale_layout="row-major",
)

GRADIENTS: tuple[Gradient, ...] = ("true", "orthogonal", "paper")

all_gradients = pytest.mark.parametrize("gradient", GRADIENTS)
all_inputs = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
all_modes = pytest.mark.parametrize("mode", CAST_MODES)
all_elements = pytest.mark.parametrize("elem_dtype", [E4M3, E5M2], ids=["e4m3fn", "e5m2"])
all_edges = pytest.mark.parametrize("case", EDGE_CASES, ids=str)
with_and_without_weight = pytest.mark.parametrize("weighted", [False, True])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def gain(
    width: int = WIDTH, dtype: torch.dtype = torch.float32, low: float = 0.5, high: float = 1.5
) -> Tensor:
    uniform = torch.rand(width, generator=generator(99), dtype=torch.float64)
    return (low + (high - low) * uniform).to(dtype)


def separated(rows: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    """float64 rows whose block maxima lead by at least 0.5: no ties within any small step."""
    x = 2 * torch.rand(rows, width, generator=generator(seed), dtype=torch.float64) - 1
    blocks = x.reshape(rows, -1, BLOCK_SIZE)
    count = blocks.shape[1]
    where = torch.randint(0, BLOCK_SIZE, (rows, count, 1), generator=generator(seed + 1))
    signs = 1.0 - 2.0 * (torch.arange(count) % 2)
    peaks = signs[:, None] * (1.5 + torch.rand(rows, count, 1, generator=generator(seed + 2)))
    return blocks.scatter(-1, where, peaks.double()).reshape(rows, width)


def rms_estimate64(x: Tensor, p: float) -> Tensor:
    """G_p / c(p, B) in float64, the largest block taken out so that nothing over- or underflows."""
    absmax = x.double().reshape(*x.shape[:-1], -1, BLOCK_SIZE).abs().amax(-1)
    largest = absmax.amax(-1, keepdim=True)
    mean = (absmax / largest).pow(p).mean(-1, keepdim=True)
    return largest * mean.pow(1 / p) / rms_constant(p, BLOCK_SIZE)


def inverse_rms64(x: Tensor, p: float, eps: float) -> Tensor:
    return 1 / torch.sqrt(rms_estimate64(x, p).square() + eps)


def estimate_error(p: float, blocks: int = BLOCKS) -> float:
    """Bound on the relative error of the float32 estimate, and of its inverse square root.

    The mean of powers: dividing by the largest block and a pow good to one ulp make each term
    good to (p + 2) U, a sum of positive terms and its division add ``blocks`` U. The p-th root
    divides that by p, pow adds 2 U, and 1/p rounded to float32 adds U |ln mean| / p, where
    1/blocks <= mean <= 1. Six more operations: times largest, over c, square, + eps (halved by
    the root, as is the square), and a sqrt and division for rsqrt. Squares in place of pow
    (p = 2) and no pow (p = 1) take fewer.
    """
    return ((p + 2 + blocks + math.log(blocks)) / p + 2 + 6) * U


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """Largest distance between float32 tensors, counted in representable numbers."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32).to(torch.int64)
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((ordered(a) - ordered(b)).abs().max())


def assert_bits_equal(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None and expected is not None
    assert bits_equal(actual, expected), describe_difference(actual, expected)


def gradients(
    y: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    leaves = [x] if weight is None else [x, weight]
    grads = torch.autograd.grad(y, leaves, grad)
    return grads[0], grads[1] if weight is not None else None


def llama_norm(weight: Tensor, eps: float = EPS) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(len(weight), eps=eps).to(weight.dtype)
    norm.weight.data = weight.clone()
    return norm
