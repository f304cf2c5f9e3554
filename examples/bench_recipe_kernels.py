"""What ``bench_recipes.py`` measures of kernels: casts along both dimensions, as recipes say.

Of a gradient dY [T, N], read by dgrad along N and by wgrad along T, and of a norm, read by the
forward along D and by wgrad along T. Results are packed, values and scales, or dequantised to bf16;
a norm's along T, which wait for the backward, are always packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import bench_nested
import torch
from bench_checks import bits, poison, unwritten
from bench_contestants import cast_bytes
from bench_kernels import Entry, calls_that_move, capture, copies, time_entries
from benchlib import Timing
from torch import Tensor

from mxnorm_pass import functional
from mxnorm_pass.functional import MatmulRecipe, Recipe
from mxnorm_pass.kernels.norm_cast import norm_cast
from mxnorm_pass.kernels.norm_cast_both import norm_cast_both
from mxnorm_pass.kernels.operand_casts import operand_casts
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.numerics.matmul import Operand, transform_operand
from mxnorm_pass.numerics.norm_cast import NormCastSpec
from mxnorm_pass.numerics.philox import Draw, Use

RECIPES = ("mxfp8", "mxfp4", "mxfp4-sr", "mxfp4-rht", "mxfp4-rht-sr", "nvfp4")
# Of norms: one whose casts are alike, and one whose cast along T is transformed and stochastic.
NORM_RECIPES = ("mxfp8", "mxfp4-rht-sr")
TOKENS = 8192
WIDTHS = (4096, 14336)
NORM_WIDTH = 4096
HIGH = torch.bfloat16
# As long as those of a model, whose halves are no special numbers.
KEY, RIGHT_KEY = 0x1DE6ECE66D5BF036, 0x3C6EF372FE94F82B

Source = Literal["gradient", "norm"]
Form = Literal["packed", "bf16"]
FORMS: tuple[Form, ...] = ("packed", "bf16")
Call = Callable[[Tensor], tuple[Tensor, ...]]


def recipe_option(name: str) -> str | dict[str, str]:
    """The backend's option; recipes whose forward is of high precision have it in MXFP8."""
    has_forward = functional.RECIPES[name].forward.left.format is not None
    return name if has_forward else {"base": name, "forward": "mxfp8"}


@dataclass(frozen=True)
class Case:
    source: Source
    recipe: str
    form: Form
    width: int
    tokens: int = TOKENS

    def __str__(self) -> str:
        return f"{self.source} {self.recipe} {self.tokens}x{self.width} {self.form}"

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """Along rows, and along T."""
        recipe: Recipe = functional.recipe(recipe_option(self.recipe))
        if self.source == "gradient":
            return left_of(recipe.dgrad, "dgrad"), left_of(recipe.wgrad, "wgrad")
        wgrad = recipe.wgrad
        of_input = Operand(wgrad.right, wgrad.hadamard, "wgrad", Use.RIGHT)
        return left_of(recipe.forward, "forward"), of_input

    @property
    def form_along_t(self) -> Form:
        return "packed" if self.source == "norm" else self.form

    @property
    def is_random(self) -> bool:
        return any(operand.is_random for operand in self.operands)

    @property
    def bytes(self) -> int:
        """Read and written by whoever reads x once; rho and scales of tensors are not counted."""
        gain = 2 * self.width if self.source == "norm" else 0
        rows, along_t = self.operands
        written = written_bytes(rows, self.tokens, self.width, self.form)
        written += written_bytes(along_t, self.width, self.tokens, self.form_along_t)
        return 2 * self.tokens * self.width + gain + written

    @property
    def calls(self) -> int:
        return calls_that_move(self.bytes)


def left_of(matmul: MatmulRecipe, name: Any) -> Operand:
    return Operand(matmul.left, matmul.hadamard, name, Use.LEFT)


def written_bytes(operand: Operand, rows: int, columns: int, form: Form) -> int:
    fmt = operand.cast.format
    assert fmt is not None
    return 2 * rows * columns if form == "bf16" else cast_bytes(rows, columns, fmt)


def cases(recipes: Sequence[str]) -> list[Case]:
    """Those of norms last."""
    of_gradients = product(["gradient"], recipes, FORMS, WIDTHS)
    of_norms = product(["norm"], [r for r in NORM_RECIPES if r in recipes], FORMS, [NORM_WIDTH])
    return [Case(*names) for names in (*of_gradients, *of_norms)]  # type: ignore[arg-type]


def draw(case: Case, count: int, device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": HIGH, "generator": generator}
    return [3 * torch.randn(case.tokens, case.width, **options) for _ in range(count)]


def reads(case: Case, x: Tensor) -> tuple[OperandRead, OperandRead]:
    """What kernels are told, with scales of the tensor that fit x."""
    seed = torch.tensor(2**61 + 7, device=x.device)

    def read(operand: Operand, source: Tensor, form: Form) -> OperandRead:
        key = KEY if operand.use is Use.LEFT else RIGHT_KEY
        drawn = Draw(seed + key, operand.matmul, seed + RIGHT_KEY)
        fmt, scale = operand.cast.format, None
        if fmt is not None and not fmt.has_e8m0_scales:
            transformed = transform_operand(source, operand.hadamard, drawn)
            scale = functional.nvfp4_tensor_scale(transformed)
        wide = HIGH if form == "bf16" else None
        given = seed if operand.is_random else None
        return OperandRead(operand, given, key, RIGHT_KEY, scale, wide)

    rows, along_t = case.operands
    return read(rows, x, case.form), read(along_t, x.t(), case.form_along_t)


def contestants(case: Case, x: Tensor) -> dict[str, Call]:
    """Who casts x and its like; all have the same results."""
    rows, along_t = reads(case, x)
    if case.source == "norm":
        return norm_contestants(case, x, rows, along_t)
    found: dict[str, Call] = {
        "kernel": lambda x: operand_casts(x, rows, along_t),
        "two calls": lambda x: (*operand_casts(x, rows, None), *operand_casts(x, None, along_t)),
    }
    if not case.is_random:
        options: Any = bench_nested.OPTIONS if bench_nested.has_option() else None
        found["Inductor"] = torch.compile(
            partial(cast_both, rows, along_t), fullgraph=True, dynamic=False, options=options
        )
    return found


def cast_both(rows: OperandRead, along_t: OperandRead, x: Tensor) -> tuple[Tensor, ...]:
    """By ``functional``, of what is not random."""
    return (*cast(x, rows), *cast(x.t().contiguous(), along_t))


def cast(x: Tensor, read: OperandRead) -> tuple[Tensor, ...]:
    operand = read.operand
    quantized = functional.cast_operand(
        x, operand.cast, hadamard=operand.hadamard, tensor_scale=read.tensor_scale
    )
    if read.dequantize is None:
        return quantized.values, quantized.scales
    return (quantized.dequantize(read.dequantize),)


def norm_contestants(
    case: Case, x: Tensor, rows: OperandRead, along_t: OperandRead
) -> dict[str, Call]:
    """One kernel, and what does the same without it: rows, the norm for itself, its cast."""
    fmt = rows.operand.cast.format
    assert fmt is not None
    spec = NormCastSpec(bench_nested.EPS, "mxnorm", 2.0, fmt, HIGH, HIGH, "row-major")
    weight = 1 + 0.1 * torch.randn(case.width, device=x.device).to(HIGH)
    # A cast like that of the rows is what the kernel makes where it is told nothing.
    alike = along_t.operand.is_plain and along_t.operand.cast == rows.operand.cast
    told = None if alike else along_t
    normalize = torch.compile(functional.normalize, fullgraph=True, dynamic=False)

    def two_calls(x: Tensor) -> tuple[Tensor, ...]:
        *of_rows, rho = norm_cast(x, weight, None, spec, dequantize=rows.dequantize)
        y = normalize(x, rho, weight, HIGH, HIGH)
        return (*of_rows, rho, *operand_casts(y, None, along_t))

    return {
        "kernel": lambda x: norm_cast_both(
            x, weight, None, spec, True, dequantize=rows.dequantize, along_t=told
        ),
        "two calls": two_calls,
    }


@dataclass(frozen=True)
class Measured:
    """Times of one case.

    Attributes:
        bytes: of a call, as many as the copy moves.
        unwritten: elements that a contestant left out.
        differing: share of the elements in which a contestant is not bit for bit the kernel.
        failures: who failed, and why.
    """

    case: Case
    bytes: int
    calls: int
    times: dict[str, Timing]
    unwritten: dict[str, int]
    differing: dict[str, float]
    failures: dict[str, str]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measured:
        times = {name: Timing(**t) for name, t in entry["times"].items()}
        return cls(**{**entry, "case": Case(**entry["case"]), "times": times})

    def __str__(self) -> str:
        times = " ".join(f"{name} {timing.us:.1f}" for name, timing in self.times.items())
        failures = (f"; {name} failed: {text}" for name, text in self.failures.items())
        return f"{self.case}: {times} us" + "".join(failures)


@torch.no_grad()
def measure(case: Case, rounds: int) -> Measured:
    torch._dynamo.reset()
    sets = draw(case, case.calls)
    entries = {"copy": capture(copies(case, "copy-memcpy"))}
    failures: dict[str, str] = {}
    for name, call in contestants(case, sets[0]).items():
        try:
            entries[name] = capture([partial(outputs_of, call, x) for x in sets])
        except Exception as error:  # one contestant's failure is a result, not the end
            failures[name] = f"{type(error).__name__}: {str(error).strip()[:500]}"
    for entry in entries.values():
        for outputs in entry.outputs:
            poison(outputs)
    times = time_entries(case, entries, rounds)
    own = {name: entry for name, entry in entries.items() if name != "copy"}
    left = {name: sum(map(unwritten, entry.outputs)) for name, entry in own.items()}
    others = own.keys() - {"kernel"} if "kernel" in own else set()
    differing = {name: share_differing(own[name], own["kernel"]) for name in sorted(others)}
    return Measured(case, case.bytes, case.calls, times, left, differing, failures)


def outputs_of(call: Call, x: Tensor) -> dict[str, Tensor]:
    return {str(i): result for i, result in enumerate(call(x))}


def share_differing(entry: Entry, other: Entry) -> float:
    pairs = list(zip(entry.outputs[0].values(), other.outputs[0].values(), strict=True))
    differing = sum(int((bits(a) != bits(b)).sum()) for a, b in pairs)
    return differing / sum(a.numel() for a, _ in pairs)


def compile_jobs(planned: Sequence[Case]) -> Iterator[partial[None]]:
    """Each kernel once: those of gradients are the same at every width."""
    for case in planned:
        first = case.source == "norm" or case.width == min(WIDTHS)
        names = ("kernel", "two calls") if first else ()
        for name in names if case.is_random or case.source == "norm" else (*names, "Inductor"):
            yield partial(compile_once, case, name)


@torch.no_grad()
def compile_once(case: Case, name: str) -> None:
    (x,) = draw(case, 1)
    contestants(case, x)[name](x)


CONTESTANTS = ("copy", "kernel", "two calls", "Inductor")


def table(measured: Sequence[Measured]) -> list[str]:
    """Microseconds as Markdown, a row for the packed and the dequantised results of a case."""
    if not measured:
        return []
    columns = [f"{form}: {name}" for form in FORMS for name in (*CONTESTANTS, "of the copy")]
    lines = [f"| x | recipe | width | {' | '.join(columns)} |", "| --- " * (3 + len(columns)) + "|"]
    of_form = {(m.case.source, m.case.recipe, m.case.width, m.case.form): m for m in measured}
    for source, recipe, width in dict.fromkeys(key[:3] for key in of_form):
        cells = [cell for f in FORMS for cell in cells_of(of_form.get((source, recipe, width, f)))]
        lines.append(f"| {source} | {recipe} | {width} | {' | '.join(cells)} |")
    return lines


def cells_of(measured: Measured | None) -> list[str]:
    times = {} if measured is None else measured.times
    cells = [f"{times[name].us:.1f}" if name in times else "" for name in CONTESTANTS]
    both = "copy" in times and "kernel" in times
    return [*cells, f"{times['copy'].us / times['kernel'].us:.2f}" if both else ""]
