"""The ops of linears on MX operands: results, what they refuse, fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_bits_equal, normal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mxnorm_pass import functional, ops
from mxnorm_pass.numerics.cast import Quantized, quantize_alone
from mxnorm_pass.numerics.formats import block_format

BF16, F32 = torch.bfloat16, torch.float32
FORMATS = ["mxfp8", "mxfp8 e5m2", "mxfp6", "mxfp4", "nvfp4"]


def quantized(*shape: int, name: str = "mxfp8", seed: int = 0) -> Quantized:
    return quantize_alone(normal(*shape, dtype=BF16, seed=seed), block_format(name))


def call(
    x: Quantized,
    weight: Quantized,
    bias: Tensor | None = None,
    dtype: torch.dtype = BF16,
) -> Tensor:
    scales = (x.tensor_scale, weight.tensor_scale)
    names = (x.format.name, weight.format.name)
    operands = (x.values, x.scales, weight.values, weight.scales)
    y: Tensor = ops.mx_linear(*operands, bias, *names, dtype, *scales)
    return y


def few_rows_arguments(
    x: Quantized,
    weights: list[Quantized],
    biases: list[Tensor | None],
    dtype: torch.dtype = BF16,
) -> tuple[Any, ...]:
    values, scales = [w.values for w in weights], [w.scales for w in weights]
    names = (x.format.name, weights[0].format.name)
    return x.values, x.scales, values, scales, biases, *names, dtype


def call_few_rows(*args: Any) -> list[Tensor]:
    results: list[Tensor] = ops.few_rows_mx_linears(*few_rows_arguments(*args))
    return results


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    blocks=st.integers(1, 4),
    columns=st.integers(1, 40),
    name=st.sampled_from(FORMATS),
    dtype=st.sampled_from([BF16, F32]),
    has_bias=st.booleans(),
)
def test_it_is_that_of_functional(
    leading: list[int], blocks: int, columns: int, name: str, dtype: torch.dtype, has_bias: bool
) -> None:
    width = 32 * blocks
    x = normal(*leading, width, dtype=dtype)
    weight = normal(columns, width, dtype=dtype, seed=1)
    bias = normal(columns, dtype=dtype, seed=2) if has_bias else None
    fmt = block_format(name)
    operands = (
        quantize_alone(x, fmt) if x.numel() else _empty(x, fmt),
        quantize_alone(weight, fmt),
    )
    got = call(*operands, bias, dtype)
    assert got.shape == (*leading, columns) and got.is_contiguous()
    quantized = (operands[0].values, operands[0].scales)
    if operands[0].tensor_scale is not None:
        quantized += (operands[0].tensor_scale,)
    want = functional.mx_linear(x, weight, bias, quantized=quantized, format=name)
    assert_bits_equal(got, want)
    if operands[0].tensor_scale is None:
        for y in call_few_rows(operands[0], [operands[1]] * 2, [bias] * 2, dtype):
            assert_bits_equal(y, got)


def _empty(x: Tensor, fmt: Any) -> Quantized:
    values = x.new_empty(fmt.values_shape(x.shape), dtype=fmt.elem_dtype)
    return Quantized(values, x.new_empty(fmt.scales_shape(x.shape), dtype=fmt.scale_dtype), fmt)


def test_formats_of_both_operands_may_differ() -> None:
    x, weight = quantized(4, 64), quantized(8, 64, name="mxfp4")
    want = x.dequantize(BF16) @ weight.dequantize(BF16).t()
    assert_bits_equal(call(x, weight), want)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "width": (
        lambda: call(quantized(4, 96), quantized(8, 64)),
        r"x has rows of 96 elements and weight of 64; they are \[\.\.\., K\] and \[N, K\]",
    ),
    "no matrix": (
        lambda: call(quantized(4, 64), quantized(2, 8, 64)),
        r"weight has shape \(2, 8, 64\); it must be \[N, K\]",
    ),
    "scales": (
        lambda: call(quantized(4, 64), Quantized(*_wrong_scales(), block_format("mxfp8"))),
        r"weight: scales has shape \(8, 3\); values of shape \(8, 64\) need row-major scales",
    ),
    "values": (
        lambda: call(
            Quantized(torch.ones(4, 64), quantized(4, 64).scales, block_format("mxfp8")),
            quantized(8, 64),
        ),
        "x: values has dtype torch.float32; allowed: torch.float8_e4m3fn",
    ),
    "bias of another dtype": (
        lambda: call(quantized(4, 64), quantized(8, 64), torch.ones(8)),
        "bias has dtype torch.float32; allowed: torch.bfloat16",
    ),
    "bias of another shape": (
        lambda: call(quantized(4, 64), quantized(8, 64), torch.ones(4, dtype=BF16)),
        r"bias has shape \(4,\)",
    ),
    "dtype": (
        lambda: call(quantized(4, 64), quantized(8, 64), dtype=torch.int32),
        "dtype is torch.int32; allowed: ",
    ),
    "device": (
        lambda: call(quantized(4, 64), _on_meta(quantized(8, 64))),
        "x is on cpu, weight on meta; they must be on one: move one of them",
    ),
    "tensor scale": (
        lambda: call(
            quantized(4, 64),
            Quantized(*_operand(quantized(8, 64)), block_format("mxfp8"), torch.ones(())),
        ),
        "weight: tensor_scale belongs to NVFP4",
    ),
}


def _operand(x: Quantized) -> tuple[Tensor, Tensor]:
    return x.values, x.scales


def _wrong_scales() -> tuple[Tensor, Tensor]:
    return quantized(8, 64).values, quantized(8, 96).scales


def _on_meta(x: Quantized) -> Quantized:
    return Quantized(x.values.to("meta"), x.scales.to("meta"), x.format)


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_refuses(refused: tuple[Callable[[], Any], str]) -> None:
    make, message = refused
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_fake_tensors_schema_and_strides(name: str) -> None:
    x, weight = quantized(2, 4, 64, name=name), quantized(8, 64, name=name, seed=1)
    utilities = ("test_faketensor",)
    scales = (x.tensor_scale, weight.tensor_scale)
    operands = (x.values, x.scales, weight.values, weight.scales, None)
    args = (*operands, x.format.name, weight.format.name, BF16, *scales)
    torch.library.opcheck(ops.mx_linear, args, test_utils=utilities)
    if name == "mxfp8":
        several = few_rows_arguments(x, [weight, quantized(5, 64)], [None, None])
        torch.library.opcheck(ops.few_rows_mx_linears, several, test_utils=utilities)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = call(x, weight)
    assert (y.shape, y.dtype) == ((2, 4, 8), BF16)


def test_several_are_what_each_is() -> None:
    x, weights = quantized(2, 3, 64), [quantized(n, 64, seed=n) for n in (8, 3, 5, 1)]
    biases = [normal(n, dtype=BF16) for n in (8, 3, 5, 1)]
    for of_all in (biases, [None] * len(weights)):
        results = call_few_rows(x, weights, of_all)
        for y, weight, bias in zip(results, weights, of_all, strict=True):
            assert_bits_equal(y, call(x, weight, bias))


def test_several_refuse_what_one_does() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(2, 8, 64\)"):
        call_few_rows(quantized(4, 64), [quantized(8, 64), quantized(2, 8, 64)], [None, None])
    with pytest.raises(ValueError, match="shorter"):
        call_few_rows(quantized(4, 64), [quantized(8, 64)] * 2, [None])


def test_values_of_any_strides() -> None:
    x, weight = quantized(4, 64), quantized(8, 64, seed=1)
    apart = Quantized(x.values.t().contiguous().t(), x.scales, x.format)
    assert_bits_equal(call(apart, weight), call(x, weight))
