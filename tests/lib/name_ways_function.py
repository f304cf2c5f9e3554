"""Ways in which a compiled function reaches the modules that it runs."""

from __future__ import annotations

import functools
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from name_ways import (
    BLOCKS,
    POLICY,
    Block,
    Built,
    LateBlock,
    Options,
    Pair,
    Stack,
    Way,
    breaking,
    compiled,
    logged,
    register,
    unnamed,
    x,
)
from torch import Tensor, nn

WAYS: dict[str, Way] = {}
way = functools.partial(register, WAYS)


# One root has bare names


@way(BLOCKS, "second.norm")
def parameter(options: Options) -> Built:
    return compiled(lambda model, x: model(x), options), (Pair(), x())


@way(BLOCKS, "second.norm")
def closure(options: Options) -> Built:
    model = Pair(breaking)
    return compiled(lambda x: model(x), options), (x(),)


pair = Pair()


@way(BLOCKS, "second.norm")
def one_global(options: Options) -> Built:
    return compiled(lambda x: pair(x), options), (x(),)


@way(BLOCKS, "second.norm")
def default_of_a_parameter(options: Options) -> Built:
    def step(x: Tensor, model: nn.Module = Pair()) -> Tensor:  # noqa: B008
        return model(x)

    return compiled(step, options), (x(),)


@way(BLOCKS, "second.norm")
def partial_of_a_model(options: Options) -> Built:
    return compiled(functools.partial(Pair()), options), (x(),)


@way(("0.norm", "1.norm"), "1.norm")
def module_list(options: Options) -> Built:
    blocks = nn.ModuleList([Block(), Block()])

    def step(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    return compiled(step, options), (x(),)


@way(("a.norm", "b.norm"), "b.norm")
def module_dict(options: Options) -> Built:
    blocks = nn.ModuleDict({"a": Block(), "b": Block()})
    return compiled(lambda x: blocks["a"](x) + blocks["b"](x), options), (x(),)


@way(BLOCKS, "second.norm")
def model_and_a_part_of_it(options: Options) -> Built:
    model = Pair()
    first = model.first
    return compiled(lambda x: model.second(first(x)), options), (x(),)


@way(BLOCKS, "second.norm")
def loss_beside_a_model(options: Options) -> Built:
    model, loss = Pair(), nn.MSELoss()
    return compiled(lambda x: loss(model(x), x), options), (x(),)


@way(("norm",), "norm")
def layers_without_a_model(options: Options) -> Built:
    norm, linear = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64)
    return compiled(lambda x: linear(norm(x)), options), (x(),)


class Trainer:
    """A plain object with two models and methods that run them."""

    def __init__(self) -> None:
        self.policy, self.reference = Block(), Block()

    def on_policy(self, x: Tensor) -> Tensor:
        return self.policy(x)

    def loss(this, x: Tensor) -> Tensor:
        return this.policy(x) - this.by_reference(x)

    def by_name(self, x: Tensor) -> Tensor:
        for name in ("policy", "reference"):
            x = getattr(self, name)(x)
        return x

    @torch.no_grad()
    def by_reference(self, x: Tensor) -> Tensor:
        return self.reference(x)


@way(("norm",), "norm")
def method_that_runs_one_of_two(options: Options) -> Built:
    return compiled(Trainer().on_policy, options), (x(),)


# Several roots have the place that holds each in front


@way(POLICY, "reference.norm")
def method_that_runs_both(options: Options) -> Built:
    return compiled(Trainer().loss, options), (x(),)


@way(POLICY, "policy.norm")
def method_that_asks_by_name(options: Options) -> Built:
    return compiled(Trainer().by_name, options), (x(),)


@way(POLICY, "reference.norm")
def decorated_method_of_a_plain_object(options: Options) -> Built:
    class Compiled(Trainer):
        loss = torch.compile(Trainer.loss, backend="mxnorm", options=options)

    return Compiled().loss, (x(),)


@way(POLICY, "reference.norm")
def callable_object(options: Options) -> Built:
    class Callable(Trainer):
        def __call__(self, x: Tensor) -> Tensor:
            return self.loss(x)

    return compiled(Callable(), options), (x(),)


@way(("trainer.policy.norm", "trainer.reference.norm"), "trainer.policy.norm")
def object_in_an_object(options: Options) -> Built:
    class Run:
        def __init__(self) -> None:
            self.trainer = Trainer()

        def step(self, x: Tensor) -> Tensor:
            return self.trainer.loss(x)

    return compiled(Run().step, options), (x(),)


@way(POLICY, "reference.norm")
def slots_and_class_methods(options: Options) -> Built:
    class Slots:
        __slots__ = ("reference",)
        policy = Block()

        def __init__(self) -> None:
            self.reference = Block()

        def loss(self, x: Tensor) -> Tensor:
            return self.policy(x) - self.reference(x)

    return compiled(Slots().loss, options), (x(),)


def difference(policy: nn.Module, reference: nn.Module, x: Tensor) -> Tensor:
    return policy(x) - reference(x)


@way(POLICY, "reference.*")
def two_parameters(options: Options) -> Built:
    return compiled(difference, options), (Block(), Block(), x())


@way(POLICY, "policy.*")
def two_keywords(options: Options) -> Built:
    step, models = compiled(difference, options), {"policy": Block(), "reference": Block()}
    return lambda x: step(x=x, **models), (x(),)


@way(POLICY, "reference.norm")
def two_parameters_behind_a_decorator(options: Options) -> Built:
    return compiled(logged(difference), options), (Block(), Block(), x())


@way(("args.0.norm", "args.1.norm"), "args.1.norm")
def two_parameters_behind_a_decorator_without_wraps(options: Options) -> Built:
    return compiled(unnamed(difference), options), (Block(), Block(), x())


@way(POLICY, "reference.norm")
def positional_partial(options: Options) -> Built:
    return compiled(functools.partial(difference, Block(), Block()), options), (x(),)


@way(POLICY, "reference.norm")
def keyword_partial(options: Options) -> Built:
    step = functools.partial(difference, policy=Block(), reference=Block())
    return compiled(lambda x: step(x=x), options), (x(),)


@way(POLICY, "reference.norm")
def two_closures(options: Options) -> Built:
    policy, reference = Block(), Block()
    return compiled(lambda x: policy(x) - reference(x), options), (x(),)


@way(("policy_model.norm", "reference_model.norm"), "policy_model.norm")
def two_globals(options: Options) -> Built:
    return compiled(lambda x: policy_model(x) - by_helper(x), options), (x(),)


policy_model, reference_model = Block(), Block()


def by_helper(x: Tensor) -> Tensor:
    return reference_model(x)


@way(POLICY, "reference.norm")
def two_compiled_modules(options: Options) -> Built:
    policy, reference = torch.compile(Block()), torch.compile(Block())
    return compiled(lambda x: policy(x) - reference(x), options), (x(),)


@way(("models.policy.norm", "models.reference.norm"), "*.reference.norm")
def dict_of_models(options: Options) -> Built:
    models = {"policy": Block(), "reference": Block()}
    step = compiled(lambda models, x: models["policy"](x) - models["reference"](x), options)
    return step, (models, x())


@way(("models.policy.norm", "models.reference.norm"), "models.policy.norm")
def user_dict_of_models(options: Options) -> Built:
    models = UserDict(policy=Block(), reference=Block())
    step = compiled(lambda x: models.data["policy"](x) - models.data["reference"](x), options)
    return step, (x(),)


@way(("registry.policy.norm", "registry.reference.norm"), "registry.policy.norm")
def registry_behind_a_function(options: Options) -> Built:
    return compiled(lambda x: look_up("policy")(x) - look_up("reference")(x), options), (x(),)


registry = {"policy": Block(), "reference": Block()}


def look_up(name: str) -> nn.Module:
    return registry[name]


@way(("blocks.0.norm", "blocks.1.norm"), "blocks.1.norm")
def list_of_modules(options: Options) -> Built:
    blocks = [Block(), Block()]

    def step(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    return compiled(step, options), (x(),)


@way(("blocks.0.norm", "blocks.1.norm"), "blocks.0.norm")
def tuple_in_star_args(options: Options) -> Built:
    def step(x: Tensor, *blocks: nn.Module) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    return compiled(step, options), (x(), breaking(), breaking())


@dataclass
class State:
    policy: nn.Module
    reference: nn.Module


Both = namedtuple("Both", ["policy", "reference"])


@way(("state.policy.norm", "state.reference.norm"), "state.reference.norm")
def data_class(options: Options) -> Built:
    step = compiled(lambda state, x: state.policy(x) - state.reference(x), options)
    return step, (State(Block(), Block()), x())


@way(("both.policy.norm", "both.reference.norm"), "both.reference.norm")
def named_tuple(options: Options) -> Built:
    step = compiled(lambda both, x: both.policy(x) - both.reference(x), options)
    return step, (Both(Block(), Block()), x())


@way(("models.0.norm", "models.1.norm"), "models.1.norm")
def bound_methods_in_a_list(options: Options) -> Built:
    models = [Block().forward, Block().forward]
    return compiled(lambda x: models[0](x) - models[1](x), options), (x(),)


# Graph breaks put the roots into graphs of their own


@way(POLICY, "policy.norm")
def break_between_two_roots(options: Options) -> Built:
    def step(policy: nn.Module, reference: nn.Module, x: Tensor) -> Tensor:
        y = policy(x)
        torch._dynamo.graph_break()
        return y - reference(x)

    return compiled(step, options), (Block(), Block(), x())


@way(POLICY, "reference.norm")
def breaks_in_two_roots(options: Options) -> Built:
    return compiled(difference, options), (breaking(), breaking(), x())


@way(POLICY, "policy.norm")
def breaks_in_front_of_two_roots(options: Options) -> Built:
    policy, reference = LateBlock(), LateBlock()
    return compiled(lambda x: policy(x) - reference(x), options), (x(),)


@way(("policy.layers.0.norm", "reference.layers.1.norm"), "reference.layers.1.norm")
def layers_that_share_a_graph(options: Options) -> Built:
    """Those that are treated alike, as after every graph break: three of the four."""
    policy, reference = Stack(breaking), Stack(breaking)
    return compiled(lambda x: policy(x) - reference(x), options), (x(),)


@way(("a.norm", "b.norm"), "b.norm")
def keywords_of_any_name(options: Options) -> Built:
    def step(x: Tensor, **models: Any) -> Tensor:
        return models["a"](x) - models["b"](x)

    return functools.partial(compiled(step, options), a=Block(), b=Block()), (x(),)
