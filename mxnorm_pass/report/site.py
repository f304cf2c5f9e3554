"""What the pass did to a graph: one Site per norm, with a reason where it was not fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mxnorm_pass.report.linear import LinearCasts
from mxnorm_pass.report.reason import SkipReason
from mxnorm_pass.report.subgraph import Subgraph, Traffic


@dataclass(frozen=True)
class NearMiss:
    """Where the match of a skipped norm failed.

    Attributes:
        node: name of the first node at which it failed, as in ``Graph.before``.
        expected: what had to stand there for the norm to be fused.
        found: what stood there.
        source: the line of the model that made the node, "file.py:12: code"; "" where unknown.
    """

    node: str
    expected: str
    found: str
    source: str = ""

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"at {self.node}: expected {self.expected}; found {self.found}{where}"


_CALIBRATED = {
    "block weights": "block weights",
    "exact": "by calibration",
    "unknown": "not in the calibration",
}


@dataclass(frozen=True)
class Site:
    """One RMSNorm of a graph and what became of it.

    Attributes:
        norm: dotted module name, "model.layers.0.input_layernorm".
        consumers: names of the linears that read the fused cast.
        status: "fused" or "skipped".
        reason: None where fused.
        detail: what exactly was found, for people.
        estimator: "mxnorm" or "exact"; None where skipped.
        gain: "fold" or "activation"; None where skipped or where the norm has no gain.
        format: the MX format of the fused cast, "mxfp8 e4m3fn rceil block 32".
        residual: the residual add in front of the norm is fused, too.
        calibration: what the calibration says of a fused norm: "block weights" (its RMS is
            estimated with them), "exact" (it stays exact) or "unknown" (it is no part of the
            calibration and stays exact); None without one, or where ``modules`` decides.
        before, after: its part of the graph; ``after`` is None where skipped, both in reports of
            older versions.
        near_miss: where the match failed; None where fused, or where nothing failed (DISABLED).
    """

    norm: str
    consumers: tuple[str, ...] = ()
    status: Literal["fused", "skipped"] = "skipped"
    reason: SkipReason | None = None
    detail: str = ""
    estimator: str | None = None
    gain: str | None = None
    format: str | None = None
    residual: bool = False
    calibration: str | None = None
    before: Subgraph | None = field(default=None, repr=False)
    after: Subgraph | None = field(default=None, repr=False)
    near_miss: NearMiss | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """Estimator, calibration, gain, format and residual add, for people; empty if skipped."""
        calibrated = _CALIBRATED.get(self.calibration or "")
        residual = "residual add" if self.residual else None
        parts = (self.estimator, calibrated, self.gain, self.format, residual)
        return tuple(filter(None, parts))

    @property
    def how(self) -> str:
        """The choices as one text."""
        return ", ".join(self.choices)

    def __str__(self) -> str:
        if self.status == "fused":
            return f"fused    {self.norm} -> {', '.join(self.consumers)} ({self.how})"
        why = f"{self.reason.name}: {self.reason.value}" if self.reason else ""
        line = f"skipped  {self.norm}: {why}"
        if self.near_miss is not None:
            return f"{line}\n         {self.near_miss}"
        return line + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Graph:
    """A compiled graph before and after the pass.

    Attributes:
        name: "inference_0", "training_1"; counted within one report.
        before, after: readable code; equal where nothing was rewritten.
        ops_before, ops_after: how often each op is called.
        sites: what became of this graph's norms.
        traffic_before, traffic_after: estimated bytes that the graph moves.
        linears: what became of its linears, where a recipe was asked for.
    """

    name: str
    before: str
    after: str
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    traffic_before: Traffic | None = None
    traffic_after: Traffic | None = None
    linears: tuple[LinearCasts, ...] = ()

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Graph:
        """Read back what :func:`json_value` and JSON have made of one."""
        sites = tuple(map(_site_from_dict, entry["sites"]))
        traffic = _parsed(entry, ("traffic_before", "traffic_after"), Traffic.from_dict)
        linears = tuple(LinearCasts(**fields) for fields in entry.get("linears", ()))
        return cls(**{**entry, "sites": sites, "linears": linears, **traffic})


def _site_from_dict(entry: dict[str, Any]) -> Site:
    converted = {
        "consumers": tuple(entry["consumers"]),
        "reason": SkipReason[entry["reason"]] if entry["reason"] else None,
        **_parsed(entry, ("before", "after"), Subgraph.from_dict),
        **_parsed(entry, ("near_miss",), lambda fields: NearMiss(**fields)),
    }
    return Site(**{**entry, **converted})


def _parsed(
    entry: Mapping[str, Any], keys: tuple[str, ...], parse: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Parse the keys that the entry has; reports of older versions lack some."""
    return {key: parse(entry[key]) for key in keys if entry.get(key) is not None}


def site_rows(graph: Graph) -> list[dict[str, Any]]:
    """The sites as JSON values, without their subgraphs."""
    rows = [asdict(replace(site, before=None, after=None)) for site in graph.sites]
    for row, site in zip(rows, graph.sites, strict=True):
        row["reason"] = site.reason.name if site.reason else None
        del row["before"], row["after"]
    return rows


def count_ops(targets: list[str]) -> dict[str, int]:
    """How often each op is called, by name."""
    return dict(sorted(Counter(targets).items()))


@dataclass(frozen=True)
class WeightCasts:
    """The weights of high precision that each call of an inference graph casts.

    Attributes:
        count: how many there are.
        read, written: bytes that the casts read and write; None where unknown.
    """

    count: int = 0
    read: int | None = 0
    written: int | None = 0


@dataclass(frozen=True)
class PassResult:
    """What one run of the pass did.

    Attributes:
        graph: code, op counts and sites, named "inference" or "training".
        matmul_modules: dotted names of the linears, and of the modules that multiply other
            matrices, in the forward graph.
        seconds: time the pass took, the report included.
        float_inputs: positions of the graph inputs that a norm's eps or factor depends on.
        weight_casts: what each call spends on weights.
    """

    graph: Graph
    matmul_modules: tuple[str, ...]
    seconds: float
    float_inputs: tuple[int, ...] = ()
    weight_casts: WeightCasts = WeightCasts()

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.graph.sites
