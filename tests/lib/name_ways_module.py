"""Ways in which a compiled module, or a method of one, reaches its norms."""

from __future__ import annotations

import functools
import weakref
from types import SimpleNamespace
from typing import Any

import torch
from name_ways import (
    BLOCKS,
    LAYERS,
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
from torch.utils.checkpoint import checkpoint

WAYS: dict[str, Way] = {}
way = functools.partial(register, WAYS)


# The forward of the root


@way(BLOCKS, "second.norm")
def plain(options: Options) -> Built:
    return compiled(Pair(), options), (x(),)


@way(BLOCKS, "second.*")
def decorated(options: Options) -> Built:
    class Root(Pair):
        @logged
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    return compiled(Root(), options), (x(),)


@way(BLOCKS, "first.norm")
def decorated_without_wraps_and_called_by_keyword(options: Options) -> Built:
    class Root(Pair):
        @unnamed
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    root = compiled(Root(), options)
    return lambda x: root(x=x), (x(),)


@way(BLOCKS, "second.norm")
def star_args(options: Options) -> Built:
    class Root(Pair):
        def forward(*args: Any) -> Any:  # type: ignore[override]
            return args[0].second(args[0].first(args[1]))

    return compiled(Root(), options), (x(),)


@way(BLOCKS, "second.norm")
def self_of_another_name(options: Options) -> Built:
    class Root(Pair):
        def forward(this, x: Tensor) -> Tensor:
            return this.second(this.first(x))

    return compiled(Root(), options), (x(),)


@way(BLOCKS, "second.norm")
def replaced_on_the_instance(options: Options) -> Built:
    root = Pair()
    original = root.forward
    root.forward = lambda x: original(x) + 1  # type: ignore[method-assign]
    return compiled(root, options), (x(),)


@way(BLOCKS, "second.norm")
def hooks(options: Options) -> Built:
    root = Pair()
    for module in root.modules():
        module.register_forward_pre_hook(lambda module, args: None)
    return compiled(root, options), (x(),)


@way(BLOCKS, "second.norm")
def nograd_and_autocast(options: Options) -> Built:
    function = torch.no_grad()(torch.autocast("cpu", enabled=False)(Pair().forward))
    return compiled(function, options), (x(),)


# How it is compiled


@way(BLOCKS, "second.norm")
def in_place(options: Options) -> Built:
    root = Pair()
    root.compile(backend="mxnorm", options=options)
    return root, (x(),)


@way(BLOCKS, "second.norm")
def method_other_than_forward(options: Options) -> Built:
    class Root(Pair):
        def generate(self, x: Tensor) -> Tensor:
            return self(x) + 1

    return compiled(Root().generate, options), (x(),)


@way(BLOCKS, "second.norm")
def forward_alone(options: Options) -> Built:
    root = Pair()
    root.forward = compiled(root.forward, options)  # type: ignore[method-assign]
    return root, (x(),)


@way(BLOCKS, "second.norm")
def decorator_on_forward(options: Options) -> Built:
    class Root(Pair):
        @torch.compile(backend="mxnorm", options=options)
        def forward(this, x: Tensor) -> Tensor:
            return this.second(this.first(x))

    return Root(), (x(),)


@way(BLOCKS, "second.norm")
def twice(options: Options) -> Built:
    return compiled(compiled(Pair(), options), options), (x(),)


@way(("tower.first.norm", "tower.second.norm"), "tower.second.norm")
def with_a_prefix(options: Options) -> Built:
    return compiled(Pair(breaking), {**options, "prefix": "tower"}), (x(),)


# Graph breaks


@way(BLOCKS, "second.norm")
def break_in_the_root(options: Options) -> Built:
    class Root(Pair):
        @logged
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    return compiled(Root(), options), (x(),)


@way(BLOCKS, "first.norm")
def break_behind_the_first_site(options: Options) -> Built:
    return compiled(Pair(breaking), options), (x(),)


@way(BLOCKS, "second.norm")
def break_in_front_of_both_sites(options: Options) -> Built:
    return compiled(Pair(LateBlock), options), (x(),)


@way(LAYERS, "layers.1.norm")
def break_in_layers_with_star_args(options: Options) -> Built:
    class Layer(Block):
        def forward(*args: Any) -> Any:  # type: ignore[override]
            torch._dynamo.graph_break()
            return args[0].linear(args[0].norm(args[1]))

    return compiled(Stack(Layer), options), (x(),)


@way(LAYERS, "layers.0.norm")
def break_in_a_helper_of_layers(options: Options) -> Built:
    def helper(block: Block, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return block.linear(block.norm(x))

    class Layer(Block):
        def forward(self, x: Tensor) -> Tensor:
            return helper(self, x)

    return compiled(Stack(Layer), options), (x(),)


@way(LAYERS, "layers.1.norm")
def break_in_a_loop(options: Options) -> Built:
    class Root(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    return compiled(Root(), options), (x(),)


@way(LAYERS, "layers.1.norm")
def root_that_is_not_compiled_itself(options: Options) -> Built:
    class Root(Stack):
        @torch.compiler.disable(recursive=False)
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    return compiled(Root(), options), (x(),)


# Containers and wrappers


@way(("0.norm", "1.norm"), "1.norm")
def sequential(options: Options) -> Built:
    return compiled(nn.Sequential(Block(), Block()), options), (x(),)


@way(BLOCKS, "second.norm")
def compiled_submodule(options: Options) -> Built:
    root = Pair()
    root.second = compiled(root.second, options)
    return compiled(root, options), (x(),)


@way(BLOCKS, "second.norm")
def submodule_compiled_in_place(options: Options) -> Built:
    root = Pair()
    root.second.compile(backend="mxnorm", options=options)
    return compiled(root, options), (x(),)


@way(BLOCKS, "second.norm")
def checkpoint_wrapper(options: Options) -> Built:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    root = Pair()
    root.first = wrappers.checkpoint_wrapper(root.first)
    root.second = wrappers.checkpoint_wrapper(root.second)
    return compiled(root, options), (x(),)


@way(BLOCKS, "second.norm")
def checkpoints_of_both_kinds(options: Options) -> Built:
    class Root(Pair):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=False)
            return checkpoint(self.second, x, use_reentrant=True)

    return compiled(Root(), options), (x(),)


@way(("base_model.model.norm",), "base_model.model.norm")
def lora(options: Options) -> Built:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Block(), LoraConfig(r=32, target_modules=["linear"]))
    return compiled(model, options), (x(),)


@way(BLOCKS, "second.norm")
def accelerate_hooks(options: Options) -> Built:
    from accelerate.hooks import ModelHook, add_hook_to_module

    root = Pair()
    add_hook_to_module(root, ModelHook())
    add_hook_to_module(root.second, ModelHook())
    return compiled(root, options), (x(),)


@way(BLOCKS, "second.norm")
def exported_program(options: Options) -> Built:
    program = torch.export.export(Pair(), (x(),))
    return compiled(program.module(), options), (x(),)


@way(("inner.first.norm", "inner.second.norm", "norm"), "inner.second.norm")
def exported_program_in_a_module(options: Options) -> Built:
    class Root(Block):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.export.export(Pair(), (x(),)).module()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.inner(x))

    return compiled(Root(), options), (x(),)


@way(("inner.first.norm", "inner.second.norm", "norm"), "inner.second.norm")
def symbolically_traced_submodule(options: Options) -> Built:
    class Root(Block):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.fx.symbolic_trace(Pair())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.inner(x))

    return compiled(Root(), options), (x(),)


@way(("norm", "norm"), "norm")
def one_instance_under_two_names(options: Options) -> Built:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(64, eps=1e-6)
            self.alias = self.norm
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.alias(self.up(self.norm(x))))

    return compiled(Root(), options), (x(),)


# Modules that are not registered


class Outer(Block):
    """Runs ``other`` in front of itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.other(x))


@way(("extra.0.norm", "extra.1.norm"), "extra.1.norm")
def python_list(options: Options) -> Built:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra = [breaking(), breaking()]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.extra:
                x = block(x)
            return x

    return compiled(Root(), options), (x(),)


@way(("inner.extra.key.norm", "inner.norm"), "inner.extra.key.norm")
def dict_of_a_submodule(options: Options) -> Built:
    class Inner(Outer):
        def __init__(self) -> None:
            super().__init__()
            self.extra = {"key": Block()}

        @property
        def other(self) -> nn.Module:
            return self.extra["key"]

    root = nn.Module()
    root.inner = Inner()
    root.forward = lambda x: root.inner(x)  # type: ignore[method-assign]
    return compiled(root, options), (x(),)


@way(("other.norm", "norm"), "other.norm")
def hidden_attribute(options: Options) -> Built:
    root = Outer()
    object.__setattr__(root, "other", breaking())
    return compiled(root, options), (x(),)


@way(("held.0.norm", "norm"), "held.0.norm")
def property_over_a_tuple(options: Options) -> Built:
    class Root(Outer):
        def __init__(self) -> None:
            super().__init__()
            self.held = (Block(),)

        @property
        def other(self) -> nn.Module:
            return self.held[0]

    return compiled(Root(), options), (x(),)


@way(("reference.norm", "norm"), "reference.norm")
def weak_reference(options: Options) -> Built:
    class Root(Outer):
        def other(self, x: Tensor) -> Tensor:
            return self.reference()(x)

    root, block = Root(), Block()
    root.reference = weakref.ref(block)
    return functools.partial(lambda kept, x: compiled(root, options)(x), block), (x(),)


@way(("helper.other.norm", "norm"), "helper.other.norm")
def plain_object(options: Options) -> Built:
    class Root(Outer):
        def other(self, x: Tensor) -> Tensor:
            return self.helper.other(x)

    root = Root()
    root.helper = SimpleNamespace(other=LateBlock())
    return compiled(root, options), (x(),)


@way(("other.norm", "norm"), "other.norm")
def class_attribute(options: Options) -> Built:
    root = type("Root", (Outer,), {"other": Block()})()
    return compiled(root, options), (x(),)


@way(("block.norm", "norm"), "block.norm")
def closure_in_an_attribute(options: Options) -> Built:
    block, root = Block(), Outer()
    root.other = lambda x: block(x)
    return compiled(root, options), (x(),)


@way(("adapter.norm", "norm"), "adapter.norm")
def hook_that_runs_a_module(options: Options) -> Built:
    adapter, root = Block(), Block()
    root.linear.register_forward_hook(lambda module, args, output: adapter(output))
    return compiled(root, options), (x(),)


@way(("stray.norm", "norm"), "stray.norm")
def global_variable(options: Options) -> Built:
    class Root(Outer):
        def other(self, x: Tensor) -> Tensor:
            return stray(x)

    return compiled(Root(), options), (x(),)


stray = Block()


@way(("guest.norm", "norm"), "guest.norm")
def argument(options: Options) -> Built:
    class Root(Block):
        def forward(self, x: Tensor, guest: nn.Module) -> Tensor:  # type: ignore[override]
            torch._dynamo.graph_break()
            return super().forward(guest(x))

    return compiled(Root(), options), (x(), breaking())
