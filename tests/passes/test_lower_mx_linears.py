"""What takes the place of linears on MX operands, on fake CUDA tensors of several chips."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import SPEC
from sm100 import Emulated, sm100
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mxnorm_pass import ops
from mxnorm_pass.kernels import coverage
from mxnorm_pass.numerics.cast import quantize_alone
from mxnorm_pass.numerics.formats import block_format
from mxnorm_pass.passes import lower

aten = torch.ops.aten
BF16, F32 = torch.bfloat16, torch.float32
WIDTH, COLUMNS = 256, 64
NAME = block_format("mxfp8").name


@pytest.fixture
def fakes() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "capability", lambda device: (9, 0))


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "capability", lambda device: (10, 0))


class Operands:
    """Fake values and scales of x and weight."""

    def __init__(self, mode: FakeTensorMode, rows: Any, name: str = "mxfp8", **at: Any) -> None:
        self.format = block_format(name)
        device = at.pop("device", "cuda")
        sizes = (rows if isinstance(rows, tuple) else (rows,), (at.pop("columns", COLUMNS),))
        width = at.pop("width", WIDTH)
        with mode:
            self.tensors = [
                torch.empty(shape, dtype=dtype, device=device)
                for leading in sizes
                for shape, dtype in (
                    (self.format.values_shape((*leading, width)), self.format.elem_dtype),
                    (self.format.scales_shape((*leading, width)), self.format.scale_dtype),
                )
            ]


def lowered(function: Callable[..., Any], *args: Tensor) -> fx.Graph:
    gm = make_fx(function)(*args)
    before = _results(gm.graph)
    lower.lower(gm.graph, {})
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    assert _results(gm.graph) == before
    return gm.graph


def _results(graph: fx.Graph) -> list[Any]:
    results = graph.output_node().args[0]
    nodes = results if isinstance(results, tuple) else [results]
    values = [node.meta["val"] for node in nodes]
    return [(v.dtype, str(v.device), str(v.shape), str(v.stride())) for v in values]


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def kernels(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional)


def calls(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=ops.few_rows_mx_linears)


def lowered_linear(operands: Operands, bias: Tensor | None = None, dtype: Any = BF16) -> fx.Graph:
    name = operands.format.name

    def linear(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, *bias: Tensor) -> Tensor:
        return ops.mx_linear(x, xs, w, ws, *(bias or (None,)), name, name, dtype)

    return lowered(linear, *operands.tensors, *([] if bias is None else [bias]))


def assert_dense(graph: fx.Graph) -> None:
    assert not kernels(graph) and "mxnorm_pass" not in str(graph)
    assert aten.mm.default in targets(graph) or aten.addmm.default in targets(graph)


# Chips that multiply no MX operands


@pytest.mark.parametrize("rows", [2, 32, (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_few_rows_are_a_call(fakes: FakeTensorMode, rows: Any, dtype: torch.dtype) -> None:
    """Of the op, which launches the kernel: Inductor takes none that is Gluon's."""
    graph = lowered_linear(Operands(fakes, rows), dtype=dtype)
    assert len(calls(graph)) == 1 and not kernels(graph) and aten.mm.default not in targets(graph)


@pytest.mark.parametrize("rows", [1, (1, 1)], ids=str)
def test_one_row_is_a_kernel(fakes: FakeTensorMode, rows: Any) -> None:
    graph = lowered_linear(Operands(fakes, rows))
    assert len(kernels(graph)) == 1 and "mxnorm_pass" not in str(graph)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_bias_reaches_the_kernel(fakes: FakeTensorMode, rows: int) -> None:
    with fakes:
        bias = torch.empty(COLUMNS, dtype=BF16, device="cuda")
    graph = lowered_linear(Operands(fakes, rows), bias)
    if rows == 1:
        (kernel,) = kernels(graph)
        assert kernel.kwargs["kwargs"]["bias_0"].op == "placeholder"
    else:
        (call,) = calls(graph)
        assert [b.op for b in call.args[4]] == ["placeholder"]


def test_scales_that_are_cut_out_of_others_are_copied() -> None:
    with sm100() as mode:
        operands = Operands(mode, 1)
        scales = operands.tensors[3]
        strides = (2 * scales.shape[1], 1)
        cut = torch.empty_strided(scales.shape, strides, dtype=scales.dtype, device="cuda")
        operands.tensors[3] = cut
        graph = lowered_linear(operands)
    (kernel,) = kernels(graph)
    assert kernel.kwargs["kwargs"]["scales_0"].meta["val"].is_contiguous()


def test_a_compiled_program_launches_the_kernel_of_one_row_alone(fakes: FakeTensorMode) -> None:
    rows = tuple(fakes.from_tensor(torch.empty(6)).shape)
    with V.set_aot_compilation(True):
        assert len(kernels(lowered_linear(Operands(fakes, 1)))) == 1
        for more in (4, rows):
            assert_dense(lowered_linear(Operands(fakes, more)))


# Several that read one x


def lowered_linears(
    mode: FakeTensorMode, rows: Any, block: Callable[..., Any], count: int = 3
) -> fx.Graph:
    """``block(linear, weights)``, where ``linear(weight, bias)`` has the one x."""
    x, xs, *_ = Operands(mode, rows).tensors
    of_weights = [Operands(mode, 1, columns=32 * (i + 1)).tensors[2:] for i in range(count)]

    def run(x: Tensor, xs: Tensor, *flat: Tensor) -> Any:
        def linear(weight: tuple[Tensor, Tensor], bias: Tensor | None = None) -> Tensor:
            return ops.mx_linear(x, xs, *weight, bias, NAME, NAME, BF16)

        return block(linear, list(zip(flat[::2], flat[1::2], strict=True)))

    return lowered(run, x, xs, *[t for weight in of_weights for t in weight])


def counts(graph: fx.Graph) -> list[int]:
    """How many linears each call has."""
    return [len(call.args[2]) for call in calls(graph)]


def computed(y: Tensor, weight: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The weight with scales that depend on ``y``, behind its linear."""
    values, scales = weight
    return values, (scales.view(torch.uint8) + y.sum().to(torch.uint8)).view(scales.dtype)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("count", [2, 3])
def test_those_of_one_x_are_one_call(fakes: FakeTensorMode, rows: int, count: int) -> None:
    graph = lowered_linears(fakes, rows, lambda linear, ws: tuple(map(linear, ws)), count)
    if rows == 1:
        (kernel,) = kernels(graph)
        given = kernel.kwargs["kwargs"]
        columns = [given[f"y_{i}"].meta["val"].shape[1] for i in range(count)]
        assert columns == [32 * (i + 1) for i in range(count)]
    else:
        assert counts(graph) == [count]


def test_more_than_a_launch_takes_are_one_call(fakes: FakeTensorMode) -> None:
    graph = lowered_linears(fakes, 4, lambda linear, ws: tuple(map(linear, ws)), 5)
    assert counts(graph) == [5]
    graph = lowered_linears(fakes, 1, lambda linear, ws: tuple(map(linear, ws)), 5)
    assert len(kernels(graph)) == 2


def test_the_call_itself_is_decomposed_where_no_kernel_is(fakes: FakeTensorMode) -> None:
    tensors = Operands(fakes, 4, device="cpu").tensors

    def linears(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor) -> Any:
        weights, scales = [w, w], [ws, ws]
        return tuple(
            ops.few_rows_mx_linears(x, xs, weights, scales, [None, None], NAME, NAME, BF16)
        )

    graph = lowered(linears, *tensors)
    assert_dense(graph)
    assert targets(graph).count(aten.mm.default) == 2 and operator.getitem not in targets(graph)


def test_what_weights_are_made_of_moves_before_the_first(fakes: FakeTensorMode) -> None:
    """As libraries' scales, which are cut out of those of native matmuls right before a linear."""

    def block(linear: Any, weights: Any) -> Any:
        return tuple(linear((w, (s.view(torch.uint8) ^ 1).view(s.dtype))) for w, s in weights)

    assert counts(lowered_linears(fakes, 4, block)) == [3]


def test_weights_made_of_results_are_calls_of_their_own(fakes: FakeTensorMode) -> None:
    def of_first(linear: Any, weights: Any) -> Any:
        first = linear(weights[0])
        return first, linear(computed(first, weights[1])), linear(weights[2])

    def of_second(linear: Any, weights: Any) -> Any:
        first, second = linear(weights[0]), linear(weights[1])
        return first, second, linear(computed(second, weights[2]))

    assert sorted(counts(lowered_linears(fakes, 4, of_first))) == [1, 2]
    assert counts(lowered_linears(fakes, 4, of_second)) == [2, 1]


def test_those_with_a_bias_are_a_call_of_their_own(fakes: FakeTensorMode) -> None:
    def block(linear: Any, weights: Any) -> Any:
        bias = weights[0][0].new_zeros(64, dtype=BF16)
        return linear(weights[0]), linear(weights[1], bias), linear(weights[2])

    graph = lowered_linears(fakes, 4, block)
    assert sorted(counts(graph)) == [1, 2]


def test_those_of_two_xs_are_two_calls(fakes: FakeTensorMode) -> None:
    """Interleaved, and one's weight behind what the other computes."""
    tensors = [t for rows in (4, 5) for t in Operands(fakes, rows).tensors]

    def block(a: Tensor, a_s: Tensor, w: Tensor, ws: Tensor, *b: Tensor) -> Any:
        def linear(x: Tensor, xs: Tensor, scales: Tensor) -> Tensor:
            return ops.mx_linear(x, xs, w, scales, None, NAME, NAME, BF16)

        of_a, of_b = linear(a, a_s, ws), linear(b[0], b[1], ws)
        _, scales = computed(of_b, (w, ws))
        return of_a, of_b, linear(b[0], b[1], ws), linear(a, a_s, scales)

    graph = lowered(block, *tensors)
    assert sorted(counts(graph)) in ([1, 1, 2], [2, 2])


def _on_ada(mode: FakeTensorMode) -> fx.Graph:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(coverage, "capability", lambda device: (8, 9))
        return lowered_linear(Operands(mode, 4))


DENSE: dict[str, tuple[Callable[[FakeTensorMode], fx.Graph], str]] = {
    "many rows": (lambda m: lowered_linear(Operands(m, 33)), "33 rows"),
    "no rows": (lambda m: lowered_linear(Operands(m, 0)), "there are no rows"),
    "dtype": (lambda m: lowered_linear(Operands(m, 4), dtype=torch.float16), "torch.float16 is"),
    "elements": (lambda m: lowered_linear(Operands(m, 4, "mxfp8 e5m2")), "e5m2"),
    "4 bits": (lambda m: lowered_linear(Operands(m, 4, "mxfp4")), "mxfp4 e2m1"),
    "format": (lambda m: lowered_linear(Operands(m, 4, "mxfp6")), "mxfp6 e2m3"),
    "block": (lambda m: lowered_linear(Operands(m, 4, "mxfp8 e4m3fn rceil block 64")), "block 64"),
    "width": (lambda m: lowered_linear(Operands(m, 4, width=96)), "rows of 96 elements"),
    "device": (lambda m: lowered_linear(Operands(m, 4, device="cpu")), "on cpu"),
    "nvfp4": (lambda m: lowered_linear(Operands(m, 4, "nvfp4")), "nvfp4 e2m1"),
    "chip": (lambda m: _on_ada(m), "compute capability (8, 9)"),
}


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_everything_else_is_widened_with_a_reason(
    fakes: FakeTensorMode, case: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = case
    with caplog.at_level(logging.DEBUG, logger="mxnorm_pass.passes.lower_mx_linears"):
        assert_dense(make(fakes))
    assert any(reason in record.getMessage() for record in caplog.records), caplog.text


@pytest.mark.parametrize("rows", [4, 33])
def test_the_norms_kernel_writes_what_linears_read(fakes: FakeTensorMode, rows: int) -> None:
    weights = [t for seed in range(2) for t in Operands(fakes, rows).tensors[2:]]
    name = SPEC.format.name

    def block(x: Tensor, *weights: Tensor) -> Any:
        values, scales, _ = ops.norm_cast(x, None, None, None, *SPEC.arguments())
        pairs = zip(weights[::2], weights[1::2], strict=True)
        # As in the joint graph, where matmuls read matrices.
        matrix = (values.reshape(rows, -1), scales.reshape(rows, -1))
        return tuple(ops.mx_linear(*matrix, *w, None, name, name, BF16) for w in pairs)

    with fakes:
        x = torch.empty(1, rows, WIDTH, dtype=BF16, device="cuda")
    graph = lowered(block, x, *weights)
    (norm,) = kernels(graph)
    assert counts(graph) == ([2] if rows == 4 else []) and ops.dequantize not in targets(graph)
    wrote = {"values_ptr", "dequantized_ptr"} & set(norm.kwargs["kwargs"])
    assert wrote == {"values_ptr" if rows == 4 else "dequantized_ptr"}


@pytest.mark.parametrize("width", [WIDTH, 96])
def test_symbolic_rows_choose_at_each_call(fakes: FakeTensorMode, width: int) -> None:
    rows = tuple(fakes.from_tensor(torch.empty(6, 10)).shape)
    guards = len(fakes.shape_env.guards)
    graph = lowered_linear(Operands(fakes, rows, width=width))
    if width == 96:
        assert_dense(graph)
    else:
        assert counts(graph) == [1]
        assert ops.dequantize not in targets(graph)
    assert len(fakes.shape_env.guards) == guards


# Chips that do


@pytest.mark.usefixtures("blackwell")
@pytest.mark.parametrize("rows", [1, 300, (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_a_native_matmul(fakes: FakeTensorMode, rows: Any, name: str) -> None:
    graph = lowered_linear(Operands(fakes, rows, name))
    assert targets(graph).count(aten._scaled_mm.default) == 1
    assert "mxnorm_pass" not in str(graph)


@pytest.mark.usefixtures("blackwell")
def test_what_the_native_matmul_does_not_do(fakes: FakeTensorMode) -> None:
    rows = tuple(fakes.from_tensor(torch.empty(6)).shape)
    for operands in (
        Operands(fakes, 4, "mxfp8 e5m2"),
        Operands(fakes, 4, "mxfp4"),
        Operands(fakes, 4, columns=24),
        Operands(fakes, 0),
        Operands(fakes, rows),
    ):
        assert_dense(lowered_linear(operands))
    assert_dense(lowered_linear(Operands(fakes, 4), dtype=F32))


@pytest.mark.usefixtures("blackwell")
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_numbers_of_the_native_matmul(fakes: FakeTensorMode, name: str, has_bias: bool) -> None:
    """The graph on emulated matmuls of the CPU."""
    fmt, generator = block_format(name), torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, WIDTH, generator=generator).to(BF16) for n in (6, COLUMNS))
    a, b = quantize_alone(x, fmt), quantize_alone(weight, fmt)
    bias = torch.randn(COLUMNS, generator=generator).to(BF16)
    scales = [t for t in (a.tensor_scale, b.tensor_scale) if t is not None]
    # Emulated matmuls of MXFP8 add no bias.
    extra = [bias] if has_bias and scales else []
    given = [a.values, a.scales, b.values, b.scales, *scales, *extra]

    def linear(*tensors: Tensor) -> Tensor:
        both = tensors[4 : 4 + len(scales)]
        added = tensors[4 + len(scales) :] or (None,)
        return ops.mx_linear(*tensors[:4], *added, fmt.name, fmt.name, BF16, *both)

    with fakes:
        on_cuda = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in given]
    graph = lowered(linear, *on_cuda)
    owner = graph.owning_module
    got = Emulated(owner).run(*given)
    wide = a.dequantize(F32) @ b.dequantize(F32).t() + (bias if extra else 0)
    # A product and a scaled one are rounded to bfloat16.
    torch.testing.assert_close(got.to(F32), wide, rtol=2**-6, atol=2**-6 * float(wide.abs().max()))
    assert got.isfinite().all()


# At run time


def test_the_op_computes_the_reference_on_every_device() -> None:
    """So that inner="aot_eager" has the bits of functional."""
    assert ops.OPS[ops.mx_linear].call is None
