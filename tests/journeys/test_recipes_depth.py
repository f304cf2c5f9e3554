"""First and last layers that a recipe leaves in high precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import Recipe, build_llama, reference_of
from torch import Tensor, nn
from training import Gradients, assert_gradients_equal, gradients_of, train

import mxnorm_pass
from mxnorm_pass import MXNormWarning, Report
from mxnorm_pass.numerics.seed import draw_seed

HALF = {"base": "nvfp4", "high_precision_first": 0.25, "high_precision_last": 0.25}
NONE = {"base": "nvfp4", "high_precision_first": 0, "high_precision_last": 0}


class Block(nn.Module):
    """A residual block, cheap to compile."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64, bias=False)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.linear(self.norm(x))


class Stack(nn.Module):
    def __init__(self, breaks: bool = False, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def tokens() -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(1))


def options(**more: Any) -> dict[str, Any]:
    return {"inner": "aot_eager", "recipe": HALF, **more}


def step(function: Callable[..., Any], model: nn.Module) -> tuple[Report, Gradients]:
    """Of what is compiled, with every warning of this package an error."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model.zero_grad()
    with warnings.catch_warnings(), mxnorm_pass.record() as report:
        warnings.simplefilter("error", MXNormWarning)
        function(tokens()).square().sum().backward()
    return report, gradients_of(model)


def compiled(model: nn.Module, **more: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="mxnorm", options=options(**more))


def kept(report: Report) -> list[str]:
    linears = [linear for graph in report.graphs for linear in graph.linears]
    return [linear.name for linear in linears if linear.depth == "kept"]


def blocks(*numbers: int) -> list[str]:
    return [f"blocks.{i}.linear" for i in numbers]


@pytest.mark.full
def test_a_llama_is_that_of_functional() -> None:
    """Four layers, of which the last one is spared: 4 * 8 / 62 is nearest to 1."""
    model = build_llama(layers=4)
    torch.manual_seed(3)
    reference = reference_of(
        model,
        Recipe(
            training="nvfp4",
            seed=draw_seed(),
            cast={"format": "nvfp4"},
            norm={"block_size": 16},
        ),
    )
    reference.model.layers[3] = copy.deepcopy(model.model.layers[3])
    want, want_gradients = train(reference, reference)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="mxnorm", options=options(recipe="nvfp4"))
    torch.manual_seed(3)
    with mxnorm_pass.record() as report:
        got, gradients = train(fast, model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)
    projections = [f"self_attn.{n}_proj" for n in "qkvo"]
    projections += [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert kept(report) == [f"model.layers.3.{name}" for name in projections]
    norm = next(s for s in report.sites if s.norm == "model.layers.3.input_layernorm")
    assert norm.status == "skipped" and norm.near_miss is not None
    assert "in the last of the 4 layers of model.layers, which its" in norm.near_miss.found
    assert "in the last of the 4 layers of model.layers, which" in str(report)
    assert "recipe   15 linears: model.layers.{0..2}.self_attn.q_proj" in str(report)


@pytest.mark.parametrize(
    "more, numbers",
    [
        ({}, [0, 3]),
        ({"recipe": {**HALF, "high_precision_first": 0.5}}, [0, 1, 3]),
        ({"recipe": NONE}, []),
        ({"modules": {"blocks.3.*": {"recipe": "nvfp4"}}}, [0]),
        ({"modules": {"*.linear": {"p": 1}}}, [0, 3]),
    ],
)
def test_it_is_as_if_the_layers_were_named(more: dict[str, Any], numbers: list[int]) -> None:
    model = Stack()
    report, got = step(compiled(model, **more), model)
    assert kept(report) == blocks(*numbers)
    off = {**more.get("modules", {}), **{name: False for name in blocks(*numbers)}}
    named, want = step(compiled(model, **{**more, "recipe": NONE, "modules": off}), model)
    assert not kept(named) and len(named.fused) == len(report.fused) == 4 - len(numbers)
    assert_gradients_equal(got, want)


def test_layers_behind_graph_breaks_are_told_apart() -> None:
    """Dynamo captures the code of a class once for all that are treated alike."""
    model = Stack(breaks=True)
    _, got = step(compiled(model), model)
    off = {name: False for name in blocks(0, 3)}
    _, want = step(compiled(model, recipe=NONE, modules=off), model)
    assert_gradients_equal(got, want)
    _, all_cast = step(compiled(model, recipe=NONE), model)
    assert not torch.equal(got["blocks.0.linear.weight"], all_cast["blocks.0.linear.weight"])


def test_layers_that_are_compiled_one_by_one() -> None:
    model = Stack()
    mxnorm_pass.compile_layers(model, "blocks.*", options=options())
    report, _ = step(model, model)
    assert len(report.graphs) == 4 and kept(report) == blocks(0, 3)


def test_a_layer_by_hand_says_how_many_there_are() -> None:
    model = Stack()
    layer = compiled(model.blocks[3], prefix="blocks.3", num_layers={"blocks": 4})
    assert kept(step(layer, model)[0]) == blocks(3)


@pytest.mark.parametrize("prefix", ["blocks.0", "blocks.3", ""])
def test_a_layer_by_hand_without_that_is_cast_and_said_to_be(prefix: str) -> None:
    model = Stack()
    layer = compiled(model.blocks[0], prefix=prefix)
    torch._dynamo.reset()
    with pytest.warns(MXNormWarning, match="how many layers there are"):
        with mxnorm_pass.record() as report:
            layer(tokens()).sum().backward()
    (linear,) = report.graphs[0].linears
    assert linear.depth == "unknown" and linear.forward.startswith("nvfp4")
    assert "in every layer, as their number is not known" in str(report)
    assert Report.from_json(report.to_json()).graphs == report.graphs
    with warnings.catch_warnings():
        warnings.simplefilter("error", MXNormWarning)
        compiled(model.blocks[0], prefix=prefix, recipe=NONE)(tokens()).sum().backward()


def test_an_exported_program() -> None:
    with torch.no_grad():
        program = torch.export.export(Stack(), (tokens(),))
        with mxnorm_pass.record() as report:
            mxnorm_pass.apply(program, {"recipe": HALF})
    assert kept(report) == blocks(0, 3)
