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

from mxnorm_pass.kernels.norm_cast import norm_cast
from mxnorm_pass.kernels.norm_cast_both import norm_cast_both
from mxnorm_pass.kernels.rows import RowTiling

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
}  # fmt: skip


@pytest.mark.full
@each_value(capability=CAPABILITIES, variant=VARIANTS)
def test_variants_compile(variant: dict[str, Any], capability: int) -> None:
    ptx = compiled_norm_cast(capability, **({"width": 2048} | variant)).ptx
    assert f".target sm_{capability}" in ptx
    # The float8 conversion is the hardware's.
    elem = "e5m2x2" if variant.get("elem_dtype") == E5M2 else "e4m3x2"
    assert f"cvt.rn.satfinite.{elem}.f32" in ptx


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
)
def test_both_directions(default: tuple[int, int], reads: tuple[bool, bool]) -> None:
    """The cast along T transposes 16-bit numbers, by what matrix multiplications have for it."""
    (capability, width), (with_gain, add) = default, reads
    x = torch.empty(4096, width, dtype=BF16, device="meta")
    gain = x[0] if with_gain else None
    kernel = compiled(
        lambda: norm_cast_both(x, gain, None, SPEC, True, residual=x if add else None),
        capability,
    )
    assert kernel.spilled_bytes == 0, kernel.log
    assert re.search(r"ldmatrix\S*\.trans\S*\.b16", kernel.ptx)
    assert "max.NaN.bf16x2" in kernel.ptx
    # All but rho, which is awaited.
    assert set(kernel.load_bits) == {128}


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
