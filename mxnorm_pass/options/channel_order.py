"""Is a model's residual stream in the channel order that its calibration was fitted in?

Block weights belong to blocks of channels, and the weights of a model tell which channel is
which: a calibration keeps a statistic per channel of some of them. Compared by correlation, which
survives rounding and a fine-tune, unlike a hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mxnorm_pass.errors import InvalidOptionsError
from mxnorm_pass.names import clean_module_path
from mxnorm_pass.options.calibration import Calibration

# Channels in another order correlate by 0 +- 1 / sqrt(D), those of a fine-tuned model by almost 1.
_SAME = 0.5
# Below it a statistic is as good as constant: bfloat16 itself is no finer.
_SPREAD = 2.0**-8
_TIE = 1e-3


def channel_statistics(model: nn.Module, norms: Mapping[str, Iterable[str]]) -> dict[str, Tensor]:
    """What :class:`Calibration` keeps of ``model`` as ``channels``.

    For each norm its gain, or where the gains are all alike the RMS of the columns of a linear
    that reads the norm.

    Args:
        model: as it was calibrated, its channels permuted already.
        norms: by name, the linears that read each.

    Returns:
        Parameter name -> [D] float32, on the CPU.
    """
    parameters = {clean_module_path(name): p for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for norm, consumers in norms.items():
        owners = (norm, *consumers)
        # A linear without a module of its own has the name of its weight.
        names = [n for o in owners for n in parameters if o in (n, n.rpartition(".")[0])]
        gains = [n for n in names if n.startswith(f"{norm}.")]
        linears = [n for n in names if n not in gains and parameters[n].ndim == 2]
        for name in (*gains, *linears):
            statistic = _statistic(parameters[name])
            if statistic is not None and _varies(statistic):
                found[name] = statistic
                break
    return found


def check_channels(calibration: Calibration, parameters: Mapping[str, Tensor]) -> bool:
    """Check that these parameters have their channels in the calibration's order.

    Args:
        parameters: some or all of a model's, by full name; others than the calibration knows do
            no harm.

    Returns:
        False where that cannot be told: the calibration has an order and none of its statistics,
        or the values are no plain tensors or all alike.

    Raises:
        InvalidOptionsError: a width differs, the order was not applied, or these are
            other weights.
    """
    agreement, without_order = [], []
    for name, stored in calibration.channels.items():
        statistic = _statistic(parameters[name]) if name in parameters else None
        if statistic is None:
            continue
        if statistic.shape != stored.shape:
            raise InvalidOptionsError(
                f"the calibration belongs to another model: {name!r} has {len(statistic)} "
                f"channels, in the calibration {len(stored)}"
            )
        if _varies(statistic):
            agreement.append(_correlation(statistic, stored))
            without_order.append(_correlation(statistic, _original(calibration, stored)))
    ordered = calibration.order is not None and not _is_identity(calibration.order)
    if not agreement:
        return not ordered
    _judge(_mean(agreement), _mean(without_order))
    return not ordered or abs(_mean(agreement) - _mean(without_order)) > _TIE


def _judge(agreement: float, without_order: float) -> None:
    if agreement >= _SAME and agreement >= without_order - _TIE:
        return
    if without_order >= _SAME:
        raise InvalidOptionsError(
            "the calibration was fitted in another order of the residual channels than this model "
            "has. Apply it once, before compiling: "
            "mxnorm_pass.permute_channels(model, calibration.order)"
        )
    raise InvalidOptionsError(
        "the calibration belongs to other weights: channel by channel they correlate by "
        f"{agreement:.2f} with those that were calibrated. Calibrate this model with "
        "mxnorm_pass.calibrate; if its channels were permuted since, undo that first"
    )


def _original(calibration: Calibration, stored: Tensor) -> Tensor:
    order = calibration.order
    if order is None or len(order) != len(stored):
        return stored
    return torch.empty_like(stored).index_copy_(0, order, stored)


def _is_identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order)))


@torch.no_grad()
def _statistic(parameter: Tensor) -> Tensor | None:
    """[D] itself, or the RMS of the columns of [N, D]; None of what has no values to read."""
    plain = type(parameter) in (Tensor, nn.Parameter)  # neither fake nor quantised
    if not plain or parameter.is_meta or not parameter.dtype.is_floating_point:
        return None
    if parameter.ndim == 1:
        statistic = parameter.detach()
    elif parameter.ndim == 2:
        statistic = torch.linalg.vector_norm(parameter, dim=0, dtype=torch.float32)
        statistic /= parameter.shape[0] ** 0.5
    else:
        return None
    return statistic.to("cpu", torch.float32, copy=True)


def _varies(statistic: Tensor) -> bool:
    return bool(statistic.std(correction=0) > _SPREAD * statistic.abs().max())


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float(torch.nan_to_num(a @ b / (a.norm() * b.norm())))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
