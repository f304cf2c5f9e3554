"""permute_channels: which weights are on the residual stream, and models that it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import some
from peft import LoraConfig, get_peft_model
from reference import build_llama, quantize_with_torchao
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mxnorm_pass
from mxnorm_pass.checkpoints.channels import dims
from mxnorm_pass.checkpoints.channels.permute import inverse, permute_channels

D, VOCABULARY = 64, 64
IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def some_order(seed: int = 0, width: int = D) -> Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_unchanged(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class InFloat64(TorchDispatchMode):
    """An uncompiled model's own casts to float32 go to float64."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(dtype := kwargs.get("dtype"), torch.dtype) and dtype.is_floating_point:
            kwargs = {**kwargs, "dtype": torch.float64}
        return op(*args, **kwargs)


def logits_of(model: nn.Module) -> Tensor:
    """In float64, eagerly."""
    widened = copy.deepcopy(model).double().eval()
    widened.config._experts_implementation = "eager"  # the other one has no float64
    with torch.no_grad(), InFloat64():
        return widened(IDS, use_cache=False).logits


def hugging_face(name: str, config_name: str = "", **values: Any) -> nn.Module:
    config = getattr(transformers, config_name or f"{name.removesuffix('ForCausalLM')}Config")
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": 96, "head_dim": 16,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**{**shape, **values}))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # gains and biases away from 1 and 0
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: build_llama(layers=1),
    "tied bf16": lambda: build_llama(torch.bfloat16, layers=1, tie_word_embeddings=True),
    "Qwen3": lambda: hugging_face("Qwen3ForCausalLM"),
    "Mistral": lambda: hugging_face("MistralForCausalLM"),
    "Gemma-2": lambda: hugging_face("Gemma2ForCausalLM"),
    "Gemma-3": lambda: hugging_face("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "Qwen3-MoE": lambda: hugging_face(
        "Qwen3MoeForCausalLM", moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "GPT-2": lambda: hugging_face("GPT2LMHeadModel", "GPT2Config"),
}


@pytest.mark.full
@some(["Llama", "tied bf16", "Gemma-2", "Qwen3-MoE"], name=list(MODELS))
def test_the_function_stays_and_the_inverse_restores_all_bits(name: str) -> None:
    model, order = MODELS[name](), some_order()
    state, before = state_of(model), logits_of(model)
    permute_channels(model, order)
    embedding = model.get_input_embeddings().weight
    was = next(state[n] for n, p in model.named_parameters() if p is embedding)
    assert torch.equal(embedding, was[:, order])
    after = logits_of(model)
    assert float((after - before).abs().max() / before.abs().max()) <= 1e-9
    permute_channels(model, inverse(order))
    assert is_unchanged(model, state)


def test_what_is_on_the_stream_of_a_llama() -> None:
    model, order = build_llama(layers=1), some_order()
    state = state_of(model)
    permute_channels(model, order)
    for name, now in model.state_dict().items():
        was = state[name]
        if any(part in name for part in ("o_proj", "down_proj")) or "norm" in name:
            assert torch.equal(now, was[order]), name
        else:
            assert torch.equal(now, was[:, order]), name


def test_gradients_correspond() -> None:
    model, order = build_llama(torch.float64, layers=1), some_order()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with InFloat64():
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    before = gradients()
    permute_channels(model, order)
    permuted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, now in gradients().items():
        torch.testing.assert_close(now, permuted[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(permuted[name], before[name])


# Small models


class Toy(nn.Module):
    """Embedding, an op on the stream, a norm with its residual branch, a head."""

    def __init__(self, op: Callable[[Tensor], Tensor] = lambda x: x, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(17, width)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width)
        self.head = nn.Linear(width, 17, bias=False)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.op = op

    def forward(self, ids: Tensor) -> Tensor:
        x = self.op(self.embedding(ids))
        x = x + self.down(F.silu(self.up(self.norm(x))))
        return self.head(x)


TOY_IDS = torch.arange(10).reshape(2, 5)
toy_orders = st.permutations(range(32)).map(torch.tensor)


@settings(max_examples=examples(3), deadline=None)
@given(first=toy_orders, second=toy_orders)
def test_orders_compose(first: Tensor, second: Tensor) -> None:
    """To ``first`` and then ``second`` is to ``first[second]``."""
    twice, once = Toy().double(), Toy().double()
    with torch.no_grad():
        want = once(TOY_IDS)
        permute_channels(twice, first)
        permute_channels(twice, second)
        permute_channels(once, first[second])
        assert is_unchanged(twice, state_of(once))
        torch.testing.assert_close(once(TOY_IDS), want, rtol=1e-9, atol=1e-12)


SYMMETRIC: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "largest": lambda x: x / x.abs().amax(-1, keepdim=True),
    "rows merged": lambda x: (x.reshape(-1, 32) * 2).view(x.shape),
    "transposed": lambda x: x.transpose(1, 2).relu().transpose(1, 2),
    "rows rearranged": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1),
    "constant": lambda x: x + torch.ones(32, dtype=x.dtype),
    "masked": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "gram": lambda x: (x @ x.transpose(1, 2)) @ x,
}
NEAR_MISSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "roll": (lambda x: x.roll(1, -1), "roll"),
    "halves": (lambda x: torch.cat([-x[..., 16:], x[..., :16]], -1), "slice"),
    "chunks": (lambda x: torch.cat(x.chunk(2, -1)[::-1], -1), "split|chunk"),
    "heads": (lambda x: (x.view(2, -1, 4, 8) * torch.ones(4, 8)).view(2, -1, 32), "view"),
    "cumulative": (lambda x: x.cumsum(-1), "cumsum"),
    "sorted": (lambda x: x.sort(-1).values, "sort"),
    "flipped": (lambda x: x.flip(-1), "flip"),
    "one channel": (lambda x: x + x[..., :1], "slice"),
    "a ramp": (lambda x: x * torch.arange(32, dtype=x.dtype), "arange"),
    "convolution": (lambda x: F.avg_pool1d(x, 3, 1, 1), "pool"),
    "largest channel": (lambda x: x + x.argmax(-1, keepdim=True), "argmax"),
}


@some(["centred", "rows merged", "gram", "masked"], name=list(SYMMETRIC))
def test_ops_that_treat_channels_alike(name: str) -> None:
    model = Toy(SYMMETRIC[name]).double()
    with torch.no_grad():
        want = model(TOY_IDS)
        permute_channels(model, some_order(width=32))
        torch.testing.assert_close(model(TOY_IDS), want, rtol=1e-9, atol=1e-12)


@some(["roll", "halves", "heads", "one channel", "a ramp"], name=list(NEAR_MISSES))
def test_ops_that_depend_on_the_order(name: str) -> None:
    op, message = NEAR_MISSES[name]
    model = Toy(op)
    assert_refused(model, message)


def assert_refused(model: nn.Module, message: str, width: int = 32, **kwargs: Any) -> None:
    state = state_of(model)
    training = model.training
    with pytest.raises(ValueError, match=message):
        permute_channels(model, some_order(width=width), **kwargs)
    assert is_unchanged(model, state) and model.training == training


def test_the_error_names_the_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Toy(lambda x: x.roll(1, -1))

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)

    assert_refused(Outer(), r"aten.roll.default \(roll in 'inner'\)")


def test_float64_outputs_are_compared(monkeypatch: Any) -> None:
    """Were a rule wrong, the model would be as it was."""
    rules = {**dims._RULES, torch.ops.aten.roll: dims._pointwise}
    monkeypatch.setattr(dims, "_RULES", rules)
    assert_refused(Toy(lambda x: x.roll(1, -1)), "moves its float64 outputs by [0-9]")


def test_outputs_that_are_nan() -> None:
    model = Toy()
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    assert_refused(model, "moves its float64 outputs by nan")


def test_models_without_a_stream_to_follow() -> None:
    assert_refused(Toy().norm, "torch.export fails")
    assert_refused(
        Toy(), r"order has 16 channels, and the model has embeddings of width \[32\]", 16
    )
    returned = Toy()
    returned.head = nn.Identity()
    assert_refused(returned, "returns its residual stream")
    unread = Toy()
    unread.other = nn.Linear(32, 2)
    assert_refused(unread, "'other.weight' has a dimension of 32 and is read by nothing")
    assert_refused(Toy(), "torch.export fails", inputs=())


@pytest.mark.parametrize("order", [None, [1, 0], torch.arange(32.0), torch.zeros(32).long()])
def test_orders_that_are_none(order: Any) -> None:
    with pytest.raises(ValueError, match="order is"):
        permute_channels(Toy(), order)


def test_weights_that_are_not_plain() -> None:
    llama = build_llama(torch.bfloat16, layers=1)
    with pytest.raises(ValueError, match="merge_and_unload"):
        permute_channels(get_peft_model(llama, LoraConfig(target_modules=["q_proj"])), some_order())
    quantised = quantize_with_torchao(build_llama(torch.bfloat16, layers=1))
    with pytest.raises(ValueError, match="is a MXTensor: permute .* then quantise"):
        permute_channels(quantised, some_order())
    with pytest.raises(ValueError, match="meta device"):
        permute_channels(Toy().to("meta"), some_order(width=32))


def test_compiled_models_are_refused() -> None:
    in_place = Toy()
    in_place.compile(backend="eager")
    for model in (torch.compile(Toy(), backend="eager"), in_place):
        with pytest.raises(ValueError, match="compiled already"):
            permute_channels(model, some_order(width=32))


def test_other_inputs() -> None:
    class TwoInputs(Toy):
        def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
            return super().forward(ids) * scale

    for inputs in ((TOY_IDS, torch.ones(1)), {"ids": TOY_IDS, "scale": torch.ones(1)}):
        model = TwoInputs()
        state = state_of(model)
        permute_channels(model, some_order(width=32), inputs)
        assert torch.equal(model.norm.weight, state["norm.weight"][some_order(width=32)])


def test_the_public_name() -> None:
    assert mxnorm_pass.permute_channels is permute_channels
