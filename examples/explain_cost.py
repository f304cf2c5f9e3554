"""What ``python -m mxnorm_pass explain`` takes: CPU seconds and memory of the whole process.

    python examples/explain_cost.py
    python examples/explain_cost.py --model path/to/config.json --json explain_cost.json

Each row is one run in a process of its own, on one thread, imports included. CPU seconds are those
of the user and of the system together, memory is the peak of what was resident.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from benchlib import save_json
from rich.console import Console
from rich.table import Table

CONFIGS = Path(__file__).parent / "configs"
MODELS = [CONFIGS / "llama-3-8b.json", CONFIGS / "llama-3-70b.json"]
# Linux counts the peak in KiB, macOS in bytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Row:
    """One run; memory in MiB."""

    config: str
    layers: int | None
    training: bool
    cpu_seconds: float
    peak_memory: float


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU seconds and memory of explain.")
    parser.add_argument(
        "--model", type=Path, nargs="+", default=MODELS, metavar="PATH", help="config.json files"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows")
    return parser.parse_args(argv)


def measure(config: Path, training: bool) -> Row:
    """Run the command on one thread.

    Raises:
        subprocess.CalledProcessError: it failed; what it wrote to stderr was shown.
    """
    command = [sys.executable, "-m", "mxnorm_pass", "explain", "--model", str(config)]
    command += ["--train"] if training else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Row(
        config=config.stem,
        layers=json.loads(config.read_text()).get("num_hidden_layers"),
        training=training,
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        peak_memory=round(usage.ru_maxrss * RSS_UNIT / 2**20),
    )


def table(rows: list[Row]) -> Table:
    shown = Table(title=f"explain, torch {torch.__version__}, one thread")
    for column in ("config", "layers", ""):
        shown.add_column(column)
    for column in ("CPU seconds", "peak memory"):
        shown.add_column(column, justify="right")
    for row in rows:
        what = "training" if row.training else "inference"
        memory = f"{row.peak_memory:.0f} MiB"
        shown.add_row(row.config, str(row.layers or ""), what, f"{row.cpu_seconds:.1f}", memory)
    return shown


def save(path: Path, rows: list[Row]) -> None:
    entry = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
        "units": {"cpu_seconds": "s", "peak_memory": "MiB"},
        "rows": [asdict(row) for row in rows],
    }
    save_json(path, entry)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        rows = [measure(config, training) for config in args.model for training in (False, True)]
    except subprocess.CalledProcessError as error:
        print(f"explain_cost.py: {error}", file=sys.stderr)
        return 1
    Console().print(table(rows))
    if args.json:
        save(args.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
