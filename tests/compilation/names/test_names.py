"""Names are those of ``named_modules()`` of what was compiled, whatever the way to a module."""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Callable
from typing import Any

import name_ways_function
import name_ways_module
import pytest
import torch
from architectures import models
from name_ways import Block, LateBlock, Options, Pair, Stack, breaking, compiled, logged, x
from pairwise import some
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Calibration, MXNormWarning, Report
from mxnorm_pass.compilation.names import graph_names
from mxnorm_pass.compilation.names.holders import HolderSearch

AOT: Options = {"inner": "aot_eager"}
WAYS = {**name_ways_module.WAYS, **name_ways_function.WAYS}


def run(function: Callable[..., Any], *args: Any) -> tuple[Report, list[str]]:
    """The report, and what was said of patterns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mxnorm_pass.record() as report, torch.no_grad():
            function(*args)
    messages = [str(w.message) for w in caught if issubclass(w.category, MXNormWarning)]
    return report, [message for message in messages if "pattern" in message]


def statuses(report: Report) -> dict[str, str]:
    return {site.norm: site.status for site in report.sites}


def test_no_way_hides_another() -> None:
    assert len(WAYS) == len(name_ways_module.WAYS) + len(name_ways_function.WAYS) > 70


@some(list(WAYS)[::2], name=list(WAYS))
def test_a_way_to_reach_a_module(name: str) -> None:
    way = WAYS[name]
    function, args = way.build({**AOT, "modules": {way.off: False}})
    report, said = run(function, *args)
    assert sorted(site.norm for site in report.sites) == sorted(way.names)
    off = {norm for norm, status in statuses(report).items() if status == "skipped"}
    assert off == set(fnmatch.filter(way.names, way.off)) and len(off) == 1
    assert all(s.reason is mxnorm_pass.SkipReason.DISABLED for s in report.skipped)
    assert not said


def explained(
    name: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Report]:
    model = models.build(name, dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", MXNormWarning)
        inputs = models.example_inputs(model)
        return model, mxnorm_pass.explain(model, **inputs, options=options)


@pytest.mark.full
@pytest.mark.parametrize("name", list(models.ARCHITECTURES))
def test_names_of_every_architecture(name: str) -> None:
    model, report = explained(name)
    names = {n for site in report.sites for n in (site.norm, *site.consumers)}
    assert report.sites and names <= {name for name, _ in model.named_modules()}


@some(["Llama"], name=["Llama", "Qwen3", "Gemma-3", "Mixtral"])
def test_a_layer_of_a_model_that_decorates_its_forward(name: str) -> None:
    # transformers 5.0 compiles its experts in bf16 only.
    _, whole = explained(name, torch.bfloat16)
    model = models.build(name, torch.bfloat16)
    options = {**AOT, "modules": {"model.layers.0.*": False}}
    report, said = run(lambda: compiled(model, options)(**models.example_inputs(model)))
    first = {s.norm for s in whole.fused if s.norm.startswith("model.layers.0.")}
    assert first and not said
    assert {s.norm for s in report.fused} == {s.norm for s in whole.fused} - first
    assert [s.norm for s in report.sites] == [s.norm for s in whole.sites]


# What else uses names


@pytest.mark.full
def test_calibrate_and_compare_an_unmodified_llama() -> None:
    model = models.build("Llama")
    inputs = [models.example_inputs(model)["input_ids"].roll(i, 1) for i in range(4)]
    batches = [{"input_ids": ids} for ids in inputs]
    calibration = mxnorm_pass.calibrate(model, batches, max_loss_increase=1e9)
    norms = [site.norm for site in explained("Llama")[1].fused]
    assert list(calibration.weights) == norms
    comparison = mxnorm_pass.compare(model, inputs[0], {"modules": {"model.layers.0.*": False}})
    assert [site.norm for site in comparison.sites] == norms[2:]


class Decorated(Block):
    @logged
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Decorated, breaking, LateBlock])
def test_layers_that_are_compiled_one_by_one(kind: Callable[[], nn.Module]) -> None:
    model = Stack(kind)
    options = {**AOT, "modules": {"layers.1.norm": False}}
    mxnorm_pass.compile_layers(model, "layers.*", options=options)
    report, said = run(model, x())
    assert statuses(report) == {"layers.0.norm": "fused", "layers.1.norm": "skipped"}
    assert not said


def test_a_channel_order_behind_a_decorated_forward() -> None:
    class Root(Pair):
        @logged
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Root()
    for block in (model.first, model.second):
        nn.init.uniform_(block.norm.weight, 0.5, 1.5)
    order = torch.arange(63, -1, -1)
    gains = {f"{n}.norm.weight": getattr(model, n).norm.weight for n in ("first", "second")}
    calibration = Calibration(
        {"first.norm": torch.ones(2), "second.norm": torch.ones(2)},
        order=order,
        channels={name: gain.detach()[order] for name, gain in gains.items()},
    )
    with pytest.raises(ValueError, match="permute_channels"):
        compiled(model, {**AOT, "calibration": calibration})(x())


@pytest.mark.full
def test_inductors_cache_tells_roots_apart() -> None:
    """One graph, whose roots have other names: a rule may speak of one of them alone."""
    block, options = Block(), {"modules": {"first.*": False}}

    def pair(function: Callable[..., Tensor], *args: Any) -> dict[str, str]:
        torch._dynamo.reset()
        return statuses(run(compiled(function, options), *args)[0])

    assert pair(lambda first, other, x: first(x) + other(x), block, Block(), x()) == {
        "first.norm": "skipped",
        "other.norm": "fused",
    }
    assert pair(lambda model, other, x: model(x) + other(x), block, Block(), x()) == {
        "model.norm": "fused",
        "other.norm": "fused",
    }


# Patterns and graphs


def test_a_pattern_for_another_graph_does_not_warn() -> None:
    class Root(Pair):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    for off in ("first.norm", "second.*"):
        torch._dynamo.reset()
        assert not run(compiled(Root(), {**AOT, "modules": {off: False}}), x())[1]
    torch._dynamo.reset()
    # Once for each graph, which has other names that are near.
    _, said = run(compiled(Root(), {**AOT, "modules": {"second.nrm": False}}), x())
    assert len(said) == 2 and "second.norm" in said[1]


def test_layers_that_are_treated_alike_share_a_graph() -> None:
    """They are captured once; with a rule for one of them, twice."""
    for modules, graphs in (({}, 1), ({"layers.1.norm": {"p": 1}}, 2), ({"*": {"p": 1}}, 1)):
        torch._dynamo.reset()
        model = Stack(LateBlock)
        model.layers.extend([LateBlock(), LateBlock()])
        report, _ = run(compiled(model, {**AOT, "modules": modules}), x())
        assert [g.sites[0].norm for g in report.graphs] == ["layers.0.norm", "layers.1.norm"][
            :graphs
        ]


def test_each_layer_behind_a_graph_break_has_its_own_calibration() -> None:
    weights = {f"layers.{i}.norm": torch.tensor([1.0, i]) for i in range(2)}
    outputs = []
    for make in (Block, breaking):
        torch.manual_seed(0)
        torch._dynamo.reset()
        with torch.no_grad():
            options = {**AOT, "calibration": Calibration(weights)}
            outputs.append(compiled(Stack(make), options)(x()))
    assert torch.equal(*outputs)


def test_a_guard_of_dynamos_where_it_takes_none_of_ours(monkeypatch) -> None:
    """Then the layers are told apart one by one."""
    manager = torch._C._dynamo.guards.GuardManager
    add = manager.add_lambda_guard

    def refuse(self: Any, function: Any, said: list[str], *args: Any) -> None:
        if "mxnorm" in said[0]:
            raise TypeError("no such arguments")
        add(self, function, said, *args)

    monkeypatch.setattr(manager, "add_lambda_guard", refuse)
    way = name_ways_module.WAYS["break_in_a_helper_of_layers"]
    function, args = way.build({**AOT, "modules": {way.off: False}})
    report, _ = run(function, *args)
    assert statuses(report) == {"layers.0.norm": "skipped", "layers.1.norm": "fused"}


def test_without_a_call_names_are_spelled_as_by_dynamo(monkeypatch, caplog) -> None:
    monkeypatch.setattr(graph_names, "current_call", lambda: None)
    with caplog.at_level(logging.DEBUG, logger="mxnorm_pass"):
        report, _ = run(compiled(Pair(), AOT), x())
    assert list(statuses(report)) == ["first.norm", "second.norm"]
    assert report.fused[0].consumers == ("first.linear",)
    assert any("in no module that is known" in r.getMessage() for r in caplog.records)


def test_the_search_runs_no_code_of_the_objects_that_it_meets() -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("this must not run")

    class Lazy(dict):
        items = keys = values = __iter__ = __getitem__ = fail

    class Shy:
        model = property(fail)
        __getattr__ = __eq__ = __hash__ = __len__ = fail

    block = Block()
    lazy, shy = Lazy(), Shy()
    dict.__setitem__(lazy, "block", block)
    search = HolderSearch()
    search.call(lambda x: (lazy, shy.model), (), {})
    search.run()
    assert search.found == [("lazy.block", block)]
