"""``freezing=True``: weights are cast once for all graphs, and writes to them are seen."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from pairwise import each_value
from reference import build_llama, quantize_with_torchao, token_ids
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_inductor_cache
from usage import Block, inputs

import mxnorm_pass
from mxnorm_pass.compilation import shared_casts
from mxnorm_pass.errors import InvalidOptionsError
from mxnorm_pass.report import announce

BF16 = torch.bfloat16
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    gc.collect()
    with fresh_inductor_cache():
        yield


def frozen(model: nn.Module, **options: Any) -> Callable[..., Any]:
    options = {"freezing": True, **options}
    return torch.compile(model, backend="mxnorm", dynamic=False, options=options)


def plain(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="mxnorm", dynamic=False, options=options)


@torch.no_grad()
def run(model: Callable[..., Any], x: Tensor) -> Tensor:
    result: Tensor = model(x)
    return result


@contextmanager
def constants() -> Iterator[list[dict[str, Tensor]]]:
    """Of each graph that Inductor lowers."""
    found: list[dict[str, Tensor]] = []
    original = GraphLowering.codegen

    def codegen(self: GraphLowering) -> Any:
        result = original(self)
        found.append(dict(self.constants))
        return result

    with mock.patch.object(GraphLowering, "codegen", codegen):
        yield found


def casts_of(model: nn.Module) -> list[shared_casts.SharedCast]:
    """Those that there are of the model's weights."""
    own = {id(parameter) for parameter in model.parameters()}
    casts = shared_casts.shared_casts()
    return [c for c in casts if own.issuperset(id(weight()) for weight in c.weights)]


def bytes_by_dtype(tensors: dict[str, Tensor]) -> Counter[torch.dtype]:
    found: Counter[torch.dtype] = Counter()
    for tensor in {id(t): t for t in tensors.values()}.values():
        found[tensor.dtype] += tensor.nbytes
    return found


class Stack(nn.Module):
    """Blocks whose linears are all there is to store."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.RMSNorm(64) for _ in range(count))
        self.linears = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(count))
        self.to(BF16)

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


@each_value(format=["mxfp8", "nvfp4"], gain=["fold", "activation"])
def test_one_cast_for_all_graphs(format: str, gain: str) -> None:
    model = Stack()
    options = {"format": format, "gain": gain}
    compiled, want = frozen(model, **options), plain(model, **options)
    with constants() as graphs:
        for rows in (4, 8):
            x = inputs(rows, 64).to(BF16)
            assert torch.equal(run(compiled, x), run(want, x))
    of_frozen = [found for found in graphs if found]
    assert len(of_frozen) == 2
    addresses = [sorted(t.data_ptr() for t in found.values() if t.ndim == 2) for found in of_frozen]
    assert addresses[0] == addresses[1]
    for found in of_frozen:
        stored = bytes_by_dtype(found)
        weights = 2 * 64 * 64
        values = weights if format == "mxfp8" else weights // 2
        scales = 2 * 64 * (2 if format == "mxfp8" else 4)
        gains = 2 * 64 * 2 if gain == "activation" else 0
        # No widened copy of a weight.
        assert stored[BF16] == gains
        # Scales of two weights and, where gains are in them, of two activations.
        tensor_scales = (4 if gain == "activation" else 2) * 4
        assert sum(stored.values()) <= values + scales + gains + tensor_scales
    casts = casts_of(model)
    assert len(casts) == (4 if format == "nvfp4" else 2)


def test_converted_weights_are_no_copies() -> None:
    model = quantize_with_torchao(build_llama(BF16, layers=1, hidden=128))
    compiled = frozen(model)
    with constants() as graphs, torch.no_grad():
        compiled(token_ids(), use_cache=False)
    (found,) = graphs
    own = {t.data_ptr() for n, t in _inner_tensors(model) if "lm_head" not in n}
    matrices = [t for t in found.values() if t.dtype == E4M3]
    assert len(matrices) == 7 and all(t.data_ptr() in own for t in matrices)
    widened = [t for t in found.values() if t.dtype == BF16 and t.numel() > 64 * 128]
    assert not widened


def _inner_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        inner = getattr(parameter, "qdata", None)
        yield name, parameter if inner is None else inner


@pytest.mark.parametrize("written", ["weight", "gain", "data"])
def test_what_is_written_is_cast_anew_in_place(written: str) -> None:
    model = Stack()
    compiled, x = frozen(model), inputs(4, 64).to(BF16)
    first = run(compiled, x)
    before = [t.data_ptr() for c in casts_of(model) for t in c.results]
    with torch.no_grad():
        if written == "weight":
            model.linears[0].weight.mul_(-3)
        elif written == "gain":
            model.norms[0].weight.mul_(-3)
        else:
            model.linears[0].weight.data = model.linears[0].weight.data * -3
    got = run(compiled, x)
    assert not torch.equal(got, first)
    assert torch.equal(got, run(plain(model), x))
    assert [t.data_ptr() for c in casts_of(model) for t in c.results] == before
    assert torch.equal(run(compiled, x), got)


def test_load_state_dict_is_seen() -> None:
    model, other = Stack(), Stack()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    compiled, x = frozen(model), inputs(4, 64).to(BF16)
    run(compiled, x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(compiled, x), run(plain(other), x))


@pytest.mark.parametrize("name", ["bias", "gain"])
def test_what_inductor_has_folded_is_refused(name: str) -> None:
    block, x = Block(), inputs(4, 64)
    compiled = frozen(block, gain="activation")
    run(compiled, x)
    weight, shown = {
        "bias": (block.linear.bias, "linear.bias"),
        "gain": (block.norm.weight, "norm.weight"),
    }[name]
    with torch.no_grad():
        weight.add_(1)
    for _ in range(2):
        with pytest.raises(InvalidOptionsError, match=f"{shown} was written to after it became"):
            run(compiled, x)
    torch._dynamo.reset()
    assert torch.equal(run(compiled, x), run(plain(block, gain="activation"), x))


def test_a_weight_of_another_shape_is_refused() -> None:
    model = Stack()
    compiled, x = frozen(model), inputs(4, 64).to(BF16)
    run(compiled, x)
    weight = model.linears[0].weight
    weight.data = weight.data.float()
    with pytest.raises((InvalidOptionsError, RuntimeError)):
        run(compiled, x)


def test_a_new_parameter_is_seen() -> None:
    model = Stack()
    compiled, x = frozen(model), inputs(4, 64).to(BF16)
    run(compiled, x)
    model.linears[0].weight = nn.Parameter(model.linears[0].weight * 2)
    assert torch.equal(run(compiled, x), run(plain(model), x))


def test_a_model_that_is_gone_leaves_nothing() -> None:
    before = len(list(shared_casts.shared_casts()))
    model = Stack()
    run(frozen(model), inputs(4, 64).to(BF16))
    assert len(casts_of(model)) == 2
    weight = weakref.ref(model.linears[0].weight)
    del model
    gc.collect()
    # Inductor keeps the modules that it has written, with their constants.
    assert weight() is None and len(list(shared_casts.shared_casts())) == before


def test_weights_without_versions_stay_inputs() -> None:
    with torch.inference_mode():
        model = Stack()
    x = inputs(4, 64).to(BF16)
    compiled = frozen(model)
    with torch.inference_mode(), pytest.warns(mxnorm_pass.MXNormWarning, match="inference_mode"):
        first = compiled(x)
    with torch.inference_mode():
        model.linears[0].weight.mul_(2)
        assert not torch.equal(compiled(x), first)
    assert not casts_of(model)


def test_compiled_under_inference_mode() -> None:
    """The casts are no inference tensors, which could not be written to later."""
    model, x = Stack(), inputs(4, 64).to(BF16)
    compiled = frozen(model)
    with torch.inference_mode():
        compiled(x)
    with torch.no_grad():
        model.linears[0].weight.mul_(2)
    assert torch.equal(run(compiled, x), run(plain(model), x))


def test_tied_weights_are_cast_once_for_each_gain() -> None:
    model = Stack()
    model.linears[1].weight = model.linears[0].weight
    run(frozen(model), inputs(4, 64).to(BF16))
    assert len(casts_of(model)) == 2
    torch._dynamo.reset()
    run(frozen(model, gain="activation"), inputs(4, 64).to(BF16))
    assert len(casts_of(model)) == 3


def test_a_warm_cache_shares_the_casts() -> None:
    model, x = Stack(), inputs(4, 64).to(BF16)
    first = run(frozen(model), x)
    torch._dynamo.reset()
    assert torch.equal(run(frozen(model), x), first)
    assert len(casts_of(model)) == 2
    with torch.no_grad():
        model.linears[0].weight.mul_(2)
    assert not torch.equal(run(frozen(model), x), first)


def test_scales_of_tensors_are_no_numbers_in_the_code() -> None:
    """Neither of what was written to since, nor of another model with the same graph."""
    model, x = Stack(1), inputs(4, 64).to(BF16)
    compiled = frozen(model, format="nvfp4")
    run(compiled, x)
    with torch.no_grad():
        model.linears[0].weight.mul_(5)
    want = run(plain(model, format="nvfp4"), x)
    assert torch.equal(run(compiled, x), want)
    torch._dynamo.reset()
    other = Stack(1)
    run(frozen(other, format="nvfp4"), x)
    torch._dynamo.reset()
    assert torch.equal(run(frozen(model, format="nvfp4"), x), want)


class Latents(nn.Module):
    """A linear of constants, or one whose cast weight is widened in the graph."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.norm = kind, nn.RMSNorm(64)
        self.linear = nn.Linear(64, 64, bias=False)
        self.latents = nn.Parameter(torch.randn(4, 64))
        self.to(BF16)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "constant":
            return x + self.linear(self.norm(self.latents))
        return torch.addmm(x, self.norm(x), self.linear.weight.t())


@pytest.mark.parametrize("kind", ["constant", "widened"])
def test_casts_of_which_inductor_folds_more_are_refused(kind: str) -> None:
    model, x = Latents(kind), inputs(4, 64).to(BF16)
    compiled = frozen(model)
    run(compiled, x)
    with torch.no_grad():
        model.linear.weight.mul_(-3)
    with pytest.raises(InvalidOptionsError, match=r"linear.weight was written to after"):
        run(compiled, x)


@pytest.mark.parametrize("again", ["rows", "reset"])
def test_what_nothing_tells_of_is_seen_by_the_next_compile(again: str) -> None:
    model = Stack(1)
    compiled, x = frozen(model), inputs(4, 64).to(BF16)
    run(compiled, x)
    model.linears[0].weight.data.mul_(-3)
    if again == "reset":
        torch._dynamo.reset()
    else:
        x = inputs(8, 64).to(BF16)
    assert torch.equal(run(compiled, x), run(plain(model), x))


def test_other_data_in_the_same_place_is_seen() -> None:
    """As allocators give memory that was freed to the next who asks."""
    model, x = Stack(1), inputs(4, 64).to(BF16)
    weight = model.linears[0].weight
    place = bytearray(weight.nbytes)
    weight.data = torch.frombuffer(place, dtype=BF16).view(64, 64)
    compiled = frozen(model)
    run(compiled, x)
    weight.data = torch.frombuffer(place, dtype=BF16).view(64, 64).fill_(0.5)
    assert torch.equal(run(compiled, x), run(plain(model), x))


def test_fused_optimizers_are_seen() -> None:
    model = Stack(1)
    compiled, x = frozen(model), inputs(4, 64).to(BF16)
    run(compiled, x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    model(x).sum().backward()
    optimizer.step()
    assert torch.equal(run(compiled, x), run(plain(model), x))


# Who does not freeze is told


@contextmanager
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setattr(announce, "_warned", set())
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if "cast at every call" in str(w.message)]


def test_casts_at_every_call_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack()
    with told(monkeypatch) as cold:
        compiled = plain(model)
        for rows in (4, 8):
            run(compiled, inputs(rows, 64).to(BF16))
    values, scales = 2 * 64 * 64, 2 * 64 * 2
    (message,) = cold
    assert f"2 weights are cast at every call, which reads {2 * values / 1e6:.1f} MB" in message
    assert f"writes {(values + scales) / 1e6:.1f} MB" in message
    assert "{'freezing': True}" in message and "mxnorm_pass.convert(model)" in message
    torch._dynamo.reset()
    with told(monkeypatch) as warm:
        run(plain(model), inputs(4, 64).to(BF16))
    assert warm == cold


def test_who_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(4, 64).to(BF16)
    ids = token_ids()
    with told(monkeypatch) as messages:
        run(frozen(Stack()), x)
        run(plain(Stack(), inner="aot_eager"), x)
        plain(Stack())(x).sum().backward()
        with torch.no_grad():
            mxnorm_pass.explain(Stack(), x)
            converted = quantize_with_torchao(build_llama(BF16, layers=1))
            plain(converted, inner="inductor")(ids, use_cache=False)
    assert not messages
