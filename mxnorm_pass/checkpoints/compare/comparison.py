"""What a comparison found, as text, JSON and a picture."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from mxnorm_pass.extras import needs_extra
from mxnorm_pass.files import write_bytes


@dataclass(frozen=True)
class Ratio:
    """rho~ / rho over tokens; 1 is exact.

    Attributes:
        low, high: the 1% and the 99% quantile.
        worst: the ratio furthest from 1, as a factor, and ``token`` its (row, position).
    """

    median: float
    low: float
    high: float
    worst: float
    token: tuple[int, int]


@dataclass(frozen=True)
class SiteComparison:
    """One fused norm.

    Attributes:
        how: estimator, calibration, gain and format.
        input_error: relative error of what its linears read, cast included.
        cast_error: the same with the exact RMS: what the cast alone costs.
        loss_increase: by how much the loss falls, in nats, if this norm alone gets the exact
            RMS, on the first row with tokens; None where it is exact or there is no loss.
    """

    norm: str
    consumers: tuple[str, ...]
    how: str
    ratio: Ratio
    input_error: float
    cast_error: float
    loss_increase: float | None


@dataclass(frozen=True)
class Step:
    """The loss if these norms get the exact RMS, through ``modules``."""

    exact: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class Divergence:
    """Of next-token distributions.

    Attributes:
        kl: mean of KL(reference || given) over tokens, in nats.
        top1: share of tokens with the same most likely next token.
    """

    kl: float
    top1: float


@dataclass(frozen=True)
class Comparison:
    """A model as it is, with the exact RMS and MX casts, and as the options have it.

    Attributes:
        tokens: how many the numbers are means of.
        loss_as_is, loss_exact, loss: mean over tokens, in nats; None where the batch allows none.
        from_as_is, from_exact: how far the model with the options is from the other two.
        sites: in graph order.
        steps: the norms that cost most, one more each time.
    """

    tokens: int
    loss_as_is: float | None
    loss_exact: float | None
    loss: float | None
    from_as_is: Divergence
    from_exact: Divergence
    sites: tuple[SiteComparison, ...]
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.tokens} tokens",
            _row("", "loss", "KL from it", "same top 1"),
            _row("as it is", _number(self.loss_as_is), *_divergence(self.from_as_is)),
            _row("exact RMS, MX casts", _number(self.loss_exact), *_divergence(self.from_exact)),
            _row("with the options", _number(self.loss), "", ""),
            "",
            _site_row("norm", "median", "1%", "99%", "worst", "error", "cast", "loss +"),
        ]
        lines += [_site_line(site) for site in self.sites]
        if self.steps:
            lines += ["", "with the exact RMS, norm by norm through `modules`, the loss is"]
            lines += [f"  {step.loss:.4f}  + {step.exact[-1]}" for step in self.steps]
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG: rho~ / rho of each site, its median and the range from 1% to 99%.

        Raises:
            MissingExtraError: matplotlib is not installed.
            OSError: ``path`` cannot be written; what stood there stays.
        """
        with needs_extra("report", "Comparison.plot"):
            from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.5 + 0.2 * len(self.sites)), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, self.sites)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_bytes(path, picture.getvalue())


def _draw(axes: Any, sites: tuple[SiteComparison, ...]) -> None:
    places = range(len(sites))
    axes.hlines(places, [s.ratio.low for s in sites], [s.ratio.high for s in sites])
    axes.plot([s.ratio.median for s in sites], places, "o", label="median, 1% to 99%")
    axes.plot([s.ratio.worst for s in sites], places, "x", label="worst token")
    axes.axvline(1.0, linewidth=0.8)
    axes.set_yticks(list(places), [site.norm for site in sites], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("estimated over exact 1 / rms")
    axes.legend(loc="best", fontsize=7)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _divergence(divergence: Divergence) -> tuple[str, str]:
    return f"{divergence.kl:.4f}", f"{divergence.top1:.1%}"


def _row(name: str, *columns: str) -> str:
    return f"{name:<22}" + "".join(f"{column:>12}" for column in columns)


def _site_row(name: str, *columns: str) -> str:
    return f"{name:<48}" + "".join(f"{column:>9}" for column in columns)


def _site_line(site: SiteComparison) -> str:
    ratio = site.ratio
    numbers = (ratio.median, ratio.low, ratio.high, ratio.worst)
    row, position = ratio.token
    return (
        _site_row(
            site.norm,
            *(f"{n:.3f}" for n in numbers),
            f"{site.input_error:.4f}",
            f"{site.cast_error:.4f}",
            _number(site.loss_increase),
        )
        + f"  worst token {row}, {position}; {site.how}"
    )
