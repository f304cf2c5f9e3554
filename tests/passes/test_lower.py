"""Which kernels and ATen ops take the place of our ops in a graph, on fake CUDA tensors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from formats import spec_with
from numerics import E5M2, SPEC
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mxnorm_pass import kernels, ops
from mxnorm_pass.kernels import coverage
from mxnorm_pass.passes import lower

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WIDTH = 256
Function = Callable[..., Any]


@pytest.fixture
def fakes() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "capability", lambda device: (9, 0))


def options(**changes: Any) -> list[Any]:
    return list(spec_with(SPEC, **changes).arguments())


def norm_cast(
    x: Tensor,
    weight: Any = None,
    block_weights: Any = None,
    tensor_scale: Any = None,
    **changes: Any,
) -> tuple[Tensor, ...]:
    return ops.norm_cast(x, weight, block_weights, tensor_scale, *options(**changes))


def add_norm_cast(
    x: Tensor,
    residual: Tensor,
    weight: Any = None,
    block_weights: Any = None,
    tensor_scale: Any = None,
    **changes: Any,
) -> tuple[Tensor, ...]:
    given = (weight, block_weights, tensor_scale)
    return ops.add_norm_cast(x, residual, *given, *options(**changes))


def tensor(mode: FakeTensorMode, *shape: Any, dtype: Any = BF16, device: str = "cuda") -> Tensor:
    with mode:
        return torch.empty(shape, dtype=dtype, device=device)


class Lowered:
    """A function's graph after lowering; its results have the metadata they had before."""

    def __init__(self, function: Function, *args: Any) -> None:
        graph = make_fx(lambda *tensors: function(*tensors))(*args).graph
        before = _results(graph)
        self.count = lower.lower(graph, {})
        graph.eliminate_dead_code()
        graph.lint()
        self.graph = graph
        self.code = str(graph)
        assert "mxnorm_pass" not in self.code or ops.dequantize in {n.target for n in graph.nodes}
        assert _results(graph) == before

    @property
    def kernels(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional)

    @property
    def kernel(self) -> fx.Node:
        (kernel,) = self.kernels
        return kernel

    @property
    def pointers(self) -> dict[str, Any]:
        """Tensors of the one kernel, by the name of its argument."""
        given = self.kernel.kwargs["kwargs"]
        return {name: arg for name, arg in given.items() if name.endswith("_ptr")}

    @property
    def constants(self) -> dict[str, Any]:
        hidden = kernel_side_table.get_constant_args(self.kernel.kwargs["constant_args_idx"])
        return {**self.kernel.kwargs["kwargs"], **hidden}

    @property
    def returned(self) -> list[str]:
        """For each result the kernel's pointer that it comes from."""
        return [_source(node, self.kernel) for node in self.graph.output_node().args[0]]


def _results(graph: fx.Graph) -> list[Any]:
    results = graph.output_node().args[0]
    values = [node.meta["val"] for node in (results if isinstance(results, tuple) else [results])]
    return [(v.dtype, str(v.device), str(v.shape), str(v.stride())) for v in values]


def _source(node: fx.Node, kernel: fx.Node) -> str:
    while node.args and node.args[0] is not kernel:
        assert node.target is torch.ops.aten.view.dtype
        node = node.args[0]
    return node.args[1]


# Kernels


@pytest.mark.parametrize("gain", [None, BF16, F32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["row-major", "blocked"])
def test_norm_cast(fakes: FakeTensorMode, gain: Any, weighted: bool, layout: str) -> None:
    x = tensor(fakes, 2, 64, WIDTH)
    given = {
        "weight": tensor(fakes, WIDTH, dtype=gain) if gain else None,
        "block_weights": tensor(fakes, WIDTH // 32, dtype=F32) if weighted else None,
    }
    given = {name: t for name, t in given.items() if t is not None}

    def function(x: Tensor, *tensors: Tensor) -> Any:
        named = dict(zip(given, tensors, strict=True))
        return norm_cast(x, **named, scale_layout=layout)

    lowered = Lowered(function, x, *given.values())
    assert lowered.count == 1
    assert lowered.returned == ["values_ptr", "scales_ptr", "rho_ptr"]
    expected = {"x_ptr", "values_ptr", "scales_ptr", "rho_ptr", *(f"{name}_ptr" for name in given)}
    assert lowered.pointers.keys() == expected
    assert lowered.constants["BLOCKED_SCALES"] == (layout == "blocked")


@pytest.mark.parametrize("residual_dtype", [BF16, F16, F32])
def test_add_norm_cast(fakes: FakeTensorMode, residual_dtype: torch.dtype) -> None:
    x, residual = tensor(fakes, 4, WIDTH), tensor(fakes, 4, WIDTH, dtype=residual_dtype)
    lowered = Lowered(add_norm_cast, x, residual)
    assert lowered.count == 1
    assert lowered.returned == ["total_ptr", "values_ptr", "scales_ptr", "rho_ptr"]
    total = lowered.pointers["total_ptr"].meta["val"]
    assert total.dtype == torch.promote_types(BF16, residual_dtype)


def test_options_reach_the_kernel(fakes: FakeTensorMode) -> None:
    x = tensor(fakes, 4, WIDTH)
    changes = {"eps": 1e-5, "p": 1.5, "elem_dtype": E5M2, "scale_mode": "even", "block_size": 64}
    constants = Lowered(lambda x: norm_cast(x, **changes), x).constants
    expected = {"EPS": 1e-5, "P": 1.5, "MODE": "even", "BLOCK": 64, "D": WIDTH, "EXACT": False}
    assert {name: constants[name] for name in expected} == expected
    assert Lowered(lambda x: norm_cast(x, estimator="exact"), x).constants["EXACT"]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["mxfp6 e3m2", "mxfp4", "nvfp4"])
def test_formats_of_few_bits(fakes: FakeTensorMode, name: str, both: bool) -> None:
    x, scale = tensor(fakes, 64, WIDTH), tensor(fakes, dtype=F32)
    gain_in_rows = (True,) if both else ()
    op = ops.norm_cast_both if both else ops.norm_cast

    def function(x: Tensor, scale: Tensor) -> Any:
        of_tensor = scale if name == "nvfp4" else None
        return op(x, None, None, of_tensor, *options(format=name), *gain_in_rows)

    lowered = Lowered(function, x, scale)
    assert lowered.count == 1
    assert ("tensor_scale_ptr" in lowered.pointers) == (name == "nvfp4")
    along_t = ["values_t_ptr", "scales_t_ptr"] if both else []
    assert lowered.returned == ["values_ptr", "scales_ptr", "rho_ptr", *along_t]
    expected = {
        "mxfp6 e3m2": (6, "rceil", 32),
        "mxfp4": (4, "rceil", 32),
        "nvfp4": (4, "nearest", 16),
    }
    found = tuple(lowered.constants[constant] for constant in ("BITS", "MODE", "BLOCK"))
    assert found == expected[name]


@pytest.mark.parametrize("version", [(9, 0), (10, 0), (12, 0)])
def test_blackwell_converts(
    fakes: FakeTensorMode, version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "capability", lambda device: version)
    x = tensor(fakes, 4, WIDTH)
    lowered = Lowered(partial(norm_cast, format="mxfp4"), x)
    assert lowered.constants["CONVERTS"] == (version >= (10, 0))
    assert not Lowered(norm_cast, x).constants["CONVERTS"]


def test_two_norms_are_two_kernels(fakes: FakeTensorMode) -> None:
    x, y = tensor(fakes, 4, WIDTH), tensor(fakes, 8, 512, dtype=F32)
    lowered = Lowered(lambda x, y: (*norm_cast(x), *norm_cast(y)), x, y)
    assert lowered.count == len(lowered.kernels) == 2
    assert [k.kwargs["kwargs"]["D"] for k in lowered.kernels] == [WIDTH, 512]


def test_results_that_nobody_reads(fakes: FakeTensorMode) -> None:
    x, residual = tensor(fakes, 4, WIDTH), tensor(fakes, 4, WIDTH)
    lowered = Lowered(lambda x, r: add_norm_cast(x, r)[:1], x, residual)
    assert lowered.returned == ["total_ptr"]
    assert not Lowered(lambda x: (norm_cast(x)[0], x)[1:], x).kernels


@pytest.mark.parametrize("adds", [False, True])
def test_symbolic_rows(fakes: FakeTensorMode, adds: bool) -> None:
    rows = fakes.from_tensor(torch.empty(6, 10)).shape
    assert not any(isinstance(size, int) for size in rows)
    x = tensor(fakes, *rows, WIDTH)
    guards = len(fakes.shape_env.guards)

    def function(x: Tensor) -> Any:
        return add_norm_cast(x, x + 1) if adds else norm_cast(x, scale_layout="blocked")

    lowered = Lowered(function, x)
    assert lowered.count == 1
    assert not isinstance(lowered.kernel.kwargs["grid"][0][0], int)
    assert len(fakes.shape_env.guards) == guards


@pytest.mark.parametrize("layout", ["row-major", "blocked"])
def test_symbolic_rows_decomposed(fakes: FakeTensorMode, layout: str) -> None:
    rows = fakes.from_tensor(torch.empty(6)).shape
    x = tensor(fakes, *rows, WIDTH, device="cpu")
    assert_decomposed(Lowered(partial(norm_cast, scale_layout=layout), x))


# Dequantised values


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_dequantized(fakes: FakeTensorMode, dtype: torch.dtype) -> None:
    def function(x: Tensor) -> Any:
        values, scales, rho = norm_cast(x)
        return ops.dequantize(values, scales, "mxfp8", dtype), rho

    lowered = Lowered(function, tensor(fakes, 4, WIDTH))
    assert lowered.count == 1
    assert lowered.returned == ["dequantized_ptr", "rho_ptr"]
    assert lowered.pointers.keys() == {"x_ptr", "dequantized_ptr", "rho_ptr"}


def test_dequantized_after_add(fakes: FakeTensorMode) -> None:
    def function(x: Tensor, residual: Tensor) -> Any:
        total, values, scales, _ = add_norm_cast(x, residual)
        # Each reader has its own copy.
        first, second = (ops.dequantize(values, scales, "mxfp8", BF16) for _ in range(2))
        return first, total, second

    lowered = Lowered(function, tensor(fakes, 4, WIDTH), tensor(fakes, 4, WIDTH))
    assert lowered.count == 1
    assert lowered.returned == ["dequantized_ptr", "total_ptr", "dequantized_ptr"]
    assert "values_ptr" not in lowered.pointers and "scales_ptr" not in lowered.pointers


@pytest.mark.parametrize("read_as", ["nvfp4", "nvfp4 e2m1"])
def test_dequantized_with_the_scale_of_the_tensor(fakes: FakeTensorMode, read_as: str) -> None:
    def function(x: Tensor, scale: Tensor) -> Any:
        values, scales, _ = norm_cast(x, tensor_scale=scale, format="nvfp4")
        return (ops.dequantize(values, scales, read_as, BF16, scale),)

    lowered = Lowered(function, tensor(fakes, 4, WIDTH), tensor(fakes, dtype=F32))
    assert lowered.returned == ["dequantized_ptr"]
    assert lowered.pointers.keys() == {"x_ptr", "tensor_scale_ptr", "dequantized_ptr", "rho_ptr"}


@pytest.mark.parametrize("given, read", [(0, 1), (0, None), (None, 0)])
def test_another_scale_of_the_tensor(
    fakes: FakeTensorMode, given: int | None, read: int | None
) -> None:
    def function(x: Tensor, *tensors: Tensor) -> Any:
        scale, other = (None if i is None else tensors[i] for i in (given, read))
        values, scales, _ = norm_cast(x, tensor_scale=scale, format="nvfp4")
        return (ops.dequantize(values, scales, "nvfp4", BF16, other),)

    scales = [tensor(fakes, dtype=F32) for _ in range(2)]
    assert "dequantized_ptr" not in Lowered(function, tensor(fakes, 4, WIDTH), *scales).pointers


def read_as_other_elements(x: Tensor) -> Any:
    values, scales, _ = norm_cast(x, format="mxfp6 e2m3")
    return (ops.dequantize(values, scales, "mxfp6 e3m2", BF16),)


def values_escape(x: Tensor) -> Any:
    values, scales, _ = norm_cast(x)
    return ops.dequantize(values, scales, "mxfp8", BF16), values


def scales_escape(x: Tensor) -> Any:
    values, scales, _ = norm_cast(x)
    return ops.dequantize(values, scales, "mxfp8", BF16), scales


def two_dtypes(x: Tensor) -> Any:
    values, scales, _ = norm_cast(x)
    return ops.dequantize(values, scales, "mxfp8", BF16), ops.dequantize(
        values, scales, "mxfp8", F32
    )


def to_float64(x: Tensor) -> Any:
    values, scales, _ = norm_cast(x)
    return (ops.dequantize(values, scales, "mxfp8", F64),)


def with_scales_of_another(x: Tensor) -> Any:
    values, scales, _ = norm_cast(x)
    more_values, more_scales, _ = norm_cast(x, scale_mode="floor")
    return ops.dequantize(values, more_scales, "mxfp8", BF16), ops.dequantize(
        more_values, scales, "mxfp8", BF16
    )


def values_alone(x: Tensor) -> Any:
    values, _, rho = norm_cast(x)
    return values.view(torch.uint8), rho


@pytest.mark.parametrize(
    "function",
    [
        read_as_other_elements,
        values_escape,
        scales_escape,
        two_dtypes,
        to_float64,
        with_scales_of_another,
        values_alone,
    ],
    ids=lambda f: f.__name__,
)
def test_values_that_others_read_are_written(fakes: FakeTensorMode, function: Function) -> None:
    lowered = Lowered(function, tensor(fakes, 4, WIDTH))
    assert lowered.kernels
    for kernel in lowered.kernels:
        assert {"values_ptr", "scales_ptr"} <= kernel.kwargs["kwargs"].keys()
        assert "dequantized_ptr" not in kernel.kwargs["kwargs"]
    assert ops.dequantize not in {node.target for node in lowered.graph.nodes}


# Decompositions


@contextmanager
def decomposed(caplog: pytest.LogCaptureFixture, reason: str) -> Iterator[None]:
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="mxnorm_pass.passes.lower"):
        yield
    assert any(
        "is decomposed" in r.getMessage() and reason in r.getMessage() for r in caplog.records
    ), caplog.text


UNCOVERED: dict[str, tuple[Callable[[FakeTensorMode], tuple[Tensor, ...]], dict[str, Any], str]] = {
    "cpu": (lambda m: (tensor(m, 4, WIDTH, device="cpu"),), {}, "x is on cpu"),
    "gain_float64": (
        lambda m: (tensor(m, 4, WIDTH), tensor(m, WIDTH, dtype=F64)), {}, "torch.float64 is none",
    ),
    "norm_dtype": (
        lambda m: (tensor(m, 4, WIDTH),),
        {"estimator": "exact", "norm_dtype": F64}, "torch.float64 is none",
    ),
    "out_dtype": (
        lambda m: (tensor(m, 4, WIDTH),),
        {"estimator": "exact", "out_dtype": F64}, "torch.float64 is none",
    ),
    "width": (lambda m: (tensor(m, 1, 65568),), {}, "rows of 65568 elements"),
    "symbolic_width": (
        lambda m: (tensor(m, 4, m.from_tensor(torch.empty(10)).shape[0] * 32),), {}, "rows of ",
    ),
    "block_size": (lambda m: (tensor(m, 4, WIDTH),), {"block_size": 8}, "block size 8"),
    "scale_mode": (
        lambda m: (tensor(m, 4, WIDTH),), {"scale_mode": "rceil-log2"}, "scale mode 'rceil-log2'",
    ),
    "p": (lambda m: (tensor(m, 4, WIDTH),), {"p": 16.5}, "p = 16.5"),
    "no_rows": (lambda m: (tensor(m, 0, WIDTH),), {}, "there are no rows"),
}  # fmt: skip


def assert_decomposed(lowered: Lowered) -> None:
    assert lowered.count == 1
    assert not lowered.kernels and "triton" not in lowered.code
    assert "mxnorm_pass" not in lowered.code
    assert torch.ops.aten.amax.default in {node.target for node in lowered.graph.nodes}


@pytest.mark.parametrize("case", UNCOVERED.values(), ids=UNCOVERED.keys())
def test_uncovered(fakes: FakeTensorMode, caplog: Any, case: Any) -> None:
    tensors, changes, reason = case
    with decomposed(caplog, reason):
        assert_decomposed(Lowered(lambda *args: norm_cast(*args, **changes), *tensors(fakes)))


def test_scale_of_the_tensor_elsewhere(fakes: FakeTensorMode, caplog: Any) -> None:
    def function(x: Tensor, scale: Tensor) -> Any:
        return norm_cast(x, tensor_scale=scale, format="nvfp4")

    with decomposed(caplog, "x is on cuda:0, another tensor on cpu"):
        x, scale = tensor(fakes, 4, WIDTH), tensor(fakes, dtype=F32, device="cpu")
        assert_decomposed(Lowered(function, x, scale))


def test_uncovered_residual(fakes: FakeTensorMode, caplog: Any) -> None:
    x = tensor(fakes, 4, WIDTH, dtype=F32)
    with decomposed(caplog, "block size 8"):
        lowered = Lowered(lambda x: add_norm_cast(x, x, block_size=8), x)
    assert_decomposed(lowered)


def test_old_gpu(fakes: FakeTensorMode, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "capability", lambda device: (8, 0))
    with decomposed(caplog, "compute capability (8, 0)"):
        assert_decomposed(Lowered(norm_cast, tensor(fakes, 4, WIDTH)))
    monkeypatch.setattr(coverage, "capability", lambda device: (8, 9))
    assert Lowered(norm_cast, tensor(fakes, 4, WIDTH)).kernels


def test_no_triton(fakes: FakeTensorMode, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "find_spec", lambda name: None)
    with decomposed(caplog, "triton is not installed"):
        assert_decomposed(Lowered(norm_cast, tensor(fakes, 4, WIDTH)))


def test_on_cpu_the_kernels_are_not_even_imported(
    fakes: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mxnorm_pass.kernels.norm_cast", None)
    monkeypatch.delattr(kernels, "norm_cast", raising=False)
    x = tensor(fakes, 4, WIDTH, device="cpu")
    assert_decomposed(Lowered(add_norm_cast, x, x))
    with pytest.raises(ImportError):
        Lowered(norm_cast, tensor(fakes, 4, WIDTH))


@pytest.mark.parametrize(
    "width, changes",
    [
        (32, {}),
        (65536, {}),
        (WIDTH, {"p": 16.0}),
        (WIDTH, {"p": 0.01}),
        # The exact estimator has no p.
        (WIDTH, {"p": 16.5, "estimator": "exact"}),
        (WIDTH, {"block_size": 16}),
        (WIDTH, {"block_size": 128}),
    ],
)
def test_limits(fakes: FakeTensorMode, width: int, changes: dict[str, Any]) -> None:
    assert Lowered(lambda x: norm_cast(x, **changes), tensor(fakes, 1, width)).kernels


def test_ops_without_kernels_are_decomposed(fakes: FakeTensorMode) -> None:
    def function(x: Tensor) -> Any:
        values, scales = ops.cast(x, "mxfp8")
        return ops.dequantize(values, scales, "mxfp8", BF16)

    lowered = Lowered(function, tensor(fakes, 4, WIDTH))
    assert lowered.count == 2
    assert "mxnorm_pass" not in lowered.code and "triton" not in lowered.code


def test_a_graph_without_our_ops_stays(fakes: FakeTensorMode) -> None:
    lowered = Lowered(lambda x: (x + 1,), tensor(fakes, 4, WIDTH))
    assert lowered.count == 0 and not lowered.kernels
