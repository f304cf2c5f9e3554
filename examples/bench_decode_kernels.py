"""What ``bench_decode.py`` measures of linears: few rows times a weight in MXFP8 or in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from bench_checks import Outputs, poison, unwritten
from bench_kernels import calls_that_move, capture, copies, time_entries
from benchlib import Timing
from torch import Tensor

from mxnorm_pass import functional

# Of Llama-3-8B, [N, K]. Keys and values have few rows.
SHAPES = {
    "q_proj, o_proj": (4096, 4096),
    "k_proj, v_proj": (1024, 4096),
    "gate_proj, up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
ROWS = (1, 4, 16, 32, 64)
CONTESTANTS = ("copy", "kernel", "bf16")


@dataclass(frozen=True)
class Case:
    """A linear and the rows that it is given.

    Attributes:
        layer: a key of ``SHAPES``.
    """

    layer: str
    columns: int
    width: int
    rows: int

    @property
    def bytes(self) -> int:
        """In MXFP8: x, weight, and y in bf16."""
        read = (self.columns + self.rows) * self.width * 33 // 32
        return read + 2 * self.rows * self.columns

    @property
    def calls(self) -> int:
        return calls_that_move(self.bytes)

    def __str__(self) -> str:
        return f"{self.layer} {self.columns}x{self.width}, {self.rows} rows"


def cases(rows: Sequence[int]) -> list[Case]:
    return [Case(name, *SHAPES[name], count) for name, count in product(SHAPES, rows)]


@dataclass(frozen=True)
class Operands:
    """Of one call: x [M, K] and weight [N, K] in MXFP8, and what they are in bf16."""

    x: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]
    wide_x: Tensor
    wide_weight: Tensor

    @classmethod
    def random(cls, case: Case) -> Operands:
        def cast(rows: int) -> tuple[Tensor, Tensor]:
            matrix = torch.randn(rows, case.width, device="cuda", dtype=torch.bfloat16)
            return functional.mx_cast(matrix)

        def widen(operand: tuple[Tensor, Tensor]) -> Tensor:
            return functional.mx_dequantize(*operand, torch.bfloat16)

        x, weight = cast(case.rows), cast(case.columns)
        return cls(x, weight, widen(x), widen(weight))


def kernel(operands: Operands) -> Outputs:
    from mxnorm_pass.kernels.mx_linear import mx_linears

    values, scales = operands.weight
    (y,) = mx_linears(*operands.x, [values], [scales], [None], torch.bfloat16)
    return {"y": y}


def bf16(operands: Operands) -> Outputs:
    return {"y": operands.wide_x @ operands.wide_weight.t()}


@dataclass(frozen=True)
class Measured:
    """Times of one case.

    Attributes:
        unwritten: elements that the kernel left out.
        error: of the kernel, relative to float64's result (Frobenius); ``bf16_error`` that of bf16.
    """

    case: Case
    times: dict[str, Timing]
    unwritten: int
    error: float
    bf16_error: float

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measured:
        times = {name: Timing(**t) for name, t in entry["times"].items()}
        return cls(**{**entry, "case": Case(**entry["case"]), "times": times})

    def __str__(self) -> str:
        times = " ".join(f"{name} {timing.us:.2f}" for name, timing in self.times.items())
        return f"{self.case}: {times} us; error {self.error:.1e}, bf16 {self.bf16_error:.1e}"


@torch.no_grad()
def measure(case: Case, rounds: int) -> Measured:
    sets = [Operands.random(case) for _ in range(case.calls)]
    calls: dict[str, Callable[[Operands], Outputs]] = {"kernel": kernel, "bf16": bf16}
    entries = {"copy": capture(copies(case, "copy-memcpy"))}
    entries |= {
        name: capture([partial(call, operands) for operands in sets])
        for name, call in calls.items()
    }
    for entry in entries.values():
        for outputs in entry.outputs:
            poison(outputs)
    times = time_entries(case, entries, rounds)
    first = sets[0]
    want = first.wide_x.double() @ first.wide_weight.double().t()
    errors = [distance(entries[name].outputs[0]["y"], want) for name in calls]
    left = sum(map(unwritten, entries["kernel"].outputs))
    return Measured(case, times, left, *errors)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@torch.no_grad()
def compile_jobs(planned: Sequence[Case]) -> Iterator[partial[None]]:
    for case in planned:
        yield partial(compile_once, case)


def compile_once(case: Case) -> None:
    kernel(Operands.random(case))


def table(measured: Sequence[Measured]) -> list[str]:
    """Microseconds as Markdown."""
    if not measured:
        return []
    columns = ("linear", "N x K", "rows", *CONTESTANTS, "of the copy", "over bf16")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for m in measured:
        times = [m.times[name].us for name in CONTESTANTS]
        copy, own, wide = times
        cells = [f"{us:.1f}" for us in times] + [f"{copy / own:.2f}", f"{wide / own:.2f}x"]
        shape = f"{m.case.columns} x {m.case.width}"
        lines.append(f"| {m.case.layer} | {shape} | {m.case.rows} | {' | '.join(cells)} |")
    return lines
