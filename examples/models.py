"""What the pass finds in each architecture: norms, fused, skipped by reason.

    python examples/models.py
    python examples/models.py Llama Gemma-3 --training
    python examples/models.py --markdown --json models.json
    python examples/models.py --write examples/README.md

Every model is an unmodified class with a small config and random weights. `--write` puts the table
between the markers of a Markdown file, `--check` fails where that table is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from benchlib import save_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Report

LAYERS = 2
HIDDEN = 64
HEADS = 2
VOCAB = 64
BEGIN, END = "<!-- begin examples/models.py -->", "<!-- end examples/models.py -->"

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    # As many as query heads: under torch.compile transformers sums the gradients of grouped keys
    # and values in another order than in eager mode.
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCAB,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
T5 = {"d_kv": HIDDEN // HEADS, "d_ff": 2 * HIDDEN, "num_decoder_layers": LAYERS}
LATENT_ATTENTION = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32} | {
    "qk_rope_head_dim": 32, "v_head_dim": 32, "n_group": 2, "topk_group": 1
}  # fmt: skip


def hf(class_name: str, **overrides: Any) -> Callable[[], nn.Module]:
    """A class of transformers with a small config; ``overrides`` are config fields."""

    def build() -> nn.Module:
        model_class = getattr(transformers, class_name)
        model: nn.Module = model_class(model_class.config_class(**{**COMMON, **overrides}))
        return model

    return build


class TitanBlock(nn.Module):
    """A pre-norm transformer block as torchtitan writes them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(dim, eps=1e-5) for _ in range(2))
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (
            w(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class TitanTransformer(nn.Module):
    """Embedding, blocks, ``nn.RMSNorm`` and output, named as in torchtitan."""

    def __init__(self, dim: int = HIDDEN) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleDict({str(i): TitanBlock(dim) for i in range(LAYERS)})
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.output = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok_embeddings(input_ids)
        for layer in self.layers.values():
            x = layer(x)
        logits: Tensor = self.output(self.norm(x))
        return logits


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "Llama": hf("LlamaForCausalLM"),
    "Mistral": hf("MistralForCausalLM"),
    "Qwen2": hf("Qwen2ForCausalLM"),
    "Qwen3": hf("Qwen3ForCausalLM"),
    "Phi-3": hf("Phi3ForCausalLM"),
    "Gemma": hf("GemmaForCausalLM"),
    "Gemma-2": hf("Gemma2ForCausalLM"),
    "Gemma-3": hf("Gemma3ForCausalLM"),
    "OLMo-2": hf("Olmo2ForCausalLM"),
    "Granite": hf("GraniteForCausalLM"),
    "SmolLM3": hf("SmolLM3ForCausalLM"),
    "DeepSeek-V3": hf("DeepseekV3ForCausalLM", **MOE, **LATENT_ATTENTION, first_k_dense_replace=1),
    "Mixtral": hf("MixtralForCausalLM", **MOE),
    "Qwen3-MoE": hf("Qwen3MoeForCausalLM", **MOE),
    "GPT-OSS": hf("GptOssForCausalLM", **MOE),
    "AIMv2 (vision)": hf("Aimv2VisionModel"),
    "Pixtral (vision)": hf("PixtralVisionModel"),
    "T5": hf("T5ForConditionalGeneration", **T5),
    "torchtitan, nn.RMSNorm": TitanTransformer,
    "GPT-2 (LayerNorm)": hf("GPT2LMHeadModel"),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The architecture with seeded weights, in eval mode."""
    torch.manual_seed(0)
    return ARCHITECTURES[name]().to(dtype).eval()


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for ``model``: seeded tokens, or an image for a vision model."""
    random = torch.Generator().manual_seed(1)
    if getattr(model, "main_input_name", "") == "pixel_values":
        image = torch.randn(2, 3, 32, 32, generator=random)
        return {"pixel_values": image.to(next(model.parameters()).dtype)}
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, VOCAB, (2, 16), generator=random)}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    return inputs | ({"use_cache": False} if hasattr(config, "use_cache") else {})


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        norms: norms in its graphs, all layers together.
        skipped: by reason, how often each norm was skipped, by the last part of its name.
        graphs: graphs that torch.compile made of the model; more than 1 where it breaks.
    """

    model: str
    norms: int
    fused: int
    skipped: dict[str, dict[str, int]]
    graphs: int

    @classmethod
    def of(cls, model: str, report: Report) -> Row:
        skipped: dict[str, Counter[str]] = {}
        for site in report.skipped:
            assert site.reason is not None
            last_part = site.norm.rpartition(".")[2]
            skipped.setdefault(site.reason.name, Counter())[last_part] += 1
        by_reason = {reason: dict(names) for reason, names in skipped.items()}
        return cls(model, len(report.sites), len(report.fused), by_reason, len(report.graphs))

    @property
    def cells(self) -> tuple[str, ...]:
        skipped = "; ".join(f"{reason}: {_counted(n)}" for reason, n in self.skipped.items())
        return self.model, str(self.norms), str(self.fused), skipped, str(self.graphs)


COLUMNS = ("model", "norms", "fused", "skipped", "graphs")


def _counted(names: dict[str, int]) -> str:
    return ", ".join(f"{n}× {name}" if n > 1 else name for name, n in names.items())


def measure(name: str, training: bool = False) -> Row:
    """Trace the architecture, with its backward if ``training``; nothing is compiled or run."""
    torch._dynamo.reset()
    model = build(name)
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore", mxnorm_pass.MXNormWarning)
        return Row.of(name, mxnorm_pass.explain(model, **example_inputs(model)))


def markdown(rows: Sequence[Row]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


_SECTION = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?=\n{re.escape(END)})", re.DOTALL)


def table_in(text: str) -> str:
    """The table between the markers of a Markdown text."""
    found = _SECTION.search(text)
    if found is None:
        raise ValueError(f"no table between {BEGIN} and {END}")
    return found[0]


def with_table(text: str, table: str) -> str:
    """The text with another table between its markers."""
    table_in(text)
    return _SECTION.sub(lambda _: table, text)


def shown(rows: Sequence[Row], title: str) -> Table:
    table = Table(*COLUMNS, title=title)
    for row in rows:
        table.add_row(*row.cells)
    return table


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the pass finds in each architecture.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(ARCHITECTURES))
    parser.add_argument("--training", action="store_true", help="trace the backward too")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--write", type=Path, metavar="FILE", help="update the table in FILE")
    files.add_argument("--check", type=Path, metavar="FILE", help="fail if FILE's table is old")
    args = parser.parse_args(argv)
    unknown = set(args.models) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    for path in filter(None, (args.write, args.check)):
        try:
            table_in(path.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    rows = [measure(name, args.training) for name in args.models or ARCHITECTURES]
    table = markdown(rows)
    if args.markdown:
        print(table)
    elif not (args.write or args.check):
        kind = "training" if args.training else "inference"
        Console().print(shown(rows, f"{LAYERS} layers, {kind}, torch {torch.__version__}"))
    if args.json:
        entry = {"torch": torch.__version__, "transformers": transformers.__version__}
        saved = {**entry, "training": args.training, "rows": [asdict(row) for row in rows]}
        save_json(args.json, saved)
    if args.write:
        args.write.write_text(with_table(args.write.read_text(), table))
    if args.check and table_in(args.check.read_text()) != table:
        print(f"{args.check} is out of date: run {Path(__file__).name} --write {args.check}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
