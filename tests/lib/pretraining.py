"""Small texts and runs for the tests of pre-training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prepare_text
import pytest
from pretrain_settings import SIZES, Run, Size, new_run

RANDOM_RECIPE = {"recipe": "mxfp4-rht-sr", "norm": "mxnorm", "forward": "mxfp8"}
PLAIN = {"recipe": "bf16", "norm": "rmsnorm", "inner": "eager"}


def write_sources(folder: Path, files: int = 40) -> list[bytes]:
    """Small programs, whose words a model learns soon."""
    draw = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "total", "value"]
    contents = []
    folder.mkdir(parents=True)
    for i in range(files):
        lines = [
            f"def {draw.choice(names)}_{draw.randrange(30)}({draw.choice(names)}):\n"
            f"    return {draw.choice(names)} + {draw.randrange(100)}\n"
            for _ in range(40)
        ]
        contents.append("".join(lines).encode())
        (folder / f"file_{i}.py").write_bytes(contents[-1])
    return contents


def prepare(sources: Path, out: Path, *more: str) -> prepare_text.Provenance:
    arguments = [f"data={sources}", "--vocab-size", "320", "--held-out", "0.2", "--out", str(out)]
    return prepare_text.prepare(prepare_text.parse_args([*arguments, *more]))


def prepared(root: Path) -> Path:
    """A folder with a prepared text."""
    write_sources(root / "sources")
    prepare(root / "sources", root / "out")
    return root / "out"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextmanager
def tiny_size(layers: int = 1) -> Iterator[None]:
    """With a size "tiny"."""
    size = Size(64, 96, layers, 1, sequence=32, batch=4, steps=6, lr=1e-2, held_out_rows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", size)
        yield


def tiny_run(**given: Any) -> Run:
    return new_run("tiny", **{"log_every": 1, **given})


def write_run(folder: Path, recipe: str, norm: str, seed: int, loss: float | None) -> None:
    run = new_run("30m", norm, recipe, seed=seed, device="cpu")
    header = {"kind": "run", "run": vars(run), "text": "0", "machine": {}, "parameters": 30_000_000}
    steps = [{"kind": "step", "step": i, "loss": 700.0 - i + seed} for i in range(2, 701, 2)]
    end = {"kind": "diverged", "step": 700, "error": "loss nan"}
    if loss is not None:
        numbers = {"tokens_per_s": 100.0 + seed, "peak_memory_bytes": 2**30, "seconds": 1.0}
        end = {"kind": "end", "step": 700, "loss": loss, "held_out_tokens": 64, **numbers}
    content = "".join(json.dumps(line) + "\n" for line in (header, *steps, end))
    (folder / f"{recipe}_{norm}_{seed}.jsonl").write_text(content)
