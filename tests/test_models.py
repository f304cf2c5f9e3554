"""Every architecture of ``examples/models.py``, against an uncompiled model of ``functional``."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from functional_mode import FunctionalMode, randomise_gains
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Report, SkipReason

ROOT = Path(__file__).resolve().parents[1]


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load_example("models")

F32, BF16 = torch.float32, torch.bfloat16
# A model whose layers have no norm in front of a linear, or no RMSNorm.
NOTHING_TO_FUSE = {"OLMo-2", "GPT-2 (LayerNorm)"}

pytestmark = pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
every_model = pytest.mark.parametrize("name", models.ARCHITECTURES)


def build(name: str, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = models.build(name, dtype)
    randomise_gains(model)
    return model


def outputs_of(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    output = model(**inputs)
    return (output,) if isinstance(output, Tensor) else output.to_tuple()


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


def assert_sites_are_the_norms_that_ran(report: Report, mode: FunctionalMode) -> None:
    rms = [s for s in report.sites if s.reason is not SkipReason.LAYER_NORM]
    assert Counter(s.norm for s in rms) == Counter(mode.calls)
    assert len(report.sites) - len(rms) == mode.layer_norm_calls
    assert {s.norm: list(s.consumers) for s in report.fused} == mode.linears
    assert {s.reason for s in report.skipped} <= {SkipReason.NO_MX_CAST, SkipReason.LAYER_NORM}


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("dtype, estimator", [(F32, "mxnorm"), (BF16, "mxnorm"), (BF16, "exact")])
@every_model
@torch.no_grad()
def test_logits_are_those_of_functional(name, dtype, estimator) -> None:
    """With the exact RMS: those of the uncompiled model with the same casts."""
    model = build(name, dtype)
    inputs = models.example_inputs(model)
    with FunctionalMode(model, estimator) as mode:
        want = outputs_of(model, inputs)
    with mxnorm_pass.record() as report:
        got = outputs_of(compiled(model, estimator=estimator), inputs)
    assert same_bits(got, want)
    assert_sites_are_the_norms_that_ran(report, mode)
    assert bool(mode.linears) == (name not in NOTHING_TO_FUSE)
    assert same_bits(outputs_of(model, inputs), want) == (name in NOTHING_TO_FUSE)
