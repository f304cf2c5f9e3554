"""Linears without a module of their own: named after their weight, left alone where it is tied."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from name_ways import x
from pairwise import each_value, pairwise
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import MXNormWarning, Report
from mxnorm_pass.graph.weights import named_weights, weight_held_by

AOT: dict[str, Any] = {"inner": "aot_eager"}


class Product(nn.Module):
    """A norm and a product with a weight that the root has somewhere."""

    def __init__(self, product: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64, bias=False)
        self.w = nn.Parameter(torch.randn(64, 64))
        self.ws = nn.ParameterList([torch.randn(64, 64)])
        self.wte, self.product = nn.Embedding(96, 64), product
        self.lm_head = nn.Linear(64, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, self.norm(x))


class Within(nn.Module):
    def __init__(self, product: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = Product(product)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "w": lambda m, y: y @ m.w,
    "ws.0": lambda m, y: F.linear(y, m.ws[0]),
    "linear.weight": lambda m, y: F.linear(y, m.linear.weight),
    "wte.weight": lambda m, y: F.linear(y, m.wte.weight),
    "lm_head.weight": lambda m, y: F.linear(y, m.lm_head.weight),
}
TIED = ("wte.weight", "lm_head.weight")


def run(model: Any, *args: Any, train: bool = False, **options: Any) -> tuple[Report, list[str]]:
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mxnorm_pass.record() as report, torch.set_grad_enabled(train):
            torch.compile(model, backend="mxnorm", options={**AOT, **options})(*args)
    messages = [str(w.message) for w in caught if issubclass(w.category, MXNormWarning)]
    return report, [message for message in messages if "pattern" in message]


@each_value(
    name=list(PRODUCTS), prefix=["", "block."], train={"inference": False, "training": True}
)
def test_a_product_is_named_after_its_weight(name: str, prefix: str, train: bool) -> None:
    model = (Within if prefix else Product)(PRODUCTS[name])
    full = prefix + name
    (site,) = run(model, x(), train=train)[0].sites
    assert site.norm == f"{prefix}norm"
    if name in TIED:
        assert site.status == "skipped" and f"{full}, a linear" in site.detail
        assert run(model, x(), train=train, modules={"*": True})[0].skipped
    else:
        assert site.consumers == (full,)
    report, said = run(model, x(), train=train, modules={full: True})
    assert report.fused[0].consumers == (full,) and not said
    report, said = run(model, x(), train=train, modules={full: False})
    assert report.skipped[0].detail == f"consumers off: {full}" and not said


@pytest.mark.full
@each_value(options={"inductor": {}, "freezing": {"freezing": True}}, name=list(PRODUCTS))
def test_through_inductor(name: str, options: dict[str, Any]) -> None:
    model = Product(PRODUCTS[name])
    report, said = run(model, x(), inner="inductor", modules={name: True}, **options)
    assert report.fused[0].consumers == (name,) and not said
    if name in TIED:
        assert not run(model, x(), inner="inductor", **options)[0].fused


@pytest.mark.parametrize("name", PRODUCTS)
def test_of_an_exported_program(name: str) -> None:
    program = torch.export.export(Product(PRODUCTS[name]), (x(),))
    with mxnorm_pass.record() as report:
        mxnorm_pass.apply(program, {"modules": {name: True}})
    assert report.fused[0].consumers == (name,)


class Tied(nn.Module):
    """Logits by the embedding's weight, through ``head`` if that is a module."""

    def __init__(self, head: str = "", breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.norm = nn.Embedding(96, 64), nn.RMSNorm(64, eps=1e-6)
        self.head, self.breaks = head, breaks
        if head:
            self.add_module(head, nn.Linear(64, 96, bias=False))
            getattr(self, head).weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.wte(ids)
        if self.breaks:
            torch._dynamo.graph_break()
        y = self.norm(h)
        return getattr(self, self.head)(y) if self.head else F.linear(y, self.wte.weight)


IDS = torch.arange(16).reshape(2, 8)


@pairwise(head=["lm_head", ""], breaks=[False, True], train={"inference": False, "training": True})
def test_a_tied_head_is_left_alone_unless_named(head: str, breaks: bool, train: bool) -> None:
    model, name = Tied(head, breaks), head or "wte.weight"
    assert not run(model, IDS, train=train)[0].fused
    report, said = run(model, IDS, train=train, modules={name: True})
    assert [site.consumers for site in report.fused] == [(name,)] and not said


def test_a_tied_linear_with_a_module_goes_by_its_name() -> None:
    (site,) = run(Tied("decoder"), IDS)[0].fused
    assert site.consumers == ("decoder",)


def test_an_exported_tied_head_is_left_alone_unless_named() -> None:
    program = torch.export.export(Tied(), (IDS,))
    for modules, fused in (({}, 0), ({"wte.weight": True}, 1)):
        with mxnorm_pass.record() as report, warnings.catch_warnings():
            warnings.simplefilter("ignore", MXNormWarning)
            mxnorm_pass.apply(program, {"modules": modules})
        assert len(report.fused) == fused


class Weighted(nn.Module):
    """A linear of its own, whatever it calls its weight, or several in one module."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(64, 64)))

    def forward(self, x: Tensor) -> Tensor:
        return sum(x @ getattr(self, name) for name in self.names)


@pytest.mark.parametrize(
    ("weights", "consumers"),
    [
        (("weight",), ("1",)),
        (("kernel",), ("1",)),
        (("up", "gate"), ("1.up", "1.gate")),
    ],
)
def test_a_module_with_one_weight_is_the_linear(weights, consumers) -> None:
    model = nn.Sequential(nn.RMSNorm(64, eps=1e-6), Weighted(*weights))
    assert run(model, x())[0].fused[0].consumers == consumers
    with mxnorm_pass.record() as report:
        mxnorm_pass.apply(torch.export.export(model, (x(),)))
    assert report.fused[0].consumers == consumers


def test_a_parameter_that_is_a_variable() -> None:
    norm, head = nn.RMSNorm(64, eps=1e-6), nn.Parameter(torch.randn(64, 64))
    assert run(lambda x: norm(x) @ head, x())[0].fused[0].consumers == ("head",)


def test_explain_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, rows = Product(PRODUCTS["linear.weight"]), torch.empty(4, 64)
    (site,) = mxnorm_pass.explain(model, rows).sites
    assert site.consumers == ("linear.weight",)


def test_layers_with_a_rule_for_a_weight() -> None:
    model = nn.ModuleList(Product(PRODUCTS["w"]) for _ in range(2))
    options = {**AOT, "modules": {"1.w": {"p": 1}}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", MXNormWarning)
        warnings.simplefilter("ignore", mxnorm_pass.CalibrationWarning)
        mxnorm_pass.compile_layers(model, "?", options=options)
        with mxnorm_pass.record() as report, torch.no_grad():
            for layer in model:
                layer(x())
    assert [site.consumers for site in report.fused] == [("0.w",), ("1.w",)]


def test_weights_with_and_without_modules_at_hand_agree() -> None:
    model = Tied("lm_head")
    held = [("wte", model.wte, "weight"), ("lm_head", model.lm_head, "weight")]
    live = weight_held_by(held)
    named = named_weights(model.state_dict(keep_vars=True))["wte.weight"]
    assert live.names == named.names == ("wte.weight", "lm_head.weight")
    assert live.opt_in and named.opt_in
    assert live.linear_in("lm_head") == named.linear_in("lm_head") == "lm_head"
    assert live.linear_in("") == named.linear_in("") == "wte.weight"
