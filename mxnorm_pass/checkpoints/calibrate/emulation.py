"""Run an uncompiled model as the backend would compile it, with the RMS of each norm to choose.

While the emulation is entered, every norm leaves its input behind and the linears that it
feeds read the cast of that input: under the exact RMS, or under an estimate from block weights.
All other readers see the exact norm. The model's parameters stay as they are: a channel order is
applied to rows and weights on their way into the casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxnorm_pass.checkpoints.calibrate.norms import FusedNorm, Linear
from mxnorm_pass.checkpoints.calibrate.probe import NormConstants, probe
from mxnorm_pass.checkpoints.channels.permute import in_eval_mode
from mxnorm_pass.numerics.cast import Quantized, quantize_alone
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.numerics.norm import inverse_rms, mxnorm
from mxnorm_pass.numerics.norm_cast import mxnorm_cast
from mxnorm_pass.numerics.nvfp4 import nvfp4_tensor_scale

Observer = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Estimate:
    """How the RMS of one norm is estimated: block weights [K] and their exponent."""

    block_weights: Tensor
    p: float


@dataclass
class Emulation:
    """Sites of one model, to be entered around calls of it.

    Attributes:
        orders: by norm name, the order [D], int64, of the channels that it and its linears read;
            a norm that is missing has the natural one.
        estimates: by norm name; a norm that is missing keeps its exact RMS.
        observer: called with the name and the input [..., D] of each norm that runs.
    """

    norms: Sequence[FusedNorm]
    orders: Mapping[str, Tensor] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    observer: Observer | None = None

    def __post_init__(self) -> None:
        self._emulated = [_EmulatedNorm(norm, self) for norm in self.norms]

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[Callable[..., Any]]:
        """Yields what to call; ``model`` itself is as before when the block ends."""
        with ExitStack() as stack:
            stack.enter_context(_uncompiled(model))
            stack.enter_context(in_eval_mode(model))
            for norm in self._emulated:
                norm.enter(stack)
            stack.enter_context(torch.no_grad())
            yield model


class _EmulatedNorm:
    def __init__(self, norm: FusedNorm, emulation: Emulation) -> None:
        self.norm = norm
        self.emulation = emulation
        self._fed: _Fed | None = None
        self._unread: set[str] = set()
        self._constants: NormConstants | None = None
        self._weights: dict[tuple[str, bool], Quantized] = {}

    def enter(self, stack: ExitStack) -> None:
        hook = self.norm.module.register_forward_hook(self._leave_input, with_kwargs=True)
        stack.callback(hook.remove)
        for linear in self.norm.linears:
            forward = self._cast_linear if linear.format is not None else self._scaled_linear
            stack.enter_context(_replaced_forward(linear, forward))
        stack.callback(self._forget)

    def _forget(self) -> None:
        self._fed = None

    def _leave_input(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if self.emulation.observer is not None:
            self.emulation.observer(self.norm.name, x)
        if self._constants is None:
            self._constants = probe(norm, x.shape[-1], x.device)
        self._fed = _Fed(self, x, output, self._constants)
        self._unread = {linear.name for linear in self.norm.linears}

    def _cast_linear(self, linear: Linear, original: Any, x: Tensor) -> Tensor:
        fed = self._input_of(linear, x)
        assert linear.format is not None
        module: Any = linear.module
        activation = fed.cast(linear.format).reshape(x.shape).to(x.dtype)
        weight = self._weight(linear, fed.folds).dequantize(module.weight.dtype)
        return F.linear(activation, weight, module.bias)

    def _scaled_linear(self, linear: Linear, original: Any, x: Tensor) -> Any:
        fed = self._input_of(linear, x)
        ratio = fed.ratio.expand(fed.x.shape).reshape(x.shape) if fed.estimate else 1.0
        return original((x * ratio).to(x.dtype))

    def _input_of(self, linear: Linear, x: Tensor) -> _Fed:
        if self._fed is None or self._fed.x.numel() != x.numel():
            raise ValueError(
                f"{linear.name!r} reads something else than the whole output of "
                f"{self.norm.name!r} when the model runs uncompiled; turn either off in `modules`"
            )
        fed = self._fed
        self._unread.discard(linear.name)
        if not self._unread:
            # Else every layer's activations would stay until the model has run.
            self._forget()
        return fed

    def _weight(self, linear: Linear, folded: bool) -> Quantized:
        """The weight's cast; 1.03 bytes per element, kept."""
        key = (linear.name, folded)
        if key not in self._weights:
            assert linear.format is not None and self._constants is not None
            module: Any = linear.module
            weight = module.weight.detach()
            if folded:
                weight = weight.float() * self._constants.gain
            self._weights[key] = quantize_alone(self.ordered(weight), linear.format)
        return self._weights[key]

    def ordered(self, rows: Tensor) -> Tensor:
        order = self.emulation.orders.get(self.norm.name)
        return rows if order is None else rows[..., order.to(rows.device)]


@dataclass
class _Fed:
    """One call of a norm, and what its linears read in place of the output."""

    owner: _EmulatedNorm
    x: Tensor
    output: Tensor
    constants: NormConstants
    _casts: dict[BlockFormat, Tensor] = field(default_factory=dict)

    @property
    def estimate(self) -> Estimate | None:
        return self.owner.emulation.estimates.get(self.owner.norm.name)

    @property
    def folds(self) -> bool:
        """The exact estimator leaves the gain where it is."""
        return self.owner.norm.folds and self.estimate is not None

    @cached_property
    def ratio(self) -> Tensor:
        """rho~ / rho, [..., 1], float32."""
        estimate, x = self.estimate, self.x.float()
        assert estimate is not None
        weights = estimate.block_weights.to(x.device)
        eps = self.constants.eps
        estimated = inverse_rms(
            self.owner.ordered(x),
            eps=eps,
            p=estimate.p,
            block_size=x.shape[-1] // len(weights),
            block_weights=weights,
        )
        return estimated / inverse_rms(x, eps=eps, estimator="exact")

    def cast(self, fmt: BlockFormat) -> Tensor:
        """What the linears multiply: cast and dequantised, [..., D], channels in order."""
        if fmt not in self._casts:
            self._casts[fmt] = self._quantized(fmt).dequantize(self.output.dtype)
        return self._casts[fmt]

    def _quantized(self, fmt: BlockFormat) -> Quantized:
        estimate, ordered = self.estimate, self.owner.ordered
        if estimate is None:
            return quantize_alone(ordered(self.output), fmt)
        x, gain = ordered(self.x), None if self.folds else ordered(self.constants.gain)
        options: dict[str, Any] = {"eps": self.constants.eps, "p": estimate.p}
        options["block_weights"] = estimate.block_weights.to(x.device)
        scale = None
        if not fmt.has_e8m0_scales:
            y = mxnorm(x, gain, block_size=fmt.block_size, out_dtype=torch.float32, **options)
            scale = nvfp4_tensor_scale(y)
        values, scales, _ = mxnorm_cast(x, gain, format=fmt, tensor_scale=scale, **options)
        return Quantized(values, scales, fmt, scale)


@contextmanager
def _replaced_forward(linear: Linear, forward: Callable[..., Any]) -> Iterator[None]:
    module = linear.module
    own = module.__dict__.get("forward")
    module.forward = partial(forward, linear, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """After ``module.compile()`` a call would run what that compiled, past all hooks."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, implementation in compiled.items():
            module._compiled_call_impl = implementation
