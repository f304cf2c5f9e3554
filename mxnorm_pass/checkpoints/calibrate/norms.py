"""Which norms the backend would fuse, and the modules that they and their linears are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mxnorm_pass.checkpoints.batches import Batch, run
from mxnorm_pass.compilation.explain import explain
from mxnorm_pass.errors import MXNormWarning
from mxnorm_pass.names import clean_module_path
from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.parse import parse
from mxnorm_pass.report.site import Site


@dataclass(frozen=True)
class Linear:
    """A linear that reads a fused norm.

    Attributes:
        format: of the casts that the backend inserts; None where the module casts by itself.
    """

    name: str
    module: nn.Module
    format: BlockFormat | None


@dataclass(frozen=True)
class FusedNorm:
    """A norm whose RMS is to be estimated, and the linears that will read the estimate.

    Attributes:
        folds: the gain goes into the weights before their casts.
    """

    name: str
    module: nn.Module
    linears: tuple[Linear, ...]
    folds: bool

    @property
    def width(self) -> int:
        """Channels of a row."""
        weight: Any = self.linears[0].module.weight
        return int(weight.shape[-1])


def check_options(options: Mapping[str, Any] | None) -> MXNormConfig:
    """The config, or a ValueError where there is nothing to calibrate."""
    config = parse(options).config
    if config.calibration is not None:
        raise ValueError("options has a calibration; leave it out, to calibrate is to find one")
    if config.prefix:
        raise ValueError(
            f"options has the prefix {config.prefix!r}; calibrate the whole model, whose norms "
            "then have the names that compile_layers gives them"
        )
    if config.estimator == "exact":
        raise ValueError("options asks for estimator='exact', which needs no calibration")
    return config


@torch.no_grad()
def fused_norms(
    model: nn.Module, batch: Batch, options: Mapping[str, Any] | None, device: torch.device
) -> list[FusedNorm]:
    """The norms that the backend fuses for these options, by the names that it uses.

    Raises:
        ValueError: there are none, or a rule of ``modules`` gives one of them another ``p``.
    """
    config = check_options(options)
    report = run(lambda *a, **k: explain(model, *a, options=options, **k), batch, device)
    fused = [site for site in report.fused if site.estimator == "mxnorm"]
    if not fused:
        raise ValueError(f"the backend fuses no norm of this model:\n{report}")
    _check_one_p(config, fused)
    modules = {clean_module_path(name): module for name, module in model.named_modules()}
    found: list[FusedNorm] = []
    for name in dict.fromkeys(site.norm for site in fused):
        norm = _fused_norm(name, [s for s in fused if s.norm == name], modules, config)
        if norm is None:
            _warn_exact(name, "it or a linear that reads it is no module of its own")
        else:
            found.append(norm)
    if not found:
        raise ValueError("no norm that the backend fuses is a module, so none can be calibrated")
    return found


def _check_one_p(config: MXNormConfig, fused: Iterable[Site]) -> None:
    for site in fused:
        p = config.resolve(site.norm).config.p
        if p != config.p:
            raise ValueError(
                f"`modules` gives {site.norm!r} p = {p:g}, the options' p is {config.p:g}; a "
                "calibration has one p for all norms"
            )


def _fused_norm(
    name: str, sites: list[Site], modules: Mapping[str, nn.Module], config: MXNormConfig
) -> FusedNorm | None:
    consumers = dict.fromkeys(c for site in sites for c in site.consumers)
    if name not in modules or not consumers.keys() <= modules.keys():
        return None
    linears = tuple(_linear(consumer, modules[consumer], config) for consumer in consumers)
    return FusedNorm(name, modules[name], linears, folds=sites[0].gain == "fold")


def _linear(name: str, module: nn.Module, config: MXNormConfig) -> Linear:
    # The backend casts for linears that compute nothing but x W^T + b on plain tensors.
    is_plain = type(module).forward is nn.Linear.forward and type(module.weight) is nn.Parameter
    if not is_plain:
        return Linear(name, module, None)
    resolved = config.resolve(name).config
    return Linear(name, module, resolved.cast_format)


def _warn_exact(name: str, why: str) -> None:
    warnings.warn(f"mxnorm: {name!r} stays exact: {why}", MXNormWarning, stacklevel=4)
