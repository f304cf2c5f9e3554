"""``mxnorm_pass.convert``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mxnorm_pass.checkpoints.convert.conversion import Conversion, size_of
from mxnorm_pass.checkpoints.convert.formats import (
    check_torchao,
    multiplies_natively,
    quantize_weight,
)
from mxnorm_pass.checkpoints.convert.plan import Plan
from mxnorm_pass.checkpoints.convert.saving import check_quantizer, describe_for_transformers
from mxnorm_pass.checkpoints.progress import progress_bar
from mxnorm_pass.errors import ConversionError, MXNormWarning
from mxnorm_pass.names import clean_module_path
from mxnorm_pass.options.channel_order import check_channels
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.parse import parse


def convert(
    model: nn.Module, options: Mapping[str, Any] | None = None, *, progress: bool = True
) -> Conversion:
    """Replace weights by casts of them, in place: torchao's ``MXTensor`` or ``NVFP4Tensor``.

    They have the bits that a compile with the same options would cast in each call, and a compile
    of the converted model fuses the same norms, with the gain in the activation::

        options = {"quantize": "all", "modules": {"*.o_proj": False}}
        print(mxnorm_pass.convert(model.eval(), options))
        compiled = torch.compile(model, backend="mxnorm", options=options)

    Every ``nn.Linear`` is converted that ``quantize="all"`` casts. Which linears a norm feeds only
    a graph tells, and there is none: what is to stay as it is ``modules`` turns off. Heads
    (``lm_head``, ``output``), and what has the name of a router of experts, it has to name. What
    cannot be converted stays, with the reason in the value that is returned.

    Weights are converted one by one, where they lie, each freed before the next is cast, if
    nothing else holds it. Do it before an optimizer is made; gradients of weights are dropped. A
    converted weight takes none. Matmuls are emulated where the device has none of the format:
    convert on the device that the model is to run on.

    Args:
        model: with bfloat16 weights, in eval mode or with weights that take no gradients; its
            channels in the order of the calibration, if it has one.
        options: as for ``torch.compile``; ``quantize`` is "all" where it is not given. Of
            importance are ``format``, ``elem_dtype``, ``scale_mode``, ``recipe`` and ``modules``.
        progress: show a bar on a terminal.

    Raises:
        ValueError: an option is wrong, or asks for what a converted model cannot give; the model
            is quantised by another library. The model is as it was.
        ConversionError: a cast failed; the message says which linears are converted by then. The
            model runs, and a second call converts the others.
        MissingExtraError: torchao or tqdm is not installed.
    """
    check_torchao()
    config = _check_options(options)
    model = _check_model(model)
    plan = Plan.of(model, config)
    _check_formats(plan)
    _check_calibration(model, config)
    _warn_unmatched(model, config)
    before = size_of(model)
    with progress_bar("convert", len(plan.linears), shown=progress) as bar:
        try:
            _convert(plan, bar)
        finally:
            describe_for_transformers(model)
    return Conversion(tuple(plan.linears), plan.left, before, size_of(model))


@torch.no_grad()
def _convert(plan: Plan, bar: Any) -> None:
    done: list[str] = []
    for name, planned in plan.linears.items():
        try:
            quantize_weight(planned.module, planned.format)
        except Exception as error:
            raise _failed(name, done, len(plan.linears), error) from error
        done.append(name)
        bar.update()


def _failed(name: str, done: Sequence[str], total: int, error: Exception) -> ConversionError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    converted = f": {', '.join(done)}" if done else ""
    return ConversionError(
        f"{name!r} cannot be converted: {reason}. It and those behind it are as they were; "
        f"{len(done)} of {total} linears are converted{converted}. Turn it off in `modules`, or "
        "remove the cause, and call convert again for the rest"
    )


def _check_options(options: Mapping[str, Any] | None) -> MXNormConfig:
    config = parse(options).config
    given = options or {}
    if given.get("quantize", "all") != "all":
        raise ValueError(
            f"options has quantize={config.quantize!r}, and convert sees weights, no graph: give "
            "quantize='all' or none, and turn off linears that are to stay as they are: "
            "'modules': {'*.o_proj': False, '*.down_proj': False}"
        )
    if config.gain == "fold":
        raise ValueError(
            "options has gain='fold', which multiplies the gain into a weight before its cast, and "
            "a converted weight is cast already: give gain='activation' or none"
        )
    if config.prefix:
        raise ValueError(
            f"options has the prefix {config.prefix!r}; convert the whole model, whose linears "
            "then have the names that compile_layers gives them"
        )
    return config


def _check_model(model: Any) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; it must be an nn.Module")
    check_quantizer(model)
    return model


def _check_formats(plan: Plan) -> None:
    for name, planned in plan.linears.items():
        fmt, device = planned.format, planned.module.weight.device
        if fmt.family == "nvfp4" and not multiplies_natively(device):
            raise ValueError(
                f"{name!r} is to be converted to NVFP4 on {str(device)!r}, and torchao multiplies "
                "that on GPUs of compute capability 10.0 or newer alone: move the model to one "
                "first, or give format='mxfp4' or 'mxfp8', which it emulates elsewhere"
            )
        if fmt.element.name == "e5m2" and fmt.scale_mode != "rceil":
            raise ValueError(
                f"{name!r} is to be converted to {fmt.name!r}, and in a compile torchao's cast of "
                "activations to that is none: its elements overflow. Give scale_mode='rceil', or "
                "elem_dtype=torch.float8_e4m3fn"
            )


def _check_calibration(model: nn.Module, config: MXNormConfig) -> None:
    """Once the weights are cast, channels can no longer be permuted."""
    if config.calibration is not None:
        check_channels(config.calibration, dict(model.named_parameters()))


def _warn_unmatched(model: nn.Module, config: MXNormConfig) -> None:
    # Norms and linears, which have no modules inside.
    leaves = [clean_module_path(n) for n, module in model.named_modules() if not module._modules]
    for unmatched in config.unmatched_patterns(leaves):
        nearest = ", ".join(unmatched.nearest) or "none"
        warnings.warn(
            f"mxnorm: the pattern {unmatched.pattern!r} in `modules` matches no norm and no "
            f"linear of the model; nearest names: {nearest}",
            MXNormWarning,
            stacklevel=3,
        )
