"""What the measurements of ``bench_kernels.py`` amount to: tables, verdicts and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench_checks import Check
from bench_contestants import COPIES, FORMATS, OURS, TUNED, VARIANTS
from benchlib import Timing
from rich import box
from rich.table import Table

TITLES = {
    "norm": "RMSNorm + cast",
    "residual": "residual add + RMSNorm + cast",
    "both": "RMSNorm + casts along D and along T",
}
COLUMNS = (
    "copy", "inductor", "inductor-tuned", "nested", "liger", "exact", "mxnorm", "mxnorm-fold",
)  # fmt: skip
# Whose times are divided by mxnorm's.
SLOWER = {"inductor": "inductor", "inductor-tuned": "tuned", "nested": "nested", "exact": "exact"}
# Both must reach the limits: with the gain in the kernel, and with the gain in the weights.
MXNORM = ("mxnorm", "mxnorm-fold")
MANY_TOKENS = 4096
# Over whom a format's mean speed-up is shown.
OPPONENTS = ("inductor", "nested")


@dataclass(frozen=True)
class Measured:
    """One shape: times of each contestant, checks of its outputs, and who failed and why.

    Attributes:
        format: of the cast.
        launched: how, of contestants that chose among several ways.
    """

    variant: str
    tokens: int
    width: int
    bytes: int
    calls: int
    times: dict[str, Timing]
    checks: dict[str, Check]
    failures: dict[str, str]
    compile_seconds: dict[str, float]
    format: str = "mxfp8"
    launched: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Measured:
        times = {name: Timing(**t) for name, t in entry["times"].items()}
        checks = {name: Check(**c) for name, c in entry["checks"].items()}
        return cls(**{**entry, "times": times, "checks": checks})

    def timing(self, name: str) -> Timing | None:
        """That of a contestant; "copy" and "inductor-tuned" are the fastest of their kind."""
        names = {"copy": COPIES, "inductor-tuned": TUNED}.get(name, (name,))
        found = [self.times[n] for n in names if n in self.times]
        return min(found, key=lambda t: t.us) if found else None

    def gbps(self, name: str) -> float | None:
        timing = self.timing(name)
        return None if timing is None else self.bytes / timing.us / 1e3

    def ratio(self, slow: str, fast: str) -> float | None:
        """How many times faster ``fast`` is than ``slow``; None where one was not measured."""
        a, b = self.timing(slow), self.timing(fast)
        return None if a is None or b is None else a.us / b.us


@dataclass(frozen=True)
class SpeedUp:
    """Of mxnorm over another, as the geometric mean over the shapes at which both ran."""

    mean: float
    shapes: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} of {self.shapes}"


@dataclass(frozen=True)
class Verdict:
    """One line of what must be shown; ``passed`` is None where nothing was measured for it."""

    claim: str
    found: str
    passed: bool | None


def at_least(claim: str, limit: float, found: Sequence[tuple[float, Measured | None]]) -> Verdict:
    if not found:
        return Verdict(claim, "not measured", None)
    worst, where = min(found, key=lambda pair: pair[0])
    place = f" at {where.tokens}x{where.width} {where.variant}" if where else ""
    return Verdict(claim, f"{worst:.3f}{place}", worst >= limit)


def ratios(
    cases: Iterable[Measured], slow: str, fast: Sequence[str]
) -> list[tuple[float, Measured | None]]:
    found = ((case.ratio(slow, name), case) for case in cases for name in fast)
    return [(ratio, case) for ratio, case in found if ratio is not None]


def speed_up(cases: Iterable[Measured], over: str) -> SpeedUp | None:
    found = [ratio for ratio, _ in ratios(cases, over, ["mxnorm"])]
    return SpeedUp(geometric_mean(found), len(found)) if found else None


def mean_ratio(cases: Iterable[Measured], slow: str) -> list[tuple[float, Measured | None]]:
    found = speed_up(cases, slow)
    return [(found.mean, None)] if found else []


def verdicts(cases: Sequence[Measured]) -> list[Verdict]:
    """What the kernels have to show, against these measurements."""

    def chosen(variant: str, condition: Callable[[Measured], bool]) -> list[Measured]:
        return [c for c in cases if c.variant == variant and condition(c)]

    def large(case: Measured) -> bool:
        return case.tokens * case.width >= 2**25 and case.width <= 16384

    def many(case: Measured) -> bool:
        return case.tokens >= MANY_TOKENS

    def both_shapes(case: Measured) -> bool:
        return case.tokens == 8192 and case.width in (4096, 8192)

    norm, residual = chosen("norm", many), chosen("residual", many)
    one_way = [c for c in cases if c.variant != "both"]
    share = "share of the copy's bandwidth"
    mean = f"geometric mean, T >= {MANY_TOKENS}, over"
    never = "never slower than"
    return [
        at_least(f"{share}, T*D >= 2^25: 0.95", 0.95,
                 ratios(chosen("norm", large), "copy", MXNORM)),
        at_least(f"{share}, with the residual: 0.93", 0.93,
                 ratios(chosen("residual", large), "copy", MXNORM)),
        at_least(f"{share}, both directions: 0.90", 0.90,
                 ratios(chosen("both", both_shapes), "copy", MXNORM)),
        at_least(f"{mean} inductor: 1.6", 1.6, mean_ratio(norm, "inductor")),
        at_least(f"{mean} inductor-tuned: 1.45", 1.45, mean_ratio(norm, "inductor-tuned")),
        at_least(f"{mean} inductor, with the residual: 1.2", 1.2,
                 mean_ratio(residual, "inductor")),
        at_least(f"{mean} inductor-tuned, with the residual: 1.2", 1.2,
                 mean_ratio(residual, "inductor-tuned")),
        at_least(f"{mean} nested: 1.0", 1.0, mean_ratio(norm, "nested")),
        at_least(f"{mean} nested, with the residual: 1.0", 1.0, mean_ratio(residual, "nested")),
        at_least(f"{never} inductor: 1.0", 1.0, ratios(one_way, "inductor", MXNORM)),
        at_least(f"{never} inductor-tuned: 1.0", 1.0, ratios(one_way, "inductor-tuned", MXNORM)),
        at_least(f"{never} nested: 1.0", 1.0, ratios(one_way, "nested", MXNORM)),
        not_slower_than_exact(cases),
        equal_to_functional(cases),
        nested_does_the_same(cases),
        everything_ran(cases),
    ]  # fmt: skip


def not_slower_than_exact(cases: Iterable[Measured]) -> Verdict:
    """Noise: the spread over the rounds, and the distance of "exact" from its own repetition."""
    claim = "mxnorm not slower than exact beyond noise"
    found = [c for c in cases if {"exact", "exact-repeat", "mxnorm"} <= c.times.keys()]
    if not found:
        return Verdict(claim, "not measured", None)
    slower = [c for c in found if beyond_noise(c)]
    ratio = geometric_mean([c.times["exact"].us / c.times["mxnorm"].us for c in found])
    where = ", ".join(f"{c.variant} {c.tokens}x{c.width}" for c in slower[:4])
    text = f"slower at {len(slower)} of {len(found)} shapes; geometric mean of exact/mxnorm "
    return Verdict(claim, f"{text}{ratio:.3f}" + (f" ({where})" if where else ""), not slower)


def beyond_noise(case: Measured) -> bool:
    exact, again, ours = (case.times[n] for n in ("exact", "exact-repeat", "mxnorm"))
    return ours.low > max(exact.high, again.high) + abs(exact.us - again.us)


def equal_to_functional(cases: Iterable[Measured]) -> Verdict:
    claim = "equal to functional: all written, 1e-4 of the elements differ, by one step"
    return close_to_functional(claim, cases, OURS, 1e-4)


def nested_does_the_same(cases: Iterable[Measured]) -> Verdict:
    """Inductor does not round the norm's output to bf16, which moves elements by a step."""
    claim = "nested does the same: all written, 0.1 of the elements differ, by one step"
    return close_to_functional(claim, cases, ("nested",), 0.1)


def close_to_functional(
    claim: str, cases: Iterable[Measured], names: Sequence[str], limit: float
) -> Verdict:
    checks = [check for c in cases for name, check in c.checks.items() if name in names]
    if not checks:
        return Verdict(claim, "not measured", None)
    left = sum(check.unwritten for check in checks)
    share = sum(check.differing for check in checks) / sum(check.compared for check in checks)
    steps = max(check.steps for check in checks)
    passed = left == 0 and share <= limit and steps <= 1
    return Verdict(claim, f"{left} unwritten, {share:.1e} differ, at most {steps} steps", passed)


def everything_ran(cases: Iterable[Measured]) -> Verdict:
    failed = sorted({f"{name}: {text}" for c in cases for name, text in c.failures.items()})
    return Verdict("every contestant ran", failed[0][:80] if failed else "yes", not failed)


def tables(cases: Sequence[Measured]) -> list[Table]:
    shown = []
    for format in FORMATS:
        of_format = [c for c in cases if c.format == format]
        shown += [times_table(variant, own) for _, variant, own in kinds(of_format)]
        if of_format:
            shown.append(verdict_table(verdicts(of_format), format))
    return [*shown, speed_up_table(cases)]


def kinds(cases: Sequence[Measured]) -> list[tuple[str, str, list[Measured]]]:
    """The cases of each format and variant that was measured."""
    found = (
        (format, variant, [c for c in cases if (c.format, c.variant) == (format, variant)])
        for format, variant in product(FORMATS, VARIANTS)
    )
    return [kind for kind in found if kind[2]]


def times_table(variant: str, cases: Sequence[Measured]) -> Table:
    """Time, bandwidth, share of the copy's, and the speed-up of mxnorm over the row's others."""
    title = f"{TITLES[variant]}, {cases[0].format}: us, GB/s, share of copy"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("D", "T", *COLUMNS, *(f"{name}\n/mxnorm" for name in SLOWER.values())):
        table.add_column(column, justify="right")
    for case in sorted(cases, key=lambda c: (c.width, c.tokens)):
        factors = [case.ratio(name, "mxnorm") for name in SLOWER]
        table.add_row(
            str(case.width),
            str(case.tokens),
            *(cell(case, name) for name in COLUMNS),
            *("" if f is None else f"{f:.2f}" for f in factors),
        )
    return table


def cell(case: Measured, name: str) -> str:
    timing, gbps = case.timing(name), case.gbps(name)
    if timing is None or gbps is None:
        return "failed" if name in case.failures else ""
    share = case.ratio("copy", name)
    return f"{timing.us:.1f} {gbps:5.0f}" + ("" if share is None else f" {share:.2f}")


def verdict_table(lines: Sequence[Verdict], format: str) -> Table:
    table = Table(title=f"What must be shown, {format}", box=box.SIMPLE_HEAD)
    for title in ("", "claim", "found"):
        table.add_column(title)
    words = {True: "PASS", False: "FAIL", None: "-"}
    for line in lines:
        table.add_row(words[line.passed], line.claim, line.found)
    return table


def speed_up_table(cases: Sequence[Measured]) -> Table:
    title = "Speed-up of mxnorm: geometric mean, of how many shapes"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("format", "work", *(f"over {name}" for name in OPPONENTS)):
        table.add_column(column)
    for format, variant, own in kinds(cases):
        means = [speed_up(own, name) for name in OPPONENTS]
        table.add_row(format, TITLES[variant], *(str(mean or "") for mean in means))
    return table


STYLES = {
    "copy": {"color": "black", "linestyle": "--", "marker": "_"},
    "inductor": {"color": "tab:red", "marker": "s"},
    "inductor-tuned": {"color": "tab:orange", "marker": "D"},
    "nested": {"color": "tab:purple", "marker": "P"},
    "liger": {"color": "tab:green", "marker": "^"},
    "exact": {"color": "tab:cyan", "marker": "v"},
    "mxnorm": {"color": "tab:blue", "marker": "o"},
}


def plot(cases: Sequence[Measured], title: str, path: Path) -> None:
    """GB/s against T as a PNG: a panel per width, a row of them per format and variant.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {(c.format, c.variant) for c in cases if c.variant != "both"}
    rows = [(f, v) for f in FORMATS for v in VARIANTS if (f, v) in found]
    widths = sorted({c.width for c in cases if c.variant != "both"})
    if not rows:
        return
    size = (4.2 * len(widths) + 1, 3.8 * len(rows) + 1)
    figure, axes = pyplot.subplots(
        len(rows), len(widths), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for i, (format, variant) in enumerate(rows):
        for j, width in enumerate(widths):
            shape = (format, variant, width)
            own = [c for c in cases if (c.format, c.variant, c.width) == shape]
            panel(axes[i][j], sorted(own, key=lambda c: c.tokens), f"D = {width}")
        axes[i][0].set_ylabel(f"{TITLES[variant]}, {format}\nbandwidth, GB/s", fontsize=12)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=13)
    figure.suptitle(title, fontsize=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def panel(axis: Any, cases: Sequence[Measured], title: str) -> None:
    for name, style in STYLES.items():
        points = [(c.tokens, c.gbps(name)) for c in cases]
        known = [(t, g) for t, g in points if g is not None]
        if known:
            axis.plot(*zip(*known, strict=True), label=name, **style)
    axis.set_xscale("log", base=2)
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=13)
    axis.set_xlabel("tokens T", fontsize=12)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.3)
