"""Routers, one linear or a small MLP, are left alone; what a whole model chooses is no router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from matching import F32, TRAIN, WIDTH, expected_warnings, inputs
from pairwise import each_value
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import SkipReason

pytestmark = expected_warnings

Forward = Callable[[Any, Tensor], Any]


class Layer(nn.Module):
    """A norm, and linears of which ``read`` makes something; the norm feeds ``up`` and ``one``."""

    def __init__(self, read: Forward, experts: int = 32, vocabulary: int = 2048) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.inner = (nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.one = nn.Linear(WIDTH, experts)
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.bias = nn.Parameter(torch.rand(experts))
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self, x)


def consumers(read: Forward, train: bool = False, **sizes: int) -> set[str]:
    """Names of the linears that read the fused casts."""
    torch._dynamo.reset()
    with torch.set_grad_enabled(train):
        report = mxnorm_pass.explain(
            Layer(read, **sizes), inputs().requires_grad_(train), options={"inner": "aot_eager"}
        )
    assert {s.reason for s in report.skipped} <= {SkipReason.NO_MX_CAST}
    return {name for site in report.fused for name in site.consumers}


def route(logits: Tensor) -> Any:
    return logits.softmax(-1).topk(2)


ROUTERS: dict[str, Forward] = {
    "one linear": lambda m, x: route(m.gate(m.norm(x))),
    "two linears": lambda m, x: route(m.gate(F.gelu(m.up(m.norm(x))))),
    "three linears": lambda m, x: route(m.gate(F.silu(m.down(F.silu(m.up(m.norm(x))))))),
    "norm inside": lambda m, x: route(m.gate(m.inner(m.up(m.norm(x))).relu())),
    "gated": lambda m, x: route(m.gate(F.silu(m.up(m.norm(x))) * m.down(m.norm(x)))),
    "correction bias": lambda m, x: (m.gate(m.up(m.norm(x)).relu()).sigmoid() + m.bias).topk(2),
    "upcast": lambda m, x: route(m.gate(m.up(m.norm(x)).tanh()).to(F32)),
    "argmax": lambda m, x: m.gate(m.up(m.norm(x)).relu()).argmax(-1),
    "sort": lambda m, x: m.gate(m.up(m.norm(x)).relu()).sort(-1, descending=True),
    "maximum's index": lambda m, x: m.gate(m.up(m.norm(x)).relu()).softmax(-1).max(-1).indices,
    "noise": lambda m, x: route(m.gate(m.up(m.norm(x)).relu()) + x[..., :32].sin()),
    "groups": lambda m, x: (
        m.gate(m.up(m.norm(x)).relu()).unflatten(-1, (4, 8)).topk(2).values.sum(-1).topk(2)
    ),
    "whole vocabulary": lambda m, x: m.head(m.norm(x)).topk(5),
}


@each_value(read=ROUTERS, train={"inference": False, "training": True})
def test_router_is_left_alone(read: Forward, train: bool) -> None:
    assert consumers(read, train) == set()


# Each differs from a router in one place.
OTHERS: dict[str, tuple[Forward, set[str]]] = {
    "no choice": (lambda m, x: m.gate(F.gelu(m.up(m.norm(x)))).softmax(-1), {"up"}),
    "maximum alone": (lambda m, x: m.gate(F.gelu(m.up(m.norm(x)))).max(-1).values, {"up"}),
    "residual add between": (lambda m, x: route(m.gate(x + m.up(m.norm(x)))), {"up"}),
    "residual add of another": (
        lambda m, x: route(m.gate(x.sin() + m.up(m.norm(x)).relu())),
        {"up"},
    ),
    "next layer's router": (
        lambda m, x: route(m.gate(m.inner(x + m.down(m.up(m.norm(x)).relu())))),
        {"up"},
    ),
    "concatenation": (
        lambda m, x: route(m.gate(torch.cat([m.up(m.norm(x)), x], -1)[..., :WIDTH])),
        {"up"},
    ),
    "attention between": (
        lambda m, x: route(
            m.gate(F.scaled_dot_product_attention(m.up(m.norm(x)), m.down(m.norm(x)), x))
        ),
        {"up", "down"},
    ),
    "product of activations": (
        lambda m, x: (m.up(m.norm(x)) @ m.down(m.norm(x)).mT).topk(2),
        {"up", "down"},
    ),
    "sampling": (
        lambda m, x: m.head(m.inner(x + m.down(m.up(m.norm(x)).relu()))).topk(5),
        {"up"},
    ),
    "sampling without residual": (
        lambda m, x: m.head(m.down(m.up(m.norm(x)).relu())).softmax(-1).topk(5),
        {"up"},
    ),
    "convolution between": (
        lambda m, x: route(m.gate(F.conv1d(m.up(m.norm(x)).mT, m.down.weight[..., None]).mT)),
        {"up"},
    ),
    "chosen before": (
        lambda m, x: m.up(m.norm(x)).relu() * x.topk(1).values,
        {"up"},
    ),
}


@each_value(case=OTHERS, train=TRAIN)
def test_other_linears_are_no_router(case: tuple[Forward, set[str]], train: bool) -> None:
    read, fused = case
    assert consumers(read, train) == fused


def test_a_small_vocabulary_is_chosen_by_a_whole_model() -> None:
    """Behind a residual add, a token of few is no expert."""
    read = OTHERS["sampling"][0]
    assert consumers(read, vocabulary=64) == {"up"}


def test_the_router_beside_other_linears() -> None:
    def read(m: Layer, x: Tensor) -> Any:
        y = m.norm(x)
        return route(m.gate(F.gelu(m.up(y)))), m.down(y)

    assert consumers(read) == {"down"}


def test_a_router_that_is_named_is_cast() -> None:
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "modules": {"up": True}}
    report = mxnorm_pass.explain(Layer(ROUTERS["two linears"]), inputs(), options=options)
    assert [site.consumers for site in report.fused] == [("up",)]


def test_the_report_calls_all_linears_of_the_router_so() -> None:
    torch._dynamo.reset()
    model = Layer(ROUTERS["two linears"])
    (site,) = mxnorm_pass.explain(model, inputs(), options={"inner": "aot_eager"}).sites
    assert "up, a router in f32 that is cast only if `modules` names it" in site.detail
