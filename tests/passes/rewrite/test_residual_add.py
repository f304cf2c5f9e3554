"""The residual add in front of a norm: which ones the norm's op does, and that no bit changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from matching import (
    BF16,
    EPS,
    F32,
    TRAIN,
    WIDTH,
    Norm,
    assert_same_bits,
    gemma,
    gradients,
    huggingface,
    in_both_modes,
    inputs,
    run,
)
from pairwise import each_value, pairwise, some
from reference import build_llama, convert_to_mxfp8_training, quantize_with_torchao
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from training import IDS, train

import mxnorm_pass
from mxnorm_pass import Report, Site
from mxnorm_pass.passes.match import decide

ADD_NORM_CAST = "mxnorm_pass.add_norm_cast.default"
Add = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Calls a function while no residual add is fused."""

    def call(function: Callable[[], Any]) -> Any:
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            patch.setattr(decide, "residual_add", lambda *_: None)
            return function()

    return call


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


class Block(nn.Module):
    """total = add(x, y); norm(total) -> linear; the total is an output, too."""

    def __init__(
        self, add: Add = add, norm: Any = huggingface, dtype: torch.dtype = F32, width: int = WIDTH
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add = add
        self.norm = Norm(norm, (torch.rand(width) + 0.5).to(dtype), EPS)
        self.linear = nn.Linear(width, 64, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = self.add(x, y)
        return self.linear(self.norm(total).to(self.linear.weight.dtype)), total


def pair(*dtypes: torch.dtype, train: bool = False) -> tuple[Tensor, Tensor]:
    x, y = (
        inputs(dtype=d, seed=i).requires_grad_(train)
        for i, d in enumerate(dtypes or (F32, F32), start=1)
    )
    return x, y


def assert_residuals(report: Report, *expected: bool) -> None:
    assert [s.residual for s in report.fused] == list(expected), str(report)
    (graph,) = report.graphs
    assert graph.ops_after.get(ADD_NORM_CAST, 0) == sum(expected)


def check(
    unfused: Callable[..., Any],
    model: nn.Module,
    args: Sequence[Tensor],
    *expected: bool,
    train: bool = False,
    **options: Any,
) -> Report:
    """The sites' residual adds are as expected; with and without, the bits are the same."""
    got, report = run(model, *args, train=train, **options)
    assert_residuals(report, *expected)
    want, other = unfused(lambda: run(model, *args, train=train, **options))
    assert_residuals(other, *[False] * len(expected))
    adds, others = (r.graphs[0].ops_after.get("aten.add.Tensor", 0) for r in (report, other))
    assert adds == others - sum(expected)
    assert_same_bits(got, want)
    if train:
        leaves = [*args, *model.parameters()]
        assert_same_bits(gradients(got, leaves), gradients(want, leaves))
    return report


# What is fused


@pairwise(
    dtypes=[(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)],
    gain=["fold", "activation"],
    train=TRAIN,
)
def test_residual_add(dtypes: tuple[torch.dtype, ...], gain: str, train: bool, unfused) -> None:
    args = pair(*dtypes, train=train)
    report = check(unfused, Block(), args, True, train=train, gain=gain)
    assert ", residual add)" in str(report)
    assert Report.from_json(report.to_json()) == report


def test_residual_add_of_the_exact_norm_changes_no_bit() -> None:
    model, args = Block(dtype=BF16), pair(BF16, BF16)
    model.linear = quantize_with_torchao(nn.Sequential(model.linear))[0]
    got, report = run(model, *args, estimator="exact")
    assert_residuals(report, True)
    with torch.no_grad():
        assert_same_bits(got, model(*args))


@in_both_modes
def test_gain_that_comes_after_the_sum(train: bool, unfused) -> None:
    """Gemma's 1 + w is computed between the statistic and the product."""
    args = pair(train=train)
    check(unfused, Block(norm=gemma), args, True, train=train, gain="activation")


@in_both_modes
def test_a_tensor_added_to_itself(train: bool, unfused) -> None:
    check(unfused, Block(lambda x, y: x + x), pair(train=train), True, train=False)


@pytest.mark.full
@in_both_modes
def test_dynamic_number_of_tokens(train: bool, unfused) -> None:
    model, args = Block(), pair(train=train)
    for x in args:
        torch._dynamo.mark_dynamic(x, (0, 1))
    report = check(unfused, model, args, True, train=train, dynamic=None)
    assert "f32[2, 8, 128]" not in report.graphs[0].before


class Chain(nn.Module):
    """Two layers, each sum of which the next one adds to; ``between`` sees what is passed on."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width=64) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            y, x = layer(x, self.between(y))
        return y, x


@in_both_modes
def test_chain_of_sums(train: bool, unfused) -> None:
    """Each sum is the next one's operand."""
    args = [inputs(2, 8, 64, seed=i).requires_grad_(train) for i in (1, 2)]
    check(unfused, Chain(), args, True, True, True, train=train)


class TwoNorms(nn.Module):
    """Attention and MLP in parallel, each with its own norm of one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block(norm=gemma)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        return tuple(m.linear(m.norm(total)) for m in (self.first, self.second))


@each_value(gain=["fold", "activation"], train=TRAIN)
def test_of_two_norms_of_one_sum_the_first_adds(gain: str, train: bool, unfused) -> None:
    check(unfused, TwoNorms(), pair(train=train), True, False, train=train, gain=gain)


def test_of_two_norms_of_one_sum_the_fused_one_adds(unfused) -> None:
    options = {"modules": {"first.*": False}}
    args = pair()
    got, report = run(TwoNorms(), *args, **options)
    assert [s.residual for s in report.sites] == [False, True]
    assert_same_bits(got, unfused(lambda: run(TwoNorms(), *args, **options))[0])


class InPlace(Block):
    """Overwrites its sum after the norm has read it."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        out = self.linear(self.norm(total))
        total.mul_(2)
        return out, total


class InPlaceAdd(Block):
    """Adds into its own input, which its caller sees."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        x += y
        return (self.linear(self.norm(x)),)


def test_sum_that_the_model_overwrites(unfused) -> None:
    check(unfused, InPlace(), pair(), True)


def test_sum_that_is_written_to_an_input() -> None:
    model, (x, y) = InPlaceAdd(), pair()
    total = x + y
    (got,), report = run(model, x, y)
    assert_residuals(report, True)
    assert torch.equal(x, total)
    assert_same_bits([got], run(Block(), total - 0, torch.zeros_like(y))[0][:1])


# What is not


def broadcast(x: Tensor, y: Tensor) -> Tensor:
    return x + y[:1]


def alpha(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y, alpha=2)


def scalar(x: Tensor, y: Tensor) -> Tensor:
    return x + 1.0


def scalar_tensor(x: Tensor, y: Tensor) -> Tensor:
    return x + y[0, 0, 0]


def integers(x: Tensor, y: Tensor) -> Tensor:
    return x + (y * 1000).to(torch.int32)


def difference(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def view_of_a_sum(x: Tensor, y: Tensor) -> Tensor:
    return (x.flatten() + y.flatten()).view(x.shape)


def not_contiguous(x: Tensor, y: Tensor) -> Tensor:
    x, y = (t.transpose(0, 1).contiguous() for t in (x, y))
    return x.transpose(0, 1) + y.transpose(0, 1)


NEAR_MISSES: list[Add] = [
    broadcast,
    alpha,
    scalar,
    scalar_tensor,
    integers,
    difference,
    view_of_a_sum,
    not_contiguous,
]


@pytest.mark.parametrize("add", NEAR_MISSES, ids=lambda f: f.__name__)
def test_another_add(add: Add) -> None:
    got, report = run(Block(add), *pair())
    assert [s.residual for s in report.fused] == [False], str(report)
    assert ADD_NORM_CAST not in report.graphs[0].ops_after
    with torch.no_grad():
        assert torch.equal(got[1], add(*pair()))


class GainOfTheSum(Block):
    """The gain is known only once the sum is: one op cannot give both."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        gain = total.flatten(0, -2).amax(0) + 1
        return self.linear(huggingface(total, gain, EPS)), total


def test_gain_that_is_computed_from_the_sum(unfused) -> None:
    check(unfused, GainOfTheSum(), pair(), False, gain="activation")


class GainsOfEachOther(Block):
    """Either sum could be fused, both could not: each would wait for the other."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        first, second = x + y, y + y
        gains = [t.flatten(0, -2).amax(0) + 1 for t in (second, first)]
        return tuple(
            self.linear(huggingface(t, g, EPS)) for t, g in zip((first, second), gains, strict=True)
        )


def test_gains_that_are_computed_from_each_others_sums(unfused) -> None:
    check(unfused, GainsOfEachOther(), pair(), True, False, gain="activation")


# Llama


def llama(kind: str = "plain", **arguments: Any) -> nn.Module:
    if kind == "torchao":
        return quantize_with_torchao(build_llama(BF16, **arguments))
    model = build_llama(**arguments)
    return convert_to_mxfp8_training(model) if kind == "torchao-training" else model


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


def residuals(sites: Sequence[Site]) -> list[bool]:
    return [s.residual for s in sites]


@pytest.mark.full
@each_value(kind=["plain", "torchao", "torchao-training"], estimator=["mxnorm", "exact"])
def test_llama_inference(kind: str, estimator: str, unfused) -> None:
    model = llama(kind)

    def infer() -> Tensor:
        with torch.no_grad():
            return compiled(model, estimator=estimator)(IDS, use_cache=False).logits

    with mxnorm_pass.record() as report:
        got = infer()
    assert residuals(report.fused) == [False, True, True, True]
    assert torch.equal(got, unfused(infer))


@pytest.mark.full
@some(["mxnorm-plain"], estimator=["mxnorm", "exact"], kind=["plain", "torchao-training"])
def test_llama_training(kind: str, estimator: str, unfused) -> None:
    model = llama(kind)

    def step() -> Any:
        return train(compiled(model, estimator=estimator), model)

    with mxnorm_pass.record() as report:
        got, got_gradients = step()
    assert residuals(report.fused) == [False, True, True, True]
    want, want_gradients = unfused(step)
    assert torch.equal(got, want)
    assert got_gradients.keys() == want_gradients.keys()
    assert all(torch.equal(got_gradients[n], want_gradients[n]) for n in want_gradients)


@pytest.mark.full
def test_export(unfused) -> None:
    model = build_llama(layers=1).eval()

    def apply() -> Tensor:
        with torch.no_grad():
            program = torch.export.export(
                model, (), {"input_ids": IDS, "use_cache": False}, strict=False
            )
            return mxnorm_pass.apply(program).module()(input_ids=IDS, use_cache=False).logits

    with mxnorm_pass.record() as report:
        got = apply()
    assert residuals(report.fused) == [False, True]
    assert torch.equal(got, unfused(apply))


# Checkpointing


def saved(run: Callable[[], Any], parameters: nn.Module) -> list[tuple[object, ...]]:
    """Shape and dtype of each tensor that the forward keeps for the backward."""
    known = {p.untyped_storage().data_ptr() for p in parameters.parameters()}
    kept: dict[int, tuple[object, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            kept[pointer] = (tensor.numel(), str(tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sorted(kept.values(), key=str)


@pytest.mark.full
@some(["checkpointed"], checkpointing={"plain": False, "checkpointed": True})
def test_what_llama_saves(checkpointing: bool, unfused) -> None:
    """A checkpointed layer adds its own first sum, and no layer the sum of the one before."""

    def run() -> Any:
        model = build_llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step = compiled(model)
        kept = saved(lambda: step(IDS, labels=IDS, use_cache=False), model)
        return kept, *train(step, model)

    with mxnorm_pass.record() as report:
        kept, got, got_gradients = run()
    once = [False, True, False, True] if checkpointing else [False, True, True, True]
    assert residuals(report.fused[:4]) == once
    want_kept, want, want_gradients = unfused(run)
    assert kept == want_kept
    assert torch.equal(got, want)
    assert all(torch.equal(got_gradients[n], want_gradients[n]) for n in want_gradients)


class Checkpointed(Chain):
    """Each layer is a region of its own; ``where`` says which part of a layer is in it."""

    def __init__(self, where: str, **arguments: Any) -> None:
        super().__init__()
        self.where, self.arguments = where, {"use_reentrant": False, **arguments}

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            if self.where == "all":
                y, x = checkpoint(layer, x, y, **self.arguments)
            elif self.where == "norm":
                x = x + y
                y = checkpoint(
                    lambda x, layer=layer: layer.linear(layer.norm(x)), x, **self.arguments
                )
            else:
                x = checkpoint(torch.add, x, y, **self.arguments)
                y = layer.linear(layer.norm(x))
        return y, x


def keep_sums() -> Any:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = op is torch.ops.aten.add.Tensor
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@pytest.mark.full
@pytest.mark.parametrize(
    ("where", "arguments", "fuses"),
    [
        ("all", {}, True),
        ("norm", {}, False),
        ("add", {}, False),
        ("all", {"context_fn": keep_sums}, False),
    ],
    ids=["add and norm", "norm", "add", "norm, but not the add"],
)
def test_checkpointed_regions(where: str, arguments: Any, fuses: bool, unfused) -> None:
    args = [inputs(2, 8, 64, seed=i).requires_grad_() for i in (1, 2)]
    model = Checkpointed(where, **arguments)
    check(unfused, model, args, *3 * [fuses], train=True)
    torch._dynamo.reset()
    kept = saved(lambda: compiled(model)(*args), model)
    assert kept == unfused(lambda: saved(lambda: compiled(model)(*args), model))
