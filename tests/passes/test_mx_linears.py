"""Which linears become one op on MX operands, and which stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import some
from reference import build_llama, quantize_with_torchao, token_ids
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

import mxnorm_pass
from mxnorm_pass import functional, ops
from mxnorm_pass.graph.cleanup import remove_dead
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.joint import GraphFacts, run_pass
from mxnorm_pass.passes.mx_linears import write_mx_linears
from mxnorm_pass.passes.verify.float64 import Float64Interpreter

BF16, F32 = torch.bfloat16, torch.float32
aten = torch.ops.aten
NAME = "mxfp8 e4m3fn rceil block 32"
LINEAR = "mxnorm_pass.mx_linear.default"
ELEMENTS = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}


def rows(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fake_quantized(x: Tensor, name: str = NAME, dtype: torch.dtype | None = None) -> Tensor:
    scale = (ops.tensor_scale(x),) if name.startswith("nvfp4") else ()
    values, scales = ops.cast(x, name, *scale)
    return ops.dequantize(values, scales, name, dtype or x.dtype, *scale)


def written(function: Callable[..., Any], *args: Tensor) -> tuple[int, fx.GraphModule]:
    """How many linears become ops; the rewritten graph, which gives the same bits."""
    gm = make_fx(function, tracing_mode="fake")(*args)
    want = gm(*args)
    count = len(write_mx_linears(gm.graph, MXNormConfig()))
    remove_dead(gm.graph)
    gm.graph.lint()
    gm.recompile()
    got = gm(*args)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)
    return count, gm


# What becomes an op


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return fake_quantized(x) @ fake_quantized(weight).t()


def test_matrices() -> None:
    count, gm = written(linear, rows(4, 64), rows(32, 64, seed=1))
    assert count == 1
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert ops.dequantize not in targets and aten.mm.default not in targets


@pytest.mark.parametrize("name", ["mxfp8 e5m2", "mxfp6", "mxfp6 e3m2", "mxfp4", "nvfp4"])
def test_formats(name: str) -> None:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(fake_quantized(x, name), fake_quantized(weight, name).t())

    count, gm = written(model, rows(4, 64, dtype=F32), rows(32, 64, dtype=F32, seed=1))
    assert count == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.mx_linear)
    assert node.args[7] is F32 and len(node.args) == (10 if name == "nvfp4" else 8)


def test_more_dimensions_and_views() -> None:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        y = torch.mm(fake_quantized(x).view(-1, 64), fake_quantized(weight).t().t().mT)
        return y.view(2, 3, 32)

    count, gm = written(model, rows(2, 3, 64), rows(32, 64, seed=1))
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.mx_linear)
    assert count == 1 and node.meta["val"].shape == (6, 32)
    assert node.args[0].args[0].meta["val"].shape == (2, 3, 64)


def test_result_that_is_read_as_a_matrix() -> None:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(fake_quantized(x).view(-1, 64), fake_quantized(weight).t()) + 1

    assert written(model, rows(2, 3, 64), rows(32, 64, seed=1))[0] == 1


def test_addmm_and_its_bias() -> None:
    def model(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, fake_quantized(x), fake_quantized(weight).t())

    count, gm = written(model, rows(4, 64), rows(32, 64, seed=1), rows(32, seed=2))
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.mx_linear)
    assert count == 1 and node.args[4].op == "placeholder"


def test_other_readers_keep_the_dequantisation() -> None:
    def model(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, wide = fake_quantized(x), fake_quantized(weight)
        return x @ wide.t(), wide * 2, x.sum(-1)

    count, gm = written(model, rows(4, 64), rows(32, 64, seed=1))
    assert count == 1
    assert len(gm.graph.find_nodes(op="call_function", target=ops.dequantize)) == 2


def spelled_out(x: Tensor, elements: torch.dtype, dtype: torch.dtype = BF16) -> Tensor:
    """torchao's cast and dequantisation."""
    scales, values = to_mx(x, elements, 32, ScaleCalculationMode.FLOOR)
    return to_dtype(values, scales, elements, 32, dtype)


def test_what_a_library_spells_out() -> None:
    def model(x: Tensor, weight: Tensor) -> Tensor:
        elements = torch.float8_e4m3fn
        return torch.mm(spelled_out(x, elements), spelled_out(weight, elements).t())

    count, gm = written(model, rows(4, 64), rows(32, 64, seed=1))
    assert count == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.mx_linear)
    assert {t.meta["val"].dtype.itemsize for t in node.args[:4]} == {1}


def test_bytes_as_scales() -> None:
    """As where no tensor says that its bytes are E8M0."""

    def model(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        factor = torch.exp2(scales.to(F32) - 127)
        factor = torch.where(scales == 255, float("nan"), factor)
        # Not that of byte 0, which float32 and bfloat16 hold as a subnormal number.
        wide = values.to(BF16).view(-1, 32) * factor.to(BF16).view(-1, 1)
        return fake_quantized(x) @ wide.view(32, 64).t()

    values, scales = functional.mx_cast(rows(32, 64, seed=1))
    count, gm = written(model, rows(4, 64), values, scales.view(torch.uint8))
    assert count == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=ops.mx_linear)
    assert node.args[3].target is aten.view.dtype


# What stays


def transposed_otherwise(x: Tensor, weight: Tensor) -> Tensor:
    return fake_quantized(x) @ fake_quantized(weight)


def blocks_across(x: Tensor, weight: Tensor) -> Tensor:
    """The weight's blocks are along its columns, which are not what the matmul contracts."""
    return fake_quantized(x) @ fake_quantized(weight.t().contiguous()).t().t()


def other_rows(x: Tensor, weight: Tensor) -> Tensor:
    return fake_quantized(x).view(-1, 32) @ fake_quantized(weight).view(-1, 32).t()


def only_the_weight(x: Tensor, weight: Tensor) -> Tensor:
    return x @ fake_quantized(weight).t()


def only_the_activation(x: Tensor, weight: Tensor) -> Tensor:
    return fake_quantized(x) @ weight.t()


def rounded_once_more(x: Tensor, weight: Tensor) -> Tensor:
    return fake_quantized(x, dtype=F32).to(BF16) @ fake_quantized(weight).t()


def changed_between(x: Tensor, weight: Tensor) -> Tensor:
    return (fake_quantized(x) * 2) @ fake_quantized(weight).t()


def batches(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(fake_quantized(x)[None], fake_quantized(weight).t()[None])


def bias_per_row(x: Tensor, weight: Tensor) -> Tensor:
    bias = x[:, :1].expand(-1, 64)
    return torch.addmm(bias, fake_quantized(x), fake_quantized(weight).t())


def with_factors(x: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(x[0], fake_quantized(x), fake_quantized(weight).t(), beta=2)


def scale_of_the_next_block(x: Tensor, weight: Tensor) -> Tensor:
    values, scales = ops.cast(weight, NAME)
    wide = values.to(BF16).view(-1, 32) * scales.to(BF16).view(-1, 1).roll(1, 0)
    return fake_quantized(x) @ wide.view(weight.shape).t()


def scale_squared(x: Tensor, weight: Tensor) -> Tensor:
    values, scales = ops.cast(weight, NAME)
    factor = scales.to(BF16).view(-1, 1)
    wide = values.to(BF16).view(-1, 32) * (factor * factor)
    return fake_quantized(x) @ wide.view(weight.shape).t()


STAYS = [
    transposed_otherwise, blocks_across, other_rows, only_the_weight, only_the_activation,
    rounded_once_more, changed_between, batches, bias_per_row, with_factors,
    scale_of_the_next_block, scale_squared,
]  # fmt: skip


@pytest.mark.parametrize("model", STAYS, ids=lambda f: f.__name__)
def test_stays(model: Callable[..., Any]) -> None:
    assert written(model, rows(4, 64), rows(64, 64, seed=1))[0] == 0


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_in_float64_casts_are_the_identity(name: str) -> None:
    def model(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, fake_quantized(x, name), fake_quantized(weight, name).t())

    args = rows(4, 64), rows(32, 64, seed=1), rows(32, seed=2)
    count, gm = written(model, *args)
    assert count == 1
    result = gm.graph.output_node().args[0]
    x, weight, bias = wide = [t.double() for t in args]
    (got,) = Float64Interpreter(gm.graph, MXNormConfig()).run([result], wide)
    torch.testing.assert_close(got, x @ weight.t() + bias)


def test_graphs_that_are_differentiated_stay() -> None:
    def traced() -> fx.GraphModule:
        return make_fx(linear, tracing_mode="fake")(rows(4, 64), rows(32, 64, seed=1))

    for facts in (GraphFacts(differentiated=True), GraphFacts(tensor_subclass="DTensor")):
        gm = traced()
        assert LINEAR not in run_pass(gm.graph, MXNormConfig(), facts=facts).graph.ops_after
    gm = traced()
    next(iter(gm.graph.find_nodes(op="call_function", target=aten.t.default))).meta[
        "partitioner_tag"
    ] = "is_backward"
    assert not write_mx_linears(gm.graph, MXNormConfig())
    result = run_pass(traced().graph, MXNormConfig(), facts=GraphFacts())
    assert result.graph.ops_after[LINEAR] == 1


# Whole models


def explained(model: nn.Module, *args: Tensor, **options: Any) -> mxnorm_pass.Graph:
    with torch.no_grad():
        (graph,) = mxnorm_pass.explain(model, *args, use_cache=False, options=options).graphs
    return graph


@some(
    ["mxfp8-torch.bfloat16-norm-fed", "nvfp4-torch.float32-all"],
    format=["mxfp8", "mxfp4", "nvfp4"],
    dtype=[BF16, F32],
    quantize=["norm-fed", "all"],
)
def test_every_cast_linear_of_a_plain_llama(format: str, dtype: Any, quantize: str) -> None:
    model = build_llama(dtype, layers=1)
    graph = explained(model, token_ids(), format=format, quantize=quantize)
    assert graph.ops_after[LINEAR] == (7 if quantize == "all" else 5)
    assert "mxnorm_pass.dequantize.default" not in graph.ops_after


@pytest.mark.parametrize("elements", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("estimator", ["exact", "mxnorm"])
def test_every_linear_of_a_torchao_llama(elements: torch.dtype, estimator: str) -> None:
    model = quantize_with_torchao(build_llama(BF16, layers=1), elements=elements)
    off = {"*.o_proj": False}
    graph = explained(model, token_ids(), estimator=estimator)
    assert graph.ops_after[LINEAR] == 7
    assert "mxnorm_pass.dequantize.default" not in graph.ops_after
    assert explained(model, token_ids(), estimator=estimator, modules=off).ops_after[LINEAR] == 6
    for site in graph.sites[:2]:
        assert site.after is not None
        linears = [node for node in site.after.nodes if node.part == "linear" and node.bytes]
        assert [node.op for node in linears] == [LINEAR] * len(site.consumers)


@pytest.mark.parametrize("dynamic", [(1,), (0, 1)], ids=str)
def test_symbolic_rows(dynamic: tuple[int, ...]) -> None:
    model, ids = quantize_with_torchao(build_llama(BF16, layers=1)), token_ids()
    torch._dynamo.mark_dynamic(ids, dynamic)
    torch._dynamo.reset()
    with torch.no_grad(), mxnorm_pass.record() as report:
        compiled = torch.compile(
            model, backend="mxnorm", options={"inner": "aot_eager", "estimator": "exact"}
        )
        for tokens in (ids, token_ids(*(5 if d in dynamic else ids.shape[d] for d in (0, 1)))):
            got, want = (m(tokens, use_cache=False).logits for m in (compiled, model))
            assert torch.equal(got, want)
    (graph,) = report.graphs
    assert graph.ops_after[LINEAR] == 7


class Converted(nn.Module):
    """A linear of a library's dequantised weight, in Python as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.scales = map(nn.Buffer, functional.mx_cast(rows(32, 64, seed=1)))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.mx_dequantize(*functional.mx_cast(x), BF16)
        return F.linear(x, functional.mx_dequantize(self.values, self.scales, BF16))


def test_a_graph_without_norms() -> None:
    x, model = rows(4, 64), Converted()
    torch._dynamo.reset()
    with torch.no_grad(), mxnorm_pass.record() as report:
        compiled = torch.compile(model, backend="mxnorm", options={"inner": "aot_eager"})
        with pytest.warns(mxnorm_pass.MXNormWarning, match="no RMSNorm"):
            got = compiled(x)
    assert torch.equal(got, model(x))
    assert report.graphs[0].ops_after[LINEAR] == 1
