"""Casts by ops of which nobody knows what they compute: each is named, none is silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from golden.sm100 import triton_target
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Site, SkipReason

BYTE, E4M3, E8M0 = torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu
FP4 = torch.float4_e2m1fn_x2
WIDTH = 128


@contextmanager
def somebodys_op(schema: str, fake: Callable[..., Any]) -> Iterator[None]:
    with torch.library._scoped_library("somebody", "FRAGMENT") as library:
        name = library.define(schema)
        torch.library.register_fake(f"somebody::{name}", fake, lib=library)
        yield


def fake_cast(values: torch.dtype, scales: torch.dtype, block: int = 16) -> Callable[..., Any]:
    def fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        per_byte = 1 if values is E4M3 else 2
        sizes = (x.shape[-1] // per_byte, x.shape[-1] // block)
        elements, of_blocks = (x.new_empty((*x.shape[:-1], size), dtype=BYTE) for size in sizes)
        return elements.view(values), of_blocks.view(scales)

    return fake


def site_of(function: Callable[[Tensor], Any]) -> Site:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(WIDTH, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Any:
            return function(self.norm(x))

    x = torch.randn(128, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        (site,) = mxnorm_pass.explain(Model(), x, options={"inner": "aot_eager"}).sites
    return site


DTYPES = {
    "mxfp8": (E4M3, E8M0),
    "mxfp8, scales as bytes": (E4M3, BYTE),
    "mxfp4": (FP4, E8M0),
    "mxfp4 as bytes": (BYTE, E8M0),
    "nvfp4": (FP4, E4M3),
    "nvfp4, elements as bytes": (BYTE, E4M3),
    "nvfp4 as bytes": (BYTE, BYTE),
    "mxfp4, signed bytes as scales": (BYTE, torch.int8),
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=list(DTYPES))
def test_elements_and_scales_of_any_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    with somebodys_op("cast(Tensor x) -> (Tensor, Tensor)", fake_cast(*dtypes)):
        check(site_of(torch.ops.somebody.cast), "somebody::cast")


def check(site: Site, name: str) -> None:
    assert site.reason is SkipReason.CAST_NOT_RECOGNIZED, str(site)
    assert site.detail == f"{name} is not known"


def test_an_op_that_writes_into_its_arguments() -> None:
    def cast(x: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = fake_cast(BYTE, E4M3)(x)
        torch.ops.somebody.cast_into(values, x, scales)
        return values, scales

    with somebodys_op(
        "cast_into(Tensor(a!) to, Tensor x, Tensor(b!) scales) -> ()", lambda *_: None
    ):
        check(site_of(cast), "somebody::cast_into")


def test_what_is_cast_need_not_be_the_first_argument() -> None:
    # As of torchao's for experts.
    sizes = torch.tensor([64, 64])
    schema = "cast(Tensor sizes, *, Tensor x) -> (Tensor, Tensor)"
    with somebodys_op(schema, lambda sizes, x: fake_cast(BYTE, E4M3)(x)):
        check(site_of(lambda x: torch.ops.somebody.cast(sizes, x=x)), "somebody::cast")


NO_CASTS = {
    # As a matmul that casts within itself, and what casts rows to int8.
    "one result": ("op(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape, dtype=E4M3)),
    "int8": (
        "op(Tensor x) -> (Tensor, Tensor)",
        lambda x: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1])),
    ),
}


@pytest.mark.parametrize(("schema", "fake"), NO_CASTS.values(), ids=list(NO_CASTS))
def test_another_op_is_no_cast(schema: str, fake: Callable[..., Any]) -> None:
    with somebodys_op(schema, fake):
        site = site_of(torch.ops.somebody.op)
    assert site.reason is SkipReason.NO_MX_CAST and "somebody.op" in site.detail


def test_a_kernel_is_named() -> None:
    """Triton's, as torch.compile finds it in a model's own code."""
    triton = pytest.importorskip("triton")

    @triton.jit
    def quantize_rows(x, values, scales):
        triton.language.store(values, triton.language.load(x))
        triton.language.store(scales, triton.language.load(x))

    def cast(x: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = x.new_empty(x.shape, dtype=BYTE), x.new_empty(x.shape, dtype=BYTE)
        quantize_rows[(1,)](x, values, scales)
        return values, scales

    with mock.patch("torch.utils._triton.has_triton", lambda *_: True), triton_target():
        check(site_of(cast), "quantize_rows")


@pytest.mark.parametrize("kept", [0, 1], ids=["values", "scales"])
def test_one_result_of_a_cast_may_be_dropped(kept: int) -> None:
    def half(x: Tensor) -> Tensor:
        return torch.ops.mxnorm_pass.cast(x, "mxfp8")[kept].float()

    site = site_of(half)
    assert site.reason is SkipReason.CAST_NOT_RECOGNIZED, str(site)
    assert site.detail == "of cast only values or only scales are read"
    with somebodys_op("cast(Tensor x) -> (Tensor, Tensor)", fake_cast(E4M3, E8M0)):
        check(site_of(lambda x: torch.ops.somebody.cast(x)[kept].float()), "somebody::cast")
