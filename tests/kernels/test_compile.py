"""The kernels compile for Hopper and both Blackwells without such a GPU, to efficient code."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from formats import spec_with
from numerics import E5M2, SPEC
from pairwise import each_value
from ptx import Compiled, compiled, recorded_launches

from mxnorm_pass.functional import Hadamard, OperandCast, block_format
from mxnorm_pass.kernels.norm_cast import norm_cast
from mxnorm_pass.kernels.norm_cast_both import norm_cast_both
from mxnorm_pass.kernels.operand_casts import operand_casts
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.kernels.rows import RowTiling
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.philox import Use

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HOPPER, BLACKWELL, CONSUMER_BLACKWELL = 90, 100, 120
CAPABILITIES = (HOPPER, BLACKWELL, CONSUMER_BLACKWELL)


def compiled_norm_cast(
    capability: int,
    width: int,
    *,
    dtype: torch.dtype = BF16,
    gain: torch.dtype | None = BF16,
    residual: torch.dtype | None = None,
    weighted: bool = False,
    tensor_scale: bool = False,
    dequantize: torch.dtype | None = None,
    **options: Any,
) -> Compiled:
    def empty(*shape: int, dtype: torch.dtype | None) -> Any:
        return None if dtype is None else torch.empty(shape, dtype=dtype, device="meta")

    spec = spec_with(SPEC, **options)
    block_weights = empty(width // spec.format.block_size, dtype=F32) if weighted else None
    return compiled(
        lambda: norm_cast(
            empty(4096, width, dtype=dtype),
            empty(width, dtype=gain),
            block_weights,
            spec,
            tensor_scale=empty(dtype=F32) if tensor_scale else None,
            residual=empty(4096, width, dtype=residual),
            dequantize=dequantize,
        ),
        capability,
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "p=1, no gain": {"p": 1.0, "gain": None},
    "p=1.5, block weights": {"p": 1.5, "weighted": True},
    "p=3, chunks": {"p": 3.0, "width": 32768},
    "block weights, floor, e5m2": {
        "weighted": True, "scale_mode": "floor", "elem_dtype": E5M2, "dtype": F16,
    },
    "exact, even, blocked": {
        "estimator": "exact", "scale_mode": "even", "scale_layout": "blocked", "width": 160,
    },
    "exact, ceil, float32": {
        "estimator": "exact", "scale_mode": "ceil", "dtype": F32, "gain": F32, "norm_dtype": None,
        "out_dtype": F32,
    },
    "residual, mixed dtypes": {"residual": F32, "gain": F16, "block_size": 16},
    "residual, dequantised, chunks": {"residual": BF16, "dequantize": BF16, "width": 65536},
    "one block": {"width": 32, "elem_dtype": E5M2, "scale_layout": "blocked"},
    "e2m3, chunks": {"format": "mxfp6", "width": 32768},
    "e3m2, even, float32": {"format": "mxfp6 e3m2 even block 32", "dtype": F32, "gain": None},
    "e2m1, floor, blocked": {"format": "mxfp4 e2m1 floor block 64", "scale_layout": "blocked"},
    "e2m1, residual": {"format": "mxfp4", "residual": F32, "estimator": "exact"},
    "nvfp4, one block": {"format": "nvfp4", "width": 16},
    "nvfp4, blocked": {"format": "nvfp4", "tensor_scale": True, "scale_layout": "blocked"},
    "nvfp4, dequantised": {"format": "nvfp4", "tensor_scale": True, "dequantize": BF16},
}  # fmt: skip


def conversion(capability: int, variant: dict[str, Any]) -> str:
    """The hardware's to the elements, "" where there is none."""
    words = ("format", "elem_dtype")
    element = spec_with(SPEC, **{w: variant[w] for w in words if w in variant}).format.element
    if element.bits < 8 and (capability < BLACKWELL or "dequantize" in variant):
        return ""
    return f"cvt.rn.satfinite.{element.name.removesuffix('fn')}x2.f32"


@pytest.mark.full
@each_value(capability=CAPABILITIES, variant=VARIANTS)
def test_variants_compile(variant: dict[str, Any], capability: int) -> None:
    ptx = compiled_norm_cast(capability, **({"width": 2048} | variant)).ptx
    assert f".target sm_{capability}" in ptx
    assert conversion(capability, variant) in ptx
    if capability < BLACKWELL:
        assert not re.search(r"cvt\S*\.e[23]m[123]x2", ptx)


DEFAULTS = [
    *((HOPPER, width) for width in (2048, 4096, 5120, 8192, 16384)),
    *((BLACKWELL, width) for width in (4096, 16384)),
    *((CONSUMER_BLACKWELL, width) for width in (4096, 16384)),
]


@pytest.mark.full
@each_value(
    default=DEFAULTS,
    options={
        "estimate": {},
        "exact": {"estimator": "exact"},
        "residual": {"residual": BF16},
        "no_gain": {"gain": None},
    },
)
def test_default_configurations(default: tuple[int, int], options: dict[str, Any]) -> None:
    """Rows and gain come in loads of 128 bits, and all of a row stays in registers."""
    kernel = compiled_norm_cast(*default, **options)
    assert set(kernel.load_bits) == {128}
    assert kernel.spilled_bytes == 0, kernel.log


FEW_BITS: dict[str, dict[str, Any]] = {
    "mxfp6": {"format": "mxfp6"},
    "mxfp4": {"format": "mxfp4"},
    "nvfp4": {"format": "nvfp4", "tensor_scale": True},
}


@pytest.mark.full
@each_value(
    default=[(HOPPER, 4096), (HOPPER, 16384), (BLACKWELL, 16384), (CONSUMER_BLACKWELL, 4096)],
    few_bits=FEW_BITS,
    options={"estimate": {}, "residual": {"residual": BF16}},
)
def test_few_bits_by_default(
    default: tuple[int, int], few_bits: dict[str, Any], options: dict[str, Any]
) -> None:
    """As of float8, and nothing more is exchanged between threads."""
    kernel = compiled_norm_cast(*default, **few_bits, **options)
    # But for the scale of the tensor.
    assert set(kernel.load_bits) - {32} == {128}
    assert kernel.load_bits.count(32) == len(few_bits) - 1
    assert kernel.spilled_bytes == 0, kernel.log
    float8 = compiled_norm_cast(*default, **options)
    assert kernel.ptx.count("bar.sync") <= float8.ptx.count("bar.sync")
    assert kernel.ptx.count("shfl.sync") <= float8.ptx.count("shfl.sync")


@pytest.mark.full
def test_what_the_checks_would_see() -> None:
    """A row that is too large for its registers spills, and strided columns load one by one."""
    config = RowTiling(rows=2, chunks=1, warps=4)
    x = torch.empty(64, 16384, dtype=BF16, device="meta")
    spilling = compiled(lambda: norm_cast(x, None, None, SPEC, config=config), HOPPER)
    assert spilling.spilled_bytes > 0
    odd_rows = torch.empty(64, 2049, dtype=BF16, device="meta")[:, :2048]
    narrow = compiled(lambda: norm_cast(odd_rows, None, None, SPEC), HOPPER)
    assert set(narrow.load_bits) != {128}


@pytest.mark.full
@each_value(
    default=[(HOPPER, 4096), (HOPPER, 8192), (BLACKWELL, 4096)],
    reads={"gain": (True, False), "x alone": (False, False), "gain and residual": (True, True)},
    format=["mxfp8", "mxfp6 e3m2", "mxfp4", "nvfp4"],
)
def test_both_directions(default: tuple[int, int], reads: tuple[bool, bool], format: str) -> None:
    """The cast along T transposes 16-bit numbers, by what matrix multiplications have for it."""
    (capability, width), (with_gain, add) = default, reads
    x = torch.empty(4096, width, dtype=BF16, device="meta")
    gain, spec = x[0] if with_gain else None, spec_with(SPEC, format=format)
    kernel = compiled(
        lambda: norm_cast_both(x, gain, None, spec, True, residual=x if add else None),
        capability,
    )
    assert kernel.spilled_bytes == 0, kernel.log
    assert re.search(r"ldmatrix\S*\.trans\S*\.b16", kernel.ptx)
    assert "max.NaN.bf16x2" in kernel.ptx
    # All but rho, which is awaited.
    assert set(kernel.load_bits) == {128}


def read_at_random(format: str) -> OperandRead:
    """Wgrad's input, transformed and rounded at random; its values and scales are stored."""
    cast = OperandCast(block_format(format), "stochastic")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    return OperandRead(Operand(cast, Hadamard(64), "wgrad", Use.RIGHT), seed, 2**40, 2**33)


@each_value(1, format=["mxfp8", "mxfp6"], capability=[HOPPER, BLACKWELL])
def test_values_that_are_rounded_at_random_are_stored(format: str, capability: int) -> None:
    x, read = torch.empty(256, 256, dtype=BF16, device="meta"), read_at_random(format)
    for call in (
        lambda: operand_casts(x, read, read),
        lambda: norm_cast_both(x, x[0], None, SPEC, True, along_t=read),
    ):
        assert f".target sm_{capability}" in compiled(call, capability).ptx


@pytest.mark.full
@pytest.mark.parametrize("width", [4096, 8192, 16384])
def test_wide_rows_are_asked_for_in_advance(width: int) -> None:
    x = torch.empty(4096, width, dtype=BF16, device="meta")
    call = partial(norm_cast_both, x, x[0], None, SPEC, True)
    requests = [
        compiled(made, HOPPER).ptx.count("prefetch.global.L2")
        for made in (call, partial(call, residual=x))
    ]
    # 128 threads ask for 128 bytes each.
    lines_each = width * 2 // 128 // 128
    assert requests == ([0, 0] if width < 8192 else [lines_each, 2 * lines_each])
    assert compiled(call, HOPPER).spilled_bytes == 0


@pytest.mark.parametrize("width", [2048, 4096, 8192])
def test_the_lag_counts_all_that_is_read(width: int) -> None:
    """As many bytes of x and the residual wait in the L2 cache, whatever they are."""

    def waiting(dtype: torch.dtype, add: bool) -> int:
        x = torch.empty(4096, width, dtype=dtype, device="meta")
        with recorded_launches() as launches:
            norm_cast_both(x, None, None, SPEC, True, residual=x if add else None)
        arguments = launches[0].arguments
        return int(arguments["LAG"] * arguments["R"] * width * dtype.itemsize * (1 + add))

    cases = [(BF16, False), (BF16, True), (torch.float32, False), (torch.float32, True)]
    assert {waiting(*case) for case in cases} == {2**23}
