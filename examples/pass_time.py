"""How the pass's time grows with the graph, and its share of the whole compile.

    python examples/pass_time.py
    python examples/pass_time.py --layers 8 16 32 64 --inner aot_eager
    python examples/pass_time.py --format nvfp4
    python examples/pass_time.py --converted --json pass_time.json

Each row compiles a training step (loss and backward) of a narrow Llama from cold caches: the
pass's time depends on the number of nodes in the graph, not on the size of the tensors. The
compile's time is that of the first step less that of a second one.
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from benchlib import invocation, save_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from transformers import LlamaConfig, LlamaForCausalLM

import mxnorm_pass
from mxnorm_pass.options.validate import Format

HIDDEN = 128
VOCAB = 256
TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One compile.

    Attributes:
        nodes: op calls in the joint graph that the pass was given.
        fused: norms that the pass rewrote.
        growth: of the pass's time against the row before; None in the first row.
        node_growth: the same of the nodes.
    """

    layers: int
    nodes: int
    fused: int
    pass_seconds: float
    compile_seconds: float
    growth: float | None
    node_growth: float | None

    @property
    def share(self) -> float:
        return self.pass_seconds / self.compile_seconds


class PassTimes(logging.Handler):
    """Collects the seconds that the backend logs for each graph."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "pass took" in str(record.msg) and isinstance(record.args, tuple):
            self.seconds.append(float(str(record.args[-1])))


@contextmanager
def pass_times() -> Iterator[PassTimes]:
    logger = logging.getLogger("mxnorm_pass")
    handler, level = PassTimes(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time of the pass against the size of the graph.")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--format", choices=get_args(Format), default="mxfp8", help="of the casts")
    parser.add_argument(
        "--converted",
        action="store_true",
        help="convert the linears to torchao's MXFP8Linear, so that the casts are in the graph",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows")
    args = parser.parse_args(argv)
    if min(args.layers) < 1:
        parser.error("--layers must be positive")
    if args.converted and args.format != "mxfp8":
        parser.error(f"--converted casts to mxfp8, not to {args.format}")
    return args


def build_model(layers: int, dtype: torch.dtype, converted: bool) -> nn.Module:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=TOKENS,
    )
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config)
    model = model.to(dtype)
    if converted:
        convert_linears(model)
    return model


def convert_linears(model: nn.Module) -> None:
    """Put torchao's MXFP8 training linear in place of every linear but the head."""
    from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear) or name == "lm_head":
                continue
            new = MXFP8Linear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                kernel_preference=KernelPreference.EMULATED,
                dtype=linear.weight.dtype,
            )
            new.weight, new.bias = linear.weight, linear.bias
            setattr(parent, name, new)


def measure(layers: int, args: argparse.Namespace, previous: Row | None) -> Row:
    torch._dynamo.reset()
    model = build_model(layers, getattr(torch, args.dtype), args.converted)
    options = {"inner": args.inner, "format": args.format}
    compiled = torch.compile(model, backend="mxnorm", options=options)
    ids = torch.arange(TOKENS).view(1, TOKENS) % VOCAB
    with cold_caches(), pass_times() as times, mxnorm_pass.record() as report:
        first = step_seconds(compiled, ids)
        second = step_seconds(compiled, ids)
    graphs = [graph for graph in report.graphs if graph.name.startswith("training")]
    nodes, seconds = sum(sum(g.ops_before.values()) for g in graphs), sum(times.seconds)
    row = Row(
        layers=layers,
        nodes=nodes,
        fused=len(report.fused),
        pass_seconds=seconds,
        compile_seconds=first - second,
        growth=seconds / previous.pass_seconds if previous else None,
        node_growth=nodes / previous.nodes if previous else None,
    )
    del compiled, model
    gc.collect()
    return row


@contextmanager
def cold_caches() -> Iterator[None]:
    # Kernels that an earlier row compiled are found again in an old cache folder, whatever
    # force_disable_caches says.
    patch = torch.compiler.config.patch  # type: ignore[attr-defined]
    with patch(force_disable_caches=True), fresh_cache():
        yield


def step_seconds(compiled: Any, ids: Tensor) -> float:
    start = time.perf_counter()
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return time.perf_counter() - start


def table(rows: list[Row], title: str) -> Table:
    shown = Table(title=title)
    for column in ("layers", "nodes", "growth", "fused", "pass s", "growth", "compile s", "share"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            str(row.layers),
            str(row.nodes),
            factor(row.node_growth),
            str(row.fused),
            f"{row.pass_seconds:.3f}",
            factor(row.growth),
            f"{row.compile_seconds:.2f}",
            f"{row.share:.1%}",
        )
    return shown


def factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def save(path: Path, rows: list[Row], args: argparse.Namespace) -> None:
    entry = {
        **invocation(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "inner": args.inner,
        "dtype": args.dtype,
        "format": args.format,
        "converted": args.converted,
        "rows": [{**asdict(row), "share": row.share} for row in rows],
    }
    save_json(path, entry)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    console = Console()
    # Imports and what torch does once per process would land in the first row.
    measure(1, args, None)
    rows: list[Row] = []
    for layers in args.layers:
        rows.append(measure(layers, args, rows[-1] if rows else None))
        if console.is_terminal:
            console.print(f"{layers} layers: {rows[-1].compile_seconds:.1f} s")
    model = "MXFP8Linear Llama" if args.converted else f"plain Llama, {args.format} casts"
    console.print(table(rows, f"{model}, {args.dtype}, {args.inner}, torch {torch.__version__}"))
    if args.json:
        save(args.json, rows, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
