"""Random training programs, and what each must compute: outputs and every gradient.

A program is a model of a few norms with all that may surround them: hooks, Functions, detached and
scaled readers, gains from elsewhere, shared bodies, branches, checkpoints. Its reference is the
same program in eager mode, in which those readers that the report calls fused see the norm by
``functional`` and all others see the exact one.

``python tests/lib/random_training.py COUNT [FIRST]`` runs so many and prints the failures.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from random_training_models import Oracle, Program
from random_training_specs import BF16, F32, D, ProgramSpec, random_spec
from torch import Tensor

import mxnorm_pass
from mxnorm_pass import Report, Site, SkipReason
from mxnorm_pass.passes import insert

# Relative norm. Sums of gradients in another order differ by the last bit, and bf16 has 8.
TOLERANCE = {F32: 1e-5, BF16: 1e-2}


@dataclass(frozen=True)
class Outcome:
    """What one program has come to.

    Attributes:
        unsupported: plain ``aot_eager`` fails on it, too; or eager mode does.
        errors: relative differences that are too large, by the name of output or gradient.
    """

    spec: ProgramSpec
    report: Report | None
    unsupported: str = ""
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def refused(self) -> tuple[Site, ...]:
        """The norms that are skipped though nothing is in their way."""
        if self.report is None:
            return ()
        specs = [self.spec.specs[kind] for kind in self.spec.of_layer]
        # Under dynamic=True Dynamo makes an input of eps, and in a body no constant any more.
        excused = {SkipReason.EPS_INPUT} if self.spec.dynamic else set()
        if any(spec.has_router for spec in specs):
            # A linear that leads to a router is part of it.
            excused.add(SkipReason.NO_MX_CAST)
        return tuple(
            site
            for site in self.report.skipped
            if not specs[_layer_of(site.norm)].has_obstacle and site.reason not in excused
        )


def run_program(spec: ProgramSpec, seed: int = 0) -> Outcome:
    model = Program(spec, seed)
    try:
        step(model, model, spec)
    except Exception as error:
        return Outcome(spec, None, unsupported=f"eager: {error}")
    torch._dynamo.reset()
    try:
        with mxnorm_pass.record() as report, recorded_casts() as cast:
            found = step(_compiled(model, spec), model, spec)
    except Exception as error:
        plain = _failure_of_plain(model, spec)
        if plain is None:
            raise
        if type(plain) is not type(error):
            raise
        return Outcome(spec, None, unsupported=str(plain))
    sites = {_layer_of(site.norm): site for site in report.fused}
    model.under(Oracle(spec, sites, frozenset(cast)))
    wanted = step(model, model, spec)
    model.under(None)
    errors = _errors(found, wanted, spec.dtype)
    if errors and _plain_is_wrong(model, spec):
        return Outcome(spec, None, unsupported=f"plain aot_eager is wrong, too: {errors}")
    return Outcome(spec, report, errors=errors)


def _compiled(model: Program, spec: ProgramSpec) -> Any:
    modules: dict[str, bool] = {}
    for number, kind in enumerate(spec.of_layer):
        layer = spec.specs[kind]
        if layer.off:
            modules[f"layers.{number}.norm"] = False
        for j, reader in enumerate(layer.readers):
            if reader.off:
                modules[f"layers.{number}.readers.{j}*"] = False
    options = {"inner": "aot_eager", "modules": modules, **spec.options}
    return torch.compile(
        model, backend="mxnorm", options=options, dynamic=spec.dynamic or None, fullgraph=True
    )


def _plain_step(model: Program, spec: ProgramSpec) -> dict[str, Tensor]:
    torch._dynamo.reset()
    dynamic = spec.dynamic or None
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    return step(compiled, model, spec)


def _failure_of_plain(model: Program, spec: ProgramSpec) -> Exception | None:
    try:
        _plain_step(model, spec)
    except Exception as error:
        return error
    return None


def _plain_is_wrong(model: Program, spec: ProgramSpec) -> bool:
    return bool(_errors(_plain_step(model, spec), step(model, model, spec), spec.dtype))


@contextmanager
def recorded_casts() -> Iterator[set[str]]:
    """Names of the linears that the backend gives casts meanwhile."""
    found: set[str] = set()
    original = insert._quantize

    def quantize(graph: Any, quantized: Any, *args: Any) -> None:
        found.add(quantized.linear.name)
        original(graph, quantized, *args)

    with mock.patch.object(insert, "_quantize", quantize):
        yield found


def _layer_of(norm: str) -> int:
    return int(norm.split(".")[1])


def step(function: Callable[..., Any], model: Program, spec: ProgramSpec) -> dict[str, Tensor]:
    """Outputs, what was written, and all gradients."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(spec.shape, generator=generator)
    # Blocks of unlike scales, where the estimate's gradient is far from the exact norm's.
    x[..., :4] *= 5
    x = x.to(spec.dtype).requires_grad_(spec.x_trains)
    condition = torch.linspace(-1, 1, D)[None].to(spec.dtype)
    state = torch.zeros(D)
    outputs = function(x, condition, state)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    trained = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if trained:
        torch.autograd.backward(*zip(*trained, strict=True))
    found = {f"out {i}": y.detach() for i, y in enumerate(outputs)} | {"state": state}
    leaves = {"x": x, **dict(model.named_parameters())}
    found |= {n: p.grad for n, p in leaves.items() if p.grad is not None}
    return {name: value.clone() for name, value in found.items()}


def _errors(
    found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """What differs; a gradient that is missing is zero."""
    errors: dict[str, float] = {}
    for name in {**found, **wanted}:
        a, b = found.get(name), wanted.get(name)
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        if a.shape != b.shape or a.dtype != b.dtype:
            errors[name] = float("inf")
            continue
        scale = max(float(a.double().norm()), float(b.double().norm()))
        error = float((a.double() - b.double()).norm()) / scale if scale else 0.0
        if not error <= TOLERANCE[dtype]:
            errors[name] = error
    return errors


def main(count: int, first: int = 0) -> int:
    statuses: Counter[str] = Counter()
    failures: list[int] = []
    start = time.perf_counter()
    for seed in range(first, first + count):
        spec = random_spec(seed)
        try:
            outcome = run_program(spec, seed)
        except Exception:
            failures.append(seed)
            print(f"seed {seed}: {spec}\n{traceback.format_exc(limit=-6)[-3000:]}", flush=True)
            continue
        if outcome.unsupported:
            statuses["unsupported"] += 1
            print(f"seed {seed}: unsupported: {outcome.unsupported[:150]!r}", flush=True)
            continue
        assert outcome.report is not None
        for site in outcome.report.sites:
            statuses[site.status if site.reason is None else f"{site.reason.name}"] += 1
        for site in outcome.refused:
            print(f"seed {seed}: refused: {spec.specs[spec.of_layer[_layer_of(site.norm)]]} {site}")
        statuses["refused"] += len(outcome.refused)
        if outcome.errors:
            failures.append(seed)
            print(f"seed {seed}: {spec}\n{outcome.report}\n{outcome.errors}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{count} programs from {first}: {dict(statuses)}, {seconds:.0f} s, failures {failures}")
    return len(failures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
