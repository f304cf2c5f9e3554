"""How well the estimate of the RMS fits what the norms of a model read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxnorm_pass import functional

_BLOCK = 32


@dataclass(frozen=True)
class NormStatistics:
    """Over the rows that a norm reads.

    Attributes:
        ratio: mean of rho~/rho, the estimate of 1/RMS over the true one.
        spread: standard deviation of that.
        kurtosis: mean of E[x^4] / E[x^2]^2; 3 for a Gaussian.
    """

    name: str
    ratio: float
    spread: float
    kurtosis: float


def norm_statistics(model: nn.Module, ids: Tensor, p: float) -> list[NormStatistics]:
    """Of each RMSNorm, in one uncompiled forward pass without gradients.

    Args:
        ids: [rows, tokens], int64, on the model's device.
        p: exponent of the estimate.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = measured(inputs[0].float(), p)

        return hook

    norms = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in norms]
    try:
        # Of a sharded model the layers themselves are compiled, in place.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [NormStatistics(name, *values.tolist()) for name, values in found.items()]


def measured(x: Tensor, p: float) -> Tensor:
    """[3], float32: ratio, spread and kurtosis of [..., D]."""
    square = x.square().mean(-1, keepdim=True)
    ratio = square.sqrt() / functional.rms_estimate(x, p=p, block_size=_BLOCK)
    kurtosis = x.pow(4).mean(-1, keepdim=True) / square.square()
    return torch.stack([ratio.mean(), ratio.std(), kurtosis.mean()])
