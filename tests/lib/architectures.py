"""The models of ``examples/models.py``, seeded, with gains away from 1."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from functional_mode import FunctionalMode, randomise_gains
from matching import assert_explained
from paths import ROOT
from torch import Tensor, nn

from mxnorm_pass import Report, SkipReason

F32, BF16 = torch.float32, torch.bfloat16


def _load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = _load_example("models")

every_model = pytest.mark.parametrize("name", models.ARCHITECTURES)
expected_warnings = pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
# No norm stands in front of a linear, or none is an RMSNorm.
NOTHING_TO_FUSE = {"OLMo-2", "GPT-2 (LayerNorm)"}


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


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def assert_sites_are_the_norms_that_ran(report: Report, mode: FunctionalMode) -> None:
    assert_explained(report)
    rms = [site for site in report.sites if site.reason is not SkipReason.LAYER_NORM]
    assert Counter(site.norm for site in rms) == Counter(mode.calls)
    assert len(report.sites) - len(rms) == mode.layer_norm_calls
    assert {site.norm: list(site.consumers) for site in report.fused} == mode.linears
    assert {s.reason for s in report.skipped} <= {SkipReason.NO_MX_CAST, SkipReason.LAYER_NORM}
