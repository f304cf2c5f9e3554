"""``mxnorm_pass.calibrate``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mxnorm_pass.checkpoints.batches import (
    Batch,
    Loss,
    Split,
    check_finite,
    has_tokens,
    split_batches,
    token_rows,
)
from mxnorm_pass.checkpoints.calibrate.emulation import Emulation, Estimate
from mxnorm_pass.checkpoints.calibrate.fallback import (
    Estimates,
    exact_norms,
    few_rows,
    rank_by_cost,
)
from mxnorm_pass.checkpoints.calibrate.fit import block_weights, check_solver
from mxnorm_pass.checkpoints.calibrate.moments import BlockMoments, ChannelPower
from mxnorm_pass.checkpoints.calibrate.norms import FusedNorm, check_options, fused_norms
from mxnorm_pass.checkpoints.calibrate.orders import candidate_orders
from mxnorm_pass.checkpoints.calibrate.runner import Runner
from mxnorm_pass.checkpoints.channels.permute import stream_weights
from mxnorm_pass.checkpoints.progress import progress_bar
from mxnorm_pass.errors import MXNormWarning
from mxnorm_pass.options.calibration import Calibration, architecture_hash
from mxnorm_pass.options.channel_order import channel_statistics
from mxnorm_pass.options.config import MXNormConfig


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    options: Mapping[str, Any] | None = None,
    max_loss_increase: float = 0.02,
) -> Calibration:
    """Fit the estimated RMS of every fusible norm to a model that was trained with RMSNorm.

    For each norm: non-negative weights of its blocks, by least squares in the relative error of
    rms^p over the tokens of three quarters of the batches. For all norms of the residual stream
    together: a channel order in which block maxima tell more. The other batches measure the loss;
    while it exceeds the budget, the norms that cost most return to ``estimator="exact"``.

    The model runs uncompiled, in eval mode and without gradients, and is left as it was. A
    channel order takes effect, and the calibration with it, once the caller has applied it::

        calibration = mxnorm_pass.calibrate(model, batches)
        if calibration.order is not None:
            mxnorm_pass.permute_channels(model, calibration.order)
        compiled = torch.compile(model, backend="mxnorm", options={"calibration": calibration})

    Args:
        model: as it will be compiled: names, ``modules`` rules and formats are those of a compile
            with the same options.
        batches: dicts of the model's inputs (input_ids, attention_mask, labels) or tensors, at
            least two; all must fit into memory, their activations need not.
        options: as for ``torch.compile``; ``p`` (default 2) is that of the estimate.
        max_loss_increase: relative to the loss with exact RMS and the same casts, on the held-out
            batches; 0.02 allows 2%.

    Raises:
        ValueError: the batches are too few, no batches, or give a loss that is not finite; no
            norm can be fused; an option is wrong or contradicts a calibration.
        MissingExtraError: scipy or tqdm is not installed.
    """
    check_solver()
    config = check_options(options)
    _check_increase(max_loss_increase)
    split = split_batches(batches)
    model = getattr(model, "_orig_mod", model)
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    norms = fused_norms(model, split.fitted[0], options, device)
    _check_block_sizes(norms, config)
    total = 2 * (len(split.fitted) + len(split.held_out))
    with progress_bar("calibrate", total) as bar:
        runner = Runner(model, device, bar)
        fit = _fit(runner, norms, split, config)
        emulation = Emulation(norms, fit.orders)
        exact = _fall_back(runner, emulation, fit.estimates, split, max_loss_increase)
    unseen = [norm.name for norm in norms if norm.name not in fit.estimates]
    return Calibration(
        weights={name: estimate.block_weights for name, estimate in fit.estimates.items()},
        exact=(*unseen, *exact),
        p=config.p,
        block_size=config.cast_format.block_size,
        order=fit.order,
        channels=_channels(model, norms, fit),
        architecture=architecture_hash(model),
    )


def _check_block_sizes(norms: Sequence[FusedNorm], config: MXNormConfig) -> None:
    size = config.cast_format.block_size
    for norm in norms:
        for linear in norm.linears:
            if linear.format is not None and linear.format.block_size != size:
                raise ValueError(
                    f"the cast of {linear.name!r} has blocks of {linear.format.block_size}, that "
                    f"of `format` {size}, and a calibration is for blocks of one size: give all "
                    "norms one in `modules`, or set estimator='exact' for the others"
                )


def _check_increase(increase: float) -> None:
    if not (math.isfinite(increase) and increase >= 0):
        raise ValueError(
            f"max_loss_increase is {increase}; it must be a finite number of at least 0"
        )


@dataclass(frozen=True)
class _Fit:
    """What was fitted, by norm name.

    Attributes:
        order: of the residual channels; None: the natural one.
        stream: the norms that read them.
    """

    order: Tensor | None
    stream: tuple[str, ...]
    estimates: dict[str, Estimate]

    @property
    def orders(self) -> dict[str, Tensor]:
        return {} if self.order is None else dict.fromkeys(self.stream, self.order)


def _fit(runner: Runner, norms: Sequence[FusedNorm], split: Split, config: MXNormConfig) -> _Fit:
    block_size = config.cast_format.block_size
    emulation = Emulation(norms)
    stream = _stream_norms(runner.model, norms)
    orders: list[Tensor] = []
    if stream:
        power = ChannelPower()
        runner.observe(emulation, power, split.fitted)
        orders = candidate_orders(power.mean(stream), block_size)
    moments = BlockMoments(config.p, block_size, orders, frozenset(stream))
    runner.observe(emulation, moments, split.fitted)
    best = min(range(max(1, len(orders))), key=lambda i: moments.mean_error(stream, i))
    estimates = {}
    for norm in norms:
        found = moments.of(norm.name, best)
        if found is None:
            _warn_unseen(norm.name)
        else:
            estimates[norm.name] = Estimate(block_weights(found), config.p)
    # The first candidate is the natural order.
    return _Fit(orders[best] if best else None, stream, estimates)


def _warn_unseen(norm: str) -> None:
    warnings.warn(
        f"mxnorm: {norm!r} stays exact: no token of the batches reached it",
        MXNormWarning,
        stacklevel=4,
    )


def _stream_norms(model: nn.Module, norms: Sequence[FusedNorm]) -> tuple[str, ...]:
    """The norms that read the residual stream; none, with a warning, if it cannot be followed."""
    try:
        # The first norm of a model reads the stream.
        weights = stream_weights(model, norms[0].width)
    except ValueError as error:
        warnings.warn(
            f"mxnorm: the channels keep their order, in which the estimate may be poorer: {error}",
            MXNormWarning,
            stacklevel=4,
        )
        return ()
    of_inputs = {id(weight) for weight, dims in weights if weight.ndim - 1 in dims}
    return tuple(norm.name for norm in norms if id(norm.linears[0].module.weight) in of_inputs)


def _channels(model: nn.Module, norms: Sequence[FusedNorm], fit: _Fit) -> dict[str, Tensor]:
    """What tells the channels apart, in the order that the weights were fitted in."""
    found: dict[str, Tensor] = {}
    for norm in norms:
        order = fit.orders.get(norm.name)
        linears = [linear.name for linear in norm.linears]
        for name, statistic in channel_statistics(model, {norm.name: linears}).items():
            found[name] = statistic if order is None else statistic[order]
    return found


def _fall_back(
    runner: Runner, emulation: Emulation, estimates: Estimates, split: Split, increase: float
) -> tuple[str, ...]:
    reference = runner.loss(emulation, {}, split.held_out)
    check_finite(Loss(reference, 1), "the held-out batches")

    def rank() -> list[str]:
        runner.bar.total += len(estimates)
        few = few_rows(split.fitted[0])
        batch = few if has_tokens(few) else split.fitted[0]
        return rank_by_cost(
            estimates, lambda e: token_rows(batch, runner.logits(emulation, e, batch))
        )

    def loss(under: Estimates) -> float:
        return runner.loss(emulation, under, split.held_out)

    return exact_norms(estimates, loss, rank, (1 + increase) * reference)
