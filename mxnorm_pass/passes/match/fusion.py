"""What is decided of a norm: a fusion, with all that the rewrite needs, or a refusal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from mxnorm_pass import ops
from mxnorm_pass.graph.fake import real_tensors
from mxnorm_pass.graph.nodes import (
    ancestors_after,
    is_dtype_cast,
    is_view,
    same_value,
    strip,
    tensor_of,
)
from mxnorm_pass.numerics.formats import SCALE_MODES, BlockFormat
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


def scales_by_rows(norm: Norm, cast: Cast) -> bool:
    """Is the tensor scaled by a number that is computed from the norm's rows?

    Another was chosen for other rows, which the model's author knows. In a graph that was traced
    with an estimate such a number may come from the exact norm, so it is x that counts.
    """
    scale = cast.tensor_scale
    if scale is None:
        return False
    is_own = any(node.target is ops.cast for node in cast.nodes)
    x = strip(norm.x, is_view, is_dtype_cast)
    return is_own or x in ancestors_after(scale, x)


@dataclass(frozen=True)
class FusedCast:
    """One call of a fused op.

    Attributes:
        consumers: the linears that read its values and scales.
        rescales: it has a scale of the tensor of its own, in the place of the matched casts'.
    """

    spec: NormCastSpec
    consumers: tuple[Consumer, ...]
    rescales: bool

    @property
    def tensor_scale(self) -> fx.Node | None:
        """The first of those of the matched casts, which are equal; None where they have none."""
        return min((s for c in self.consumers if (s := c.cast.tensor_scale)), default=None)

    def is_that_of(self, other: FusedCast) -> bool:
        """Can one call make both?"""
        if (self.spec, self.rescales) != (other.spec, other.rescales):
            return False
        return self.rescales or same_value(self.tensor_scale, other.tensor_scale)


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
    def casts(self) -> tuple[FusedCast, ...]:
        """One for each different cast that consumers read, in order."""
        found: list[FusedCast] = []
        for consumer in self.consumers:
            new = FusedCast(self.spec_of(consumer), (consumer,), self._rescales(consumer.cast))
            same = next((i for i, cast in enumerate(found) if cast.is_that_of(new)), None)
            if same is None:
                found.append(new)
            else:
                found[same] = replace(found[same], consumers=(*found[same].consumers, consumer))
        return tuple(found)

    @property
    def specs(self) -> tuple[NormCastSpec, ...]:
        """What the fused ops compute, in order."""
        return tuple(dict.fromkeys(cast.spec for cast in self.casts))

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

    def _rescales(self, cast: Cast) -> bool:
        """Is the tensor scaled by another number than the matched graph's?"""
        # "exact" changes no bit.
        return self.estimator != "exact" and scales_by_rows(self.norm, cast)

    def bound_of(self, spec: NormCastSpec) -> float | None:
        """What bounds |x| / rms, to scale the tensor by; None if the elements are to say it."""
        if self.config.tensor_scale != "bound":
            return None
        weights, size = self.block_weights, spec.format.block_size
        if weights is not None and len(weights) * size != self.norm.width:
            # A calibration for blocks of another size, which the whole graph's check refuses.
            return None
        args = (self.norm.width, size, weights)
        with real_tensors():
            bound = bound_of_normalized(spec.estimator, spec.p, *args)
        return bound if bound <= _LARGEST_BOUND else None

    @property
    def op_inputs(self) -> Iterator[fx.Node]:
        """What the fused op reads beside x, or what that is computed from."""
        if self.norm.gain is not None:
            yield self.norm.gain
        for cast in self.casts:
            if cast.rescales and self.bound_of(cast.spec) is None:
                yield self.norm.output
            elif not cast.rescales and cast.tensor_scale is not None:
                yield cast.tensor_scale

    def transposed_with(self, cast: FusedCast) -> tuple[TransposedCast, ...]:
        """The backward's casts along T that the op of ``cast`` makes; they are equal."""
        found = [t for t in self.transposed if self._cast_beside(t) == cast]
        return tuple(t for t in found if t.is_that_of(found[0]))

    def casts_alike(self, cast: FusedCast, transposed: TransposedCast) -> bool:
        """Is it cast along T as along D?"""
        if transposed.operand is not None or cast.rescales:
            return False
        same_scale = same_value(cast.tensor_scale, transposed.cast.tensor_scale)
        return same_scale and cast.spec.format == self._format_of(transposed.cast)

    def _cast_beside(self, transposed: TransposedCast) -> FusedCast | None:
        """The one whose op can make it: the first that casts alike, else one of the same rounding.

        A scale of the tensor is the same for both.
        """
        rounded = [cast for cast in self.casts if cast.spec.out_dtype == transposed.rounds_to]
        for cast in rounded:
            if self.casts_alike(cast, transposed):
                return cast
        fmt = transposed.cast.format
        if not rounded or not fmt.has_e8m0_scales or fmt.scale_mode not in SCALE_MODES:
            return None
        return rounded[0]

    def with_transposed(self, found: Iterable[TransposedCast]) -> Fusion:
        """The same with those of the casts along T that its ops make."""
        fusion = replace(self, transposed=tuple(found))
        made = tuple(t for cast in fusion.casts for t in fusion.transposed_with(cast))
        return replace(self, transposed=made)

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
