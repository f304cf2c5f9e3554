"""Compile random models and hold them against ``functional``."""

from __future__ import annotations

from typing import Any

import example_counts
import torch
from hypothesis import HealthCheck, Phase, settings
from matching import BF16, assert_explained, run
from random_graphs import RandomModel, is_fusable, linear_name
from random_specs import ModelSpec
from torch import Tensor, nn

from mxnorm_pass import Report, SkipReason
from mxnorm_pass.options.config import MXNormConfig


def examples(count: int) -> Any:
    """The same examples in every run; compiling takes as long as it takes."""
    return settings(
        max_examples=example_counts.examples(count),
        derandomize=True,
        database=None,
        deadline=None,
        # Shrinking an example compiles it hundreds of times.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def compiled(
    spec: ModelSpec, model: nn.Module, args: tuple[Tensor, ...], **options: Any
) -> tuple[tuple[Tensor, ...], Report]:
    with torch.autocast("cpu", BF16, enabled=spec.autocast):
        options = {**spec.options, **options}
        return run(model, *args, train=spec.train, dynamic=spec.dynamic, **options)


def eager(spec: ModelSpec, model: RandomModel, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    autocast = torch.autocast("cpu", BF16, enabled=spec.autocast)
    with autocast, torch.set_grad_enabled(spec.train):
        return model(*args)


def assert_same_results(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), i
        assert a.requires_grad == b.requires_grad, i
        assert torch.equal(a, b), f"output {i}: {int((a != b).sum())} of {a.numel()} differ"


def all_gradients(
    model: nn.Module, args: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    leaves = {"x": args[0], **dict(model.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    outputs = tuple(y for y in outputs if y.requires_grad)
    if not leaves or not outputs:
        return {}
    torch.manual_seed(2)
    cotangents = [torch.randn_like(y) for y in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


# One site per norm


def check_sites(spec: ModelSpec, model: RandomModel, report: Report) -> None:
    assert len(report.graphs) == 1
    config = MXNormConfig(**spec.options)
    stages = [(i, s) for i, s in enumerate(model.stages) if s.norm.gives_a_site]
    assert len(report.fused) + len(report.skipped) == len(stages), str(report)
    assert_explained(report)
    for (i, stage), site in zip(stages, report.sites, strict=True):
        assert (site.status == "skipped") == (site.reason is not None), str(site)
        names = {f"stages.{i}"} if stage.spec.inline else names_of(model, stage.norm)
        assert site.norm in names, str(site)
        named = [(linear_name(spec, i, j), r) for j, r in enumerate(stage.readers)]
        fusable = list(dict.fromkeys(n for n, r in named if is_fusable(r, n, stage.norm, config)))
        if site.status == "fused":
            assert site.consumers == tuple(fusable), f"{site} should have {fusable}"
            continue
        enabled = config.resolve(site.norm).enabled
        assert (site.reason is SkipReason.DISABLED) or enabled, str(site)
        if stage.norm.reason is not None and enabled:
            assert site.reason is stage.norm.reason, str(site)
        elif enabled and fusable:
            allowed = (SkipReason.NO_WEIGHT_CAST, SkipReason.ROUNDING, SkipReason.BLOCK_SIZES)
            assert site.reason in allowed, str(site)


def names_of(model: nn.Module, wanted: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules(remove_duplicate=False) if m is wanted}
