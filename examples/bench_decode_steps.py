"""What ``bench_decode.py`` measures of models: one token of Llama-3-8B's layers, and its memory."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from bench_layer import distance, quiet
from benchlib import Timing, interleaved
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import mxnorm_pass

LLAMA = Path(__file__).parent / "configs" / "llama-3-8b.json"
BASELINE = "bf16"
BATCHES = (1, 4, 16, 64)
FROZEN = {"quantize": "all", "freezing": True}
COMPILES = 64
# Tokens of room in the cache.
SPARE = 64


@dataclass(frozen=True)
class Arm:
    """A way to run the model.

    Attributes:
        converted: its weights are MXFP8 tensors of torchao's.
        options: of the backend "mxnorm"; None for "inductor".
    """

    converted: bool
    options: Mapping[str, Any] | None


ARMS = {
    BASELINE: Arm(False, None),
    "torchao": Arm(True, None),
    "mxnorm": Arm(True, FROZEN),
    "exact": Arm(True, FROZEN | {"estimator": "exact"}),
    "mxnorm, plain model": Arm(False, FROZEN),
    "mxnorm, lm_head too": Arm(False, FROZEN | {"modules": {"lm_head": True}}),
}


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        config: what is different from Llama-3-8B.
        context: tokens in the cache before the one that is timed.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: {"num_hidden_layers": 4})
    context: int = 1024
    device: str = "cuda"


@dataclass(frozen=True)
class Measured:
    """One token of one arm.

    Attributes:
        bf16: in the same rounds.
        weight_bytes: of the model that the arm runs.
        compile_seconds: with the caches as they are.
        error: relative distance of the logits from those of the uncompiled model.
        fused: norms that the pass rewrote.
    """

    arm: str
    batch: int
    layers: int
    time: Timing
    bf16: Timing
    weight_bytes: int
    compile_seconds: float
    error: float
    fused: int

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measured:
        return cls(**{**entry, **{name: Timing(**entry[name]) for name in ("time", "bf16")}})

    @property
    def speed_up(self) -> float:
        return self.bf16.us / self.time.us

    def __str__(self) -> str:
        made = f"{self.fused} fused, compiled in {self.compile_seconds:.0f} s"
        of = f"{self.layers} layers, batch {self.batch}"
        return f"{self.arm}, {of}: {self.time.us / 1e3:.3f} ms, {self.speed_up:.2f}x; {made}"


@dataclass(frozen=True)
class Token:
    """The logits of one token behind others, whose keys and values are random.

    Attributes:
        context: how many others.
    """

    model: Callable[..., Any]
    ids: Tensor
    cache: StaticCache
    context: int

    @classmethod
    def of(cls, model: LlamaForCausalLM, batch: int, context: int) -> Token:
        config, device = model.config, model.device
        cache = StaticCache(config=config, max_cache_len=context + SPARE)
        sizes = (batch, config.num_key_value_heads, config.head_dim)
        cache.early_initialization(*sizes, torch.bfloat16, device)
        generator = torch.Generator(device).manual_seed(1)
        for layer in cache.layers:
            for states in (layer.keys, layer.values):
                states.normal_(generator=generator)
        ids = torch.arange(batch, device=device)[:, None] % config.vocab_size
        return cls(model, ids, cache, context)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        # transformers renames it.
        takes_cache = "cache" in signature(LlamaForCausalLM.forward).parameters
        cache = {"cache" if takes_cache else "past_key_values": self.cache}
        logits: Tensor = self.model(input_ids=self.ids, use_cache=True, **cache).logits
        return logits

    def rewind(self) -> None:
        """Forget the token."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)


@dataclass(frozen=True)
class Compiled:
    """One token of an arm, from then on as a CUDA graph, where there is a GPU."""

    token: Token
    run: Callable[[], Any]
    logits: Tensor
    seconds: float
    fused: int


@dataclass(frozen=True)
class Steps:
    """One model, and its twin with converted weights."""

    sizes: Sizes = Sizes()

    @cached_property
    def plain(self) -> LlamaForCausalLM:
        values = {**json.loads(LLAMA.read_text()), **self.sizes.config}
        torch.manual_seed(0)
        with torch.device(self.sizes.device):
            model: Any = LlamaForCausalLM(LlamaConfig.from_dict(values))
        return model.to(torch.bfloat16).eval()  # type: ignore[no-any-return]

    @cached_property
    def converted(self) -> LlamaForCausalLM:
        model = copy.deepcopy(self.plain)
        mxnorm_pass.convert(model, {"quantize": "all"}, progress=False)
        return model

    def model(self, arm: str) -> LlamaForCausalLM:
        return self.converted if ARMS[arm].converted else self.plain

    def token(self, arm: str, batch: int) -> Token:
        return Token.of(self.model(arm), batch, self.sizes.context)

    @quiet()
    def compiled(self, arm: str, batch: int) -> Compiled:
        torch._dynamo.reset()
        options: dict[str, Any] = {"dynamic": False}
        chosen = ARMS[arm].options
        if chosen is not None:
            options |= {"backend": "mxnorm", "options": dict(chosen)}
        token = self.token(arm, batch)
        token = replace(token, model=torch.compile(token.model, **options))
        token.rewind()
        begun = time.perf_counter()
        with mxnorm_pass.record() as report:
            logits = token().clone()
        seconds = time.perf_counter() - begun
        return Compiled(token, replayed(token), logits, seconds, len(report.fused))

    @torch._dynamo.config.patch(recompile_limit=COMPILES)
    def measure(self, arms: Sequence[str], batch: int, rounds: int) -> list[Measured]:
        """All arms of one batch, in turns."""
        expected = {}
        for arm in dict.fromkeys((BASELINE, *arms)):
            token = self.token(arm, batch)
            token.rewind()
            expected[arm] = token()
        made = {arm: self.compiled(arm, batch) for arm in expected}

        def rewind() -> None:
            for own in made.values():
                own.token.rewind()

        runs = {arm: own.run for arm, own in made.items()}
        times: dict[str, Any] = {"device": self.sizes.device, "before": rewind}
        interleaved(runs, rounds=3, **times)
        samples = interleaved(runs, rounds=rounds, **times)
        return [
            Measured(
                arm=arm,
                batch=batch,
                layers=self.plain.config.num_hidden_layers,
                time=Timing.of(samples[arm]),
                bf16=Timing.of(samples[BASELINE]),
                weight_bytes=weight_bytes(self.model(arm)),
                compile_seconds=own.seconds,
                error=distance(own.logits, expected[arm]),
                fused=own.fused,
            )
            for arm, own in made.items()
        ]


def replayed(token: Token) -> Callable[[], Any]:
    """What Python takes is not in its time."""
    if not token.ids.is_cuda:
        return token
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        token()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = token()
    return lambda: (graph.replay(), kept)


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(
        part.nbytes
        for tensor in {id(p): p for p in model.parameters()}.values()
        for part in parts_of(tensor)
    )


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor of a library consists of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in parts_of(getattr(tensor, name))]


def table(measured: Sequence[Measured]) -> list[str]:
    """Milliseconds as Markdown."""
    if not measured:
        return []
    columns = ("", "layers", "batch", "ms", "over bf16", "GiB of weights", "error", "compile s")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for m in measured:
        cells = [str(m.layers), str(m.batch), f"{m.time.us / 1e3:.3f}", f"{m.speed_up:.2f}x"]
        cells += [f"{m.weight_bytes / 2**30:.2f}", f"{m.error:.1e}", f"{m.compile_seconds:.0f}"]
        lines.append(f"| {m.arm} | {' | '.join(cells)} |")
    return lines
