"""The ops: what they refuse and how they say it, their fake tensors, schemas and results on CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from numerics import E4M3, E5M2, SPEC, assert_bits_equal, gain, normal
from pairwise import each_value, pairwise
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mxnorm_pass import functional, ops
from mxnorm_pass.numerics.formats import SCALE_MODES, BlockFormat
from mxnorm_pass.numerics.rms import rms_constant

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
ROWS, WIDTH = 64, 128


@dataclass(frozen=True)
class NormOp:
    """A norm's op, called with keywords."""

    name: str
    adds: bool
    both: bool

    def __str__(self) -> str:
        return self.name

    @property
    def op(self) -> Any:
        return getattr(ops, self.name)

    def arguments(
        self,
        x: Tensor | None = None,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        block_weights: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        x = normal(ROWS, WIDTH, dtype=BF16) if x is None else x
        residual = torch.ones_like(x) if residual is None else residual
        added = (residual,) if self.adds else ()
        names = (field.name for field in fields(SPEC))
        spec = (dict(zip(names, SPEC.arguments(), strict=True)) | options).values()
        return (x, *added, weight, block_weights, None, *spec, *((True,) if self.both else ()))

    def __call__(self, **arguments: Any) -> tuple[Tensor, ...]:
        return self.op(*self.arguments(**arguments))


NORM_OPS = (
    NormOp("norm_cast", adds=False, both=False),
    NormOp("add_norm_cast", adds=True, both=False),
    NormOp("norm_cast_both", adds=False, both=True),
    NormOp("add_norm_cast_both", adds=True, both=True),
)
ADDING_OPS = tuple(op for op in NORM_OPS if op.adds)
BOTH_OPS = tuple(op for op in NORM_OPS if op.both)
all_norm_ops = pytest.mark.parametrize("op", NORM_OPS, ids=str)


@pytest.fixture(params=["eager", "fake"])
def tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that the test makes are real ones, or fake ones."""
    with FakeTensorMode() if request.param == "fake" else nullcontext():
        yield


def assert_refuses(
    call: Callable[[], Any], error: type[Exception], name: str, given: str, allowed: str
) -> None:
    """The message starts with the argument's name, then says what it is and what it may be."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(f"{name} "), message
    assert given in message and allowed in message, message


# What the tensors may be

WRONG_TENSORS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str, str, str]] = {
    "x_integer": (
        lambda: {"x": torch.ones(ROWS, WIDTH, dtype=torch.int32)},
        TypeError, "x", "torch.int32", "torch.bfloat16",
    ),
    "x_float64": (
        lambda: {"x": torch.ones(ROWS, WIDTH, dtype=F64)},
        TypeError, "x", "torch.float64", "torch.float32",
    ),
    "x_scalar": (
        lambda: {"x": torch.tensor(1.0)}, ValueError, "x", "scalar", "[..., D]",
    ),
    "x_width": (
        lambda: {"x": torch.ones(ROWS, 100)}, ValueError, "x", "(64, 100)", "block_size 32",
    ),
    "weight_integer": (
        lambda: {"weight": torch.ones(WIDTH, dtype=torch.int64)},
        TypeError, "weight", "torch.int64", "torch.float32",
    ),
    "weight_float8": (
        lambda: {"weight": torch.ones(WIDTH).to(E4M3)},
        TypeError, "weight", "torch.float8_e4m3fn", "torch.float32",
    ),
    "weight_short": (
        lambda: {"weight": torch.ones(WIDTH - 1)}, ValueError, "weight", "(127,)", "(128,)",
    ),
    "weight_one": (lambda: {"weight": torch.ones(1)}, ValueError, "weight", "(1,)", "(128,)"),
    "weight_2d": (
        lambda: {"weight": torch.ones(1, WIDTH)}, ValueError, "weight", "(1, 128)", "(128,)",
    ),
    "weight_elsewhere": (
        lambda: {"weight": torch.ones(WIDTH, device="meta")}, ValueError, "weight", "meta", "cpu",
    ),
    "block_weights_bf16": (
        lambda: {"block_weights": torch.ones(4, dtype=BF16)},
        TypeError, "block_weights", "torch.bfloat16", "torch.float32",
    ),
    "block_weights_float64": (
        lambda: {"block_weights": torch.ones(4, dtype=F64)},
        TypeError, "block_weights", "torch.float64", "torch.float32",
    ),
    "block_weights_shape": (
        lambda: {"block_weights": torch.ones(3)}, ValueError, "block_weights", "(3,)", "(4,)",
    ),
    "block_weights_per_element": (
        lambda: {"block_weights": torch.ones(WIDTH)},
        ValueError, "block_weights", "(128,)", "(4,)",
    ),
    "block_weights_elsewhere": (
        lambda: {"block_weights": torch.ones(4, device="meta")},
        ValueError, "block_weights", "meta", "cpu",
    ),
    "block_weights_of_exact": (
        lambda: {"block_weights": torch.ones(4), "estimator": "exact"},
        ValueError, "block_weights", "'exact'", "'mxnorm'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
@all_norm_ops
def test_wrong_tensors(tensors: None, op: NormOp, wrong: Any) -> None:
    arguments, *expected = wrong
    assert_refuses(lambda: op(**arguments()), *expected)


@pytest.mark.parametrize("op", ADDING_OPS, ids=str)
def test_wrong_residuals(tensors: None, op: NormOp) -> None:
    for residual, *expected in (
        (torch.ones(ROWS, WIDTH, dtype=F64), TypeError, "torch.float64", "torch.bfloat16"),
        # These broadcast, but the sum would be no residual stream's.
        (torch.ones(WIDTH), ValueError, "(128,)", "(64, 128)"),
        (torch.ones(1, WIDTH), ValueError, "(1, 128)", "(64, 128)"),
        (torch.ones(2, ROWS, WIDTH), ValueError, "(2, 64, 128)", "(64, 128)"),
        (torch.ones(ROWS, WIDTH, device="meta"), ValueError, "meta", "cpu"),
    ):
        error, given, allowed = expected
        assert_refuses(lambda r=residual: op(residual=r), error, "residual", given, allowed)


@pytest.mark.parametrize("op", BOTH_OPS, ids=str)
@pytest.mark.parametrize("shape", [(5, WIDTH), (3, 7, WIDTH), (WIDTH,)], ids=str)
def test_rows_that_are_no_whole_blocks(tensors: None, op: NormOp, shape: tuple[int, ...]) -> None:
    x, rows = torch.ones(shape), math.prod(shape[:-1])
    assert_refuses(lambda: op(x=x), ValueError, "x", f"{rows} rows", "block_size 32")


@all_norm_ops
def test_sparse_tensors(op: NormOp) -> None:
    sparse = torch.eye(WIDTH)[:ROWS].to_sparse()
    for name in ("x", "residual") if op.adds else ("x",):
        # No backend of ours takes them, so the dispatcher itself may refuse first.
        with pytest.raises((TypeError, NotImplementedError)):
            op(**{"x": torch.ones(ROWS, WIDTH)} | {name: sparse})


# What the options may be

WRONG_OPTIONS: dict[str, list[Any]] = {
    "eps": [-1e-6, math.nan, math.inf],
    "estimator": ["rms", "MXNorm", ""],
    "p": [0.0, -2.0, math.nan, math.inf],
    "format": [
        "",
        "mxfp9",
        "mxfp8 e2m1",
        "mxfp4 e2m1 rceil block 5",
        "nvfp4 e2m1 rceil block 16",
        "mxfp9 e4m3fn rceil block 32",
        "mxfp8 int8 rceil block 32",
        "mxfp8 e4m3fn RCEIL block 32",
        "mxfp8 e4m3fn rceil block 0",
        "mxfp8 e5m2 floor block -32",
    ],
    "norm_dtype": [torch.int32, E4M3, torch.bool],
    "out_dtype": [torch.int32, E4M3, torch.bool],
    "scale_layout": ["swizzled", "row_major"],
}
ALLOWED_OPTIONS = {
    "eps": ">= 0",
    "estimator": "mxnorm, exact",
    "p": "> 0",
    "format": "'nvfp4', or one of 'mxfp8 e4m3fn', 'mxfp8 e5m2', 'mxfp6 e2m3', ",
    "norm_dtype": "None, torch.float32",
    "out_dtype": "torch.float32",
    "scale_layout": "row-major, blocked",
}
wrong_options = pytest.mark.parametrize(
    "option, value", [(name, value) for name, values in WRONG_OPTIONS.items() for value in values]
)


@wrong_options
@all_norm_ops
def test_wrong_options(tensors: None, op: NormOp, option: str, value: Any) -> None:
    for block_weights in (None, torch.ones(4)):
        assert_refuses(
            lambda bw=block_weights: op(block_weights=bw, **{option: value}),
            ValueError, option, str(value), ALLOWED_OPTIONS[option],
        )  # fmt: skip


@pytest.mark.parametrize("p", [0.5, 2.0, 3.5])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_allowed_numbers(tensors: None, p: float, eps: float) -> None:
    NORM_OPS[0](p=p, eps=eps, norm_dtype=None, out_dtype=F64)


def test_wrong_formats_of_casts(tensors: None) -> None:
    x = torch.ones(4, 64)
    values, scales = ops.cast(x, "mxfp8")
    for name in WRONG_OPTIONS["format"]:
        expected = (ValueError, "format", name, ALLOWED_OPTIONS["format"])
        assert_refuses(lambda n=name: ops.cast(x, n), *expected)
        assert_refuses(lambda n=name: ops.dequantize(values, scales, n, BF16), *expected)


def test_wrong_tensors_of_cast(tensors: None) -> None:
    for x, *expected in (
        (torch.ones(4, 64, dtype=F64), TypeError, "torch.float64", "torch.float32"),
        (torch.ones(4, 64, dtype=torch.int8), TypeError, "torch.int8", "torch.float32"),
        (torch.ones(4, 48), ValueError, "(4, 48)", "block_size 32"),
        (torch.tensor(1.0), ValueError, "scalar", "[..., D]"),
    ):
        error, given, allowed = expected
        assert_refuses(lambda t=x: ops.cast(t, "mxfp8"), error, "x", given, allowed)


def test_wrong_arguments_of_dequantize(tensors: None) -> None:
    values = torch.ones(4, 64).to(E4M3)
    scales = torch.full((4, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    cases: list[tuple[Any, ...]] = [
        (
            (values.float(), scales, "mxfp8", BF16),
            TypeError,
            "values",
            "torch.float32",
            "float8_e4m3fn",
        ),
        (
            (values, scales.view(torch.uint8), "mxfp8", BF16),
            TypeError,
            "scales",
            "uint8",
            "e8m0fnu",
        ),
        ((values, scales[:3], "mxfp8", BF16), ValueError, "scales", "(3, 2)", "D / block size"),
        ((values, scales[0], "mxfp8", BF16), ValueError, "scales", "(2,)", "D / block size"),
        ((values, scales[:, :0], "mxfp8", BF16), ValueError, "scales", "(4, 0)", "D / block size"),
        (
            (values[:, :63], scales, "mxfp8", BF16),
            ValueError,
            "scales",
            "(4, 63)",
            "D / block size",
        ),
        ((values[0, 0], scales[0, 0], "mxfp8", BF16), ValueError, "scales", "()", "D / block size"),
        ((values, scales.to("meta"), "mxfp8", BF16), ValueError, "scales", "meta", "cpu"),
        ((values, scales, "mxfp8", torch.int8), ValueError, "dtype", "int8", "torch.float32"),
        ((values, scales, "mxfp8", E5M2), ValueError, "dtype", "float8_e5m2", "torch.float32"),
    ]
    for arguments, *expected in cases:
        assert_refuses(lambda a=arguments: ops.dequantize(*a), *expected)


# What the ops give


def sample(shape: tuple[int, ...], layout: str) -> Tensor:
    x = normal(*shape, dtype=BF16)
    match layout:
        case "transposed":
            return x.movedim(0, 1).contiguous().movedim(1, 0)
        case "columns_first":
            return x.movedim(-1, 0).contiguous().movedim(0, -1)
        case "sliced":
            return x.repeat_interleave(2, dim=0)[::2]
    return x


LAYOUTS = ("contiguous", "transposed", "columns_first", "sliced")


@pairwise(scale_layout=["row-major", "blocked"], layout=LAYOUTS, op=NORM_OPS)
def test_results_are_contiguous_and_those_of_functional(
    op: NormOp, layout: str, scale_layout: Any
) -> None:
    x, residual = sample((4, 16, WIDTH), layout), sample((4, 16, WIDTH), layout).flip(0)
    weight = gain(2 * WIDTH, BF16)[::2]
    results = list(op(x=x, residual=residual, weight=weight, scale_layout=scale_layout))
    assert all(t.is_contiguous() for t in results)
    if op.adds:
        x = x + residual
        assert_bits_equal(results.pop(0), x)
    function = functional.mxnorm_cast_both if op.both else functional.mxnorm_cast
    keywords = replace(SPEC, scale_layout=scale_layout).keywords()
    for actual, expected in zip(results, function(x, weight, **keywords), strict=True):
        assert_bits_equal(actual, expected)


@pairwise(scale_layout=["row-major", "blocked"], layout=LAYOUTS, op=NORM_OPS)
def test_fake_results_are_like_the_real_ones(op: NormOp, layout: str, scale_layout: Any) -> None:
    x = sample((4, 16, WIDTH), layout)
    residual = sample((4, 16, WIDTH), layout).float()
    arguments = op.arguments(x=x, residual=residual, scale_layout=scale_layout)
    with FakeTensorMode() as mode:
        fake = op.op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    for a, b in zip(fake, op.op(*arguments), strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@each_value(estimator=["mxnorm", "exact"], op=NORM_OPS)
def test_opcheck(op: NormOp, estimator: Any) -> None:
    for shape in ((ROWS, WIDTH), (2, 32, 64)):
        x = normal(*shape, dtype=BF16)
        weight = gain(shape[-1], BF16)
        torch.library.opcheck(op.op, op.arguments(x=x, weight=weight, estimator=estimator))


def test_opcheck_of_casts() -> None:
    x = normal(4, 64, dtype=BF16)
    torch.library.opcheck(ops.cast, (x, "mxfp8"))
    # Its check of the schema does arithmetic on the inputs, which float8 has none of.
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        ops.dequantize, (*functional.mx_cast(x), "mxfp8", BF16), test_utils=utilities
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", SCALE_MODES)
def test_cast_and_dequantize(layout: str, mode: Any) -> None:
    x = sample((4, 16, WIDTH), layout)
    values, scales = ops.cast(x, f"mxfp8 e5m2 {mode} block 32")
    expected = functional.mx_cast(x, format=BlockFormat.of(elem_dtype=E5M2, scale_mode=mode))
    dequantized = ops.dequantize(values, scales, f"mxfp8 e5m2 {mode} block 32", F32)
    assert_bits_equal(values, expected[0])
    assert_bits_equal(scales, expected[1])
    assert_bits_equal(dequantized, functional.mx_dequantize(*expected, F32))
    assert all(t.is_contiguous() for t in (values, scales, dequantized))


@all_norm_ops
def test_no_derivative(op: NormOp) -> None:
    x = normal(ROWS, WIDTH).requires_grad_()
    with pytest.raises(RuntimeError, match="has no derivative"):
        op(x=x)
    with torch.no_grad():
        op(x=x)


# Block weights


@pytest.mark.parametrize("p", [2.0, 1.0, 1.5])
def test_block_weights_weigh_the_blocks(p: float) -> None:
    x, weights = normal(ROWS, WIDTH), torch.tensor([0.4, 0.0, 0.05, 0.3])
    powers = x.double().unflatten(-1, (4, 32)).abs().amax(-1).pow(p)
    expected = 1 / torch.sqrt((powers * weights.double()).sum(-1, keepdim=True).pow(2 / p) + 1e-6)
    for op in NORM_OPS:
        results = op(x=x, residual=torch.zeros_like(x), block_weights=weights, p=p)
        rho = results[3 if op.adds else 2]
        torch.testing.assert_close(rho.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("p", [2.0, 1.0, 1.5])
def test_block_weights_of_the_gaussian_change_nothing(p: float) -> None:
    x = normal(ROWS, WIDTH)
    weights = torch.full((4,), 1 / (4 * rms_constant(p, 32) ** p))
    *_, rho = NORM_OPS[0](x=x, block_weights=weights, p=p)
    *_, expected = NORM_OPS[0](x=x, p=p)
    torch.testing.assert_close(rho, expected, rtol=2e-6, atol=0)


def test_a_block_without_weight_does_not_count() -> None:
    x, weights = normal(ROWS, WIDTH), torch.tensor([0.4, 0.0, 0.05, 0.3])
    louder = x.clone()
    louder[:, 32:64] *= 100
    *_, rho = NORM_OPS[0](x=x, block_weights=weights)
    *_, same = NORM_OPS[0](x=louder, block_weights=weights)
    louder[:, :32] *= 100
    *_, other = NORM_OPS[0](x=louder, block_weights=weights)
    assert torch.equal(rho, same)
    assert (other < 0.1 * rho).all()
