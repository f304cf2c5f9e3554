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
from functional_mode import FunctionalMode, NormRule, randomise_gains, rms_norms
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

# A model whose layers have no norm in front of a linear, or no RMSNorm.
NOTHING_TO_FUSE = {"OLMo-2", "GPT-2 (LayerNorm)"}

pytestmark = pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
every_model = pytest.mark.parametrize("name", models.ARCHITECTURES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def build(name: str, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = models.build(name, dtype)
    randomise_gains(model)
    return model


def output_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    for field in ("logits", "last_hidden_state"):
        if hasattr(output, field):
            output = getattr(output, field)
    assert isinstance(output, Tensor)
    return output


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


def assert_sites_are_the_norms_that_ran(report: Report, mode: FunctionalMode) -> None:
    rms = [s for s in report.sites if s.reason is not SkipReason.LAYER_NORM]
    assert Counter(s.norm for s in rms) == Counter(mode.calls)
    assert len(report.sites) - len(rms) == mode.layer_norm_calls
    assert {s.norm: list(s.consumers) for s in report.fused} == mode.linears
    assert {s.reason for s in report.skipped} <= {SkipReason.NO_MX_CAST, SkipReason.LAYER_NORM}


@pytest.mark.parametrize("estimator", ["exact", "mxnorm"])
@both_dtypes
@every_model
@torch.no_grad()
def test_logits_are_those_of_functional(name, dtype, estimator) -> None:
    """With the exact RMS: those of the uncompiled model with the same casts."""
    model = build(name, dtype)
    inputs = models.example_inputs(model)
    with FunctionalMode(model, estimator) as mode:
        want = output_of(model, inputs)
    with mxnorm_pass.record() as report:
        got = output_of(compiled(model, estimator=estimator), inputs)
    assert torch.equal(got, want)
    assert_sites_are_the_norms_that_ran(report, mode)
    assert bool(mode.linears) == (name not in NOTHING_TO_FUSE)
    assert torch.equal(output_of(model, inputs), want) == (name in NOTHING_TO_FUSE)
