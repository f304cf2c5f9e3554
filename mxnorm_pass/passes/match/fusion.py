"""What is decided of a norm: a fusion, with all that the rewrite needs, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mxnorm_pass.graph.nodes import tensor_of
from mxnorm_pass.numerics.formats import MXFormat
from mxnorm_pass.numerics.layout import ScaleLayout
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.numerics.rms import Estimator
from mxnorm_pass.options.config import Calibrated, MXNormConfig
from mxnorm_pass.passes.match.casts.find import Cast
from mxnorm_pass.passes.match.linears.consumer import Consumer
from mxnorm_pass.passes.match.norms.find import Norm
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.passes.match.transposed_cast import TransposedCast
from mxnorm_pass.report.site import Site


@dataclass(frozen=True)
class FusedCast:
    """A cast of the norm's output: its format, and the dtype to which the output is rounded."""

    format: MXFormat
    out_dtype: torch.dtype
    scale_layout: ScaleLayout


@dataclass(frozen=True)
class Fusion:
    """A norm to rewrite, with all that the rewrite needs to know.

    Attributes:
        norm: the RMSNorm.
        consumers: the linears that will read the fused cast.
        config: the options that hold for this norm.
        gain: "fold" or "activation"; None for a norm without a gain.
        residual: the residual add whose sum the norm reads, if the fused op does it.
        transposed: the backward's casts along T that one of ``casts`` can make, too.
        calibration: what the calibration does to this norm.
        block_weights: [K] float32, of the calibration.
    """

    norm: Norm
    consumers: tuple[Consumer, ...]
    config: MXNormConfig
    gain: str | None
    residual: fx.Node | None = None
    transposed: tuple[TransposedCast, ...] = ()
    calibration: Calibrated | None = None
    block_weights: Tensor | None = field(default=None, compare=False)

    @property
    def estimator(self) -> Estimator:
        return self.config.estimator

    @property
    def gradient(self) -> Gradient:
        return self.config.gradient

    @property
    def casts(self) -> tuple[FusedCast, ...]:
        """The different casts that the consumers read, in order."""
        return tuple(dict.fromkeys(map(self.cast_of, self.consumers)))

    def cast_of(self, consumer: Consumer) -> FusedCast:
        output = tensor_of(self.norm.output)
        assert output is not None
        layout: ScaleLayout = "blocked" if consumer.linear.blocked_scales else "row-major"
        fmt = self._format_of(consumer.cast)
        return FusedCast(fmt, consumer.rounds_to or output.dtype, layout)

    def _format_of(self, cast: Cast) -> MXFormat:
        if self.estimator == "mxnorm":
            # Its values differ from the matched graph's anyhow: no log2 has to be emulated.
            return cast.format.without_log2
        return cast.format

    def transposed_with(self, cast: FusedCast) -> tuple[Cast, ...]:
        """The backward's casts along T that the op of ``cast`` makes."""
        return tuple(t.cast for t in self.transposed if self.cast_beside(t) == cast)

    def cast_beside(self, transposed: TransposedCast) -> FusedCast | None:
        """The first of the casts that is of the same format and the same rounding."""
        wanted = (self._format_of(transposed.cast), transposed.rounds_to)
        return next((c for c in self.casts if (c.format, c.out_dtype) == wanted), None)

    def refused(self, skip: Skip) -> Refusal:
        names = tuple(dict.fromkeys(c.name for c in self.consumers))
        return Refusal(self.norm.name, self.norm.anchor, skip, names)

    def site(self) -> Site:
        return Site(
            norm=self.norm.name,
            consumers=tuple(dict.fromkeys(c.name for c in self.consumers)),
            status="fused",
            estimator=self.estimator,
            gain=self.gain,
            format=str(self.casts[0].format),
            residual=self.residual is not None,
            calibration=self.calibration,
        )


@dataclass(frozen=True)
class Refusal:
    """A norm that stays as it is."""

    name: str
    anchor: fx.Node
    skip: Skip
    consumers: tuple[str, ...] = ()

    def site(self) -> Site:
        return Site(
            norm=self.name,
            consumers=self.consumers,
            reason=self.skip.reason,
            detail=self.skip.detail,
            near_miss=self.skip.near_miss(self.anchor),
        )


Decision = Fusion | Refusal
