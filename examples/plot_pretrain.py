"""What the arms of pretrain_arms.py amount to: a summary, a plot and a table.

    python examples/plot_pretrain.py build/arms --json examples/results/pretrain.json \\
        --plot examples/results/pretrain.png

Prints a Markdown table. Runs that did not finish are left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchlib import save_json
from checkpointlib import BadInput
from pretrain_metrics import Line, is_finished, read_lines

# Okabe and Ito's, without yellow, which is too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
# The settings by which runs of one folder are told apart.
_ARM = ("recipe", "forward", "norm")
_NOT_SHOWN = (*_ARM, "seed", "device", "log_every", "evaluate_every", "norms_every")
_CURVE_POINTS = 100
_SMOOTHED = 5


@dataclass(frozen=True)
class Curve:
    """Mean training loss over the seeds; each point is a mean over the steps since the last."""

    steps: tuple[int, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds.

    Attributes:
        casts: recipe, forward and what else sets the arm apart, but for the norm.
        held_out: loss of each seed.
        spread: the largest minus the smallest of them.
        diverged: seeds, and what happened.
        peak_memory: GiB.
    """

    casts: str
    recipe: str
    forward: str | None
    norm: str
    held_out: dict[int, float]
    mean: float | None
    spread: float | None
    diverged: dict[int, str]
    tokens_per_s: float | None
    peak_memory: float | None
    curve: Curve


@dataclass(frozen=True)
class Summary:
    """All arms of a folder, and what they share."""

    size: str
    parameters: int
    steps: int
    tokens: int
    held_out_tokens: int
    text_sha256: str
    machine: dict[str, Any]
    arms: tuple[ArmSummary, ...]

    def find(self, casts: str, norm: str) -> ArmSummary | None:
        return next((a for a in self.arms if (a.casts, a.norm) == (casts, norm)), None)

    @property
    def casts(self) -> list[str]:
        return list(dict.fromkeys(arm.casts for arm in self.arms))


def read_runs(folder: Path) -> list[list[Line]]:
    """The finished runs of a folder.

    Raises:
        BadInput: there are none, or runs of several sizes, lengths or texts.
    """
    files = [read_lines(path) for path in sorted(folder.glob("*.jsonl"))]
    runs = [lines for lines in files if is_finished(lines)]
    if not runs:
        raise BadInput(
            f"no finished run among {len(files)} JSONL files in {str(folder)!r}: "
            "run examples/pretrain_arms.py with --out there"
        )
    for key in ("size", "steps", "batch", "sequence"):
        values = {lines[0]["run"][key] for lines in runs}
        if len(values) > 1:
            raise BadInput(f"runs of several {key} ({values}): keep them in folders of their own")
    if len({lines[0]["text"] for lines in runs}) > 1:
        raise BadInput("runs on several texts: keep them in folders of their own")
    return runs


def summarise(runs: Sequence[list[Line]]) -> Summary:
    settings = [lines[0]["run"] for lines in runs]
    differing = [k for k in settings[0] if len({str(s[k]) for s in settings}) > 1]
    extra = [key for key in differing if key not in _NOT_SHOWN]
    by_arm: dict[tuple[str, str], list[list[Line]]] = defaultdict(list)
    for lines in runs:
        run = lines[0]["run"]
        by_arm[casts_of(run, extra), run["norm"]].append(lines)
    first, run = runs[0][0], settings[0]
    arms = [summarise_arm(casts, own) for (casts, _), own in by_arm.items()]
    ends = [lines[-1] for lines in runs if lines[-1]["kind"] == "end"]
    return Summary(
        size=run["size"],
        parameters=first["parameters"],
        steps=run["steps"],
        tokens=run["steps"] * run["batch"] * run["sequence"],
        held_out_tokens=max((end["held_out_tokens"] for end in ends), default=0),
        text_sha256=first["text"],
        machine=first["machine"],
        arms=tuple(sorted(arms, key=_rank)),
    )


def casts_of(run: dict[str, Any], extra: Iterable[str]) -> str:
    forward = "" if run["forward"] is None else f", forward {run['forward']}"
    # An exact RMS has no exponent and no gradient of its own.
    own = [k for k in extra if not (run["norm"] == "rmsnorm" and k in ("p", "gradient"))]
    return run["recipe"] + forward + "".join(f", {key} {run[key]}" for key in own)


def summarise_arm(casts: str, runs: Sequence[list[Line]]) -> ArmSummary:
    run = runs[0][0]["run"]
    ends = {lines[0]["run"]["seed"]: lines[-1] for lines in runs}
    finished = {seed: end for seed, end in sorted(ends.items()) if end["kind"] == "end"}
    losses = {seed: end["loss"] for seed, end in finished.items()}
    values = list(losses.values())
    memory = [end["peak_memory_bytes"] / 2**30 for end in finished.values()]
    return ArmSummary(
        casts=casts,
        recipe=run["recipe"],
        forward=run["forward"],
        norm=run["norm"],
        held_out=losses,
        mean=statistics.fmean(values) if values else None,
        spread=max(values) - min(values) if values else None,
        diverged={s: end["error"] for s, end in ends.items() if end["kind"] == "diverged"},
        tokens_per_s=statistics.median(e["tokens_per_s"] for e in finished.values())
        if finished
        else None,
        peak_memory=round(max(memory), 2) if memory else None,
        curve=mean_curve(runs),
    )


def mean_curve(runs: Sequence[list[Line]]) -> Curve:
    by_step: dict[int, list[float]] = defaultdict(list)
    for lines in runs:
        for line in lines:
            if line["kind"] == "step":
                by_step[line["step"]].append(line["loss"])
    points = [(step, statistics.fmean(losses)) for step, losses in sorted(by_step.items())]
    each = -(-len(points) // _CURVE_POINTS) or 1
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    steps = tuple(group[-1][0] for group in groups)
    return Curve(steps, tuple(round(statistics.fmean(x for _, x in g), 4) for g in groups))


def _rank(arm: ArmSummary) -> tuple[Any, ...]:
    order = ("bf16", "none", "mxfp8", "mxfp8-e5m2", "nvfp4", "mxfp4")
    place = order.index(arm.recipe) if arm.recipe in order else len(order)
    return place, arm.casts, arm.norm != "rmsnorm"


def markdown(summary: Summary) -> str:
    lines = [
        "| casts | norm | held-out loss | seeds | spread | over bf16 | over RMSNorm "
        "| tokens/s | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = next((arm.mean for arm in summary.arms if arm.recipe == "bf16"), None)
    for arm in summary.arms:
        exact = summary.find(arm.casts, "rmsnorm") if arm.norm == "mxnorm" else None
        cells = [arm.casts, {"rmsnorm": "RMSNorm", "mxnorm": "MXNorm"}[arm.norm]]
        cells.append("diverged" if arm.mean is None else f"{arm.mean:.4f}")
        cells.append(
            str(len(arm.held_out)) + (f", {len(arm.diverged)} diverged" * bool(arm.diverged))
        )
        cells.append("" if arm.spread is None or len(arm.held_out) < 2 else f"{arm.spread:.4f}")
        cells.append("" if arm.recipe == "bf16" else difference(arm.mean, base))
        cells.append(difference(arm.mean, exact.mean if exact else None))
        cells.append("" if arm.tokens_per_s is None else f"{arm.tokens_per_s:,.0f}")
        cells.append("" if arm.peak_memory is None else f"{arm.peak_memory:.2f}")
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


def difference(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value - base:+.4f}"


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, a few at most."""
    windows = (values[max(0, i - _SMOOTHED + 1) : i + 1] for i in range(len(values)))
    return [statistics.fmean(window) for window in windows]


def plot(summary: Summary, path: Path) -> None:
    """A PNG: training curves, and held-out losses with a point for each seed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = max(4.6, 1.9 + 0.52 * len(summary.casts))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, height), layout="constrained", width_ratios=(1, 1)
    )
    colours = {casts: COLOURS[i % len(COLOURS)] for i, casts in enumerate(summary.casts)}
    draw_curves(left, summary, colours)
    draw_held_out(right, summary, colours)
    million = f"{summary.parameters / 1e6:.0f}M parameters, {summary.tokens / 1e6:.1f}M tokens"
    figure.suptitle(f"Llama, {million}", fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_curves(axis: Any, summary: Summary, colours: dict[str, str]) -> None:
    late: list[float] = []
    for arm in summary.arms:
        curve = smoothed(arm.curve.loss)
        style = "-" if arm.norm == "mxnorm" else "--"
        axis.plot(arm.curve.steps, curve, style, color=colours[arm.casts], linewidth=1.5)
        late += curve[len(curve) // 4 :]
    if late:
        # The steep start would flatten what sets the arms apart.
        room = 0.05 * (max(late) - min(late)) or 0.1
        axis.set_ylim(min(late) - room, max(late) + room)
    axis.set_title("training loss, mean over seeds", fontsize=12)
    axis.set_xlabel("step", fontsize=11)
    tidy(axis)


def draw_held_out(axis: Any, summary: Summary, colours: dict[str, str]) -> None:
    """A row for each kind of casts, RMSNorm above MXNorm; the bar is the mean of the seeds."""
    for row, casts in enumerate(summary.casts):
        for norm, shift in (("rmsnorm", -0.16), ("mxnorm", 0.16)):
            arm = summary.find(casts, norm)
            if arm is None or arm.mean is None:
                continue
            colour, losses = colours[casts], list(arm.held_out.values())
            filled = colour if norm == "mxnorm" else "white"
            axis.plot([arm.mean] * 2, [row + shift - 0.15, row + shift + 0.15], color=colour)
            axis.scatter(
                losses, [row + shift] * len(losses), s=42, marker=_MARKERS[norm],
                facecolor=filled, edgecolor=colour, linewidth=1.5, zorder=3,
            )  # fmt: skip
    base = next((arm.mean for arm in summary.arms if arm.recipe == "bf16"), None)
    if base is not None:
        axis.axvline(base, color="#999999", linestyle=":", zorder=0)
    labels = [casts.replace(", ", "\n") for casts in summary.casts]
    axis.set_yticks(range(len(labels)), labels, fontsize=11)
    for label, casts in zip(axis.get_yticklabels(), summary.casts, strict=True):
        label.set_color(colours[casts])
    axis.set_ylim(len(summary.casts) - 0.4, -0.6)
    axis.set_title("held-out loss, a point for each seed", fontsize=12)
    axis.set_xlabel("nats per token", fontsize=11)
    axis.legend(
        handles=legend_handles(), loc="upper center", bbox_to_anchor=(0.5, -0.13),
        ncols=2, frameon=False, fontsize=11,
    )  # fmt: skip
    tidy(axis)


_MARKERS = {"rmsnorm": "o", "mxnorm": "D"}


def legend_handles() -> list[Any]:
    """The colours are named by the rows; the norms are told apart by line and marker."""
    from matplotlib.lines import Line2D

    grey = "#444444"
    kinds = (("RMSNorm", "--", "o", "white"), ("MXNorm", "-", "D", grey))
    return [
        Line2D([], [], color=grey, linestyle=style, marker=marker, markerfacecolor=face, label=name)
        for name, style, marker, face in kinds
    ]


def tidy(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=11)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Summary, plot and table of pretrain_arms.py.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args(argv)
    try:
        summary = summarise(read_runs(args.folder))
    except BadInput as error:
        print(f"plot_pretrain.py: {error}", file=sys.stderr)
        return 2
    print(markdown(summary))
    if args.json is not None:
        save_json(args.json, asdict(summary))
    if args.plot is not None:
        plot(summary, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
