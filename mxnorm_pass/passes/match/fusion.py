"""What is decided of a norm: a fusion, with all that the rewrite needs, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx

from mxnorm_pass import ops
from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import ancestors_after, tensor_of
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.numerics.norm_cast import NormCastSpec
from mxnorm_pass.numerics.rms import Estimator, bound_of_normalized
from mxnorm_pass.options.config import Calibrated, MXNormConfig
from mxnorm_pass.passes.match.casts.find import Cast
from mxnorm_pass.passes.match.linears.consumer import Consumer
from mxnorm_pass.passes.match.norms.find import Norm
from mxnorm_pass.passes.match.norms.tail import Rounding
from mxnorm_pass.passes.match.skip import Skip
from mxnorm_pass.passes.match.transposed_cast import TransposedCast
from mxnorm_pass.report.site import Site

# A block of 16 Gaussian numbers has its largest at 2.1 RMS, and so a scale of 448 * 2.1 / bound.
# With this bound it is 2^-2, four binades above the smallest normal number of e4m3; beyond, as with
# p < 1 in wide rows, weak blocks would be lost.
_LARGEST_BOUND = 3800.0


@dataclass(frozen=True)
class Fusion:
    """A norm to rewrite, with all that the rewrite needs to know.

    Attributes:
        norm: the RMSNorm.
        consumers: the linears that will read the fused cast.
        config: the options that hold for this norm.
        gain: "fold" or "activation"; None for a norm without a gain.
        residual: the residual add whose sum the norm reads, if the fused op does it.
        transposed: the backward's casts along T that one of the fused ops can make, too.
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
    def specs(self) -> tuple[NormCastSpec, ...]:
        """What the fused ops compute: one for each different cast that consumers read, in order."""
        return tuple(dict.fromkeys(map(self.spec_of, self.consumers)))

    def spec_of(self, consumer: Consumer) -> NormCastSpec:
        """What the fused op computes that the consumer reads."""
        rounding = self.norm.rounding
        output = tensor_of(self.norm.output)
        assert output is not None
        return NormCastSpec(
            eps=self.norm.eps,
            estimator=self.estimator,
            p=self.config.p,
            format=self._format_of(consumer.cast),
            norm_dtype=rounding.norm_dtype if isinstance(rounding, Rounding) else None,
            out_dtype=consumer.rounds_to or output.dtype,
            scale_layout="blocked" if consumer.linear.blocked_scales else "row-major",
        )

    def _format_of(self, cast: Cast) -> BlockFormat:
        if self.estimator == "mxnorm":
            # Its values differ from the matched graph's anyhow: no log2 has to be emulated.
            return cast.format.without_log2
        return cast.format

    def tensor_scale_of(self, spec: NormCastSpec) -> fx.Node | None:
        """That of the matched cast; None where it has none."""
        return next(c.cast.tensor_scale for c in self.consumers if self.spec_of(c) == spec)

    def keeps_tensor_scale(self, spec: NormCastSpec) -> bool:
        """Does the fused op have that of the matched cast?

        "exact" changes no bit, and a number that is none of the norm's was chosen for other rows.
        """
        given = self.tensor_scale_of(spec)
        if given is None or self.estimator == "exact":
            return True
        is_own = any(n.target is ops.cast for c in self.consumers for n in c.cast.nodes)
        return not is_own and self.norm.output not in ancestors_after(given, self.norm.output)

    def bound_of(self, spec: NormCastSpec) -> float | None:
        """What bounds |x| / rms, to scale the tensor by; None if the elements are to say it."""
        if self.config.tensor_scale != "bound":
            return None
        args = (self.norm.width, spec.format.block_size, self.block_weights)
        with real_tensors():
            bound = bound_of_normalized(spec.estimator, spec.p, *args)
        return bound if bound <= _LARGEST_BOUND else None

    @property
    def op_inputs(self) -> Iterator[fx.Node]:
        """What the fused op reads beside x, or what that is computed from."""
        if self.norm.gain is not None:
            yield self.norm.gain
        for spec in self.specs:
            tensor_scale = self.tensor_scale_of(spec)
            if tensor_scale is None:
                continue
            if self.keeps_tensor_scale(spec):
                yield tensor_scale
            elif self.bound_of(spec) is None:
                yield self.norm.output

    def transposed_with(self, spec: NormCastSpec) -> tuple[Cast, ...]:
        """The backward's casts along T that the op of ``spec`` makes."""
        return tuple(t.cast for t in self.transposed if self.spec_beside(t) == spec)

    def spec_beside(self, transposed: TransposedCast) -> NormCastSpec | None:
        """The first of the specs that is of the same format and the same rounding."""
        wanted = (self._format_of(transposed.cast), transposed.rounds_to)
        return next((s for s in self.specs if (s.format, s.out_dtype) == wanted), None)

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
            format=str(self.specs[0].format),
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
