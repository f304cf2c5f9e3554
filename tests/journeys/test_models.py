"""Every architecture of ``examples/models.py``, against an uncompiled model of ``functional``."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import (
    BF16,
    F32,
    NOTHING_TO_FUSE,
    assert_sites_are_the_norms_that_ran,
    build,
    compiled,
    expected_warnings,
    models,
    outputs_of,
    same_bits,
)
from functional_mode import FunctionalMode, NormRule
from pairwise import each_value
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mxnorm_pass
from mxnorm_pass import SkipReason
from mxnorm_pass.kernels import coverage

pytestmark = expected_warnings

ONE_PLUS = {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"}
# Classes that round to the input's dtype after the gain alone; all others do so before it, too.
LATE_CAST = {*ONE_PLUS, "Olmo2RMSNorm", "GptOssRMSNorm", "RMSNorm"}


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.full
@each_value(name=list(models.ARCHITECTURES), estimator=["mxnorm", "exact"], device=DEVICES)
@torch.no_grad()
def test_outputs_are_those_of_functional(name, estimator, device, monkeypatch) -> None:
    """With the exact RMS: those of the uncompiled model with the same casts.

    In bf16, where it shows at which places a norm rounds; test_models_training has float32. A
    kernel adds up a row in another order, which the rewrite has nothing to do with.
    """
    without_kernels(monkeypatch)
    model = build(name, BF16).to(device)
    inputs = tree_map_only(Tensor, lambda t: t.to(device), models.example_inputs(model))
    with FunctionalMode(model, estimator) as mode:
        want = outputs_of(model, inputs)
    with mxnorm_pass.record() as report:
        got = outputs_of(compiled(model, estimator=estimator), inputs)
    assert same_bits(got, want)
    assert_sites_are_the_norms_that_ran(report, mode)
    assert mode.rules == {k: NormRule(k in ONE_PLUS, k not in LATE_CAST) for k in mode.rules}
    assert bool(mode.linears) == (name not in NOTHING_TO_FUSE)
    assert same_bits(outputs_of(model, inputs), want) == (name in NOTHING_TO_FUSE)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "capability", lambda device: (0, 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels run on CUDA devices")
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
@torch._inductor.config.patch(force_disable_caches=True)
@torch.no_grad()
def test_kernels_are_no_worse_than_their_decomposition(estimator, inner, monkeypatch) -> None:
    """Errors against float32 weights and activations with the same casts."""
    model = build("Llama", BF16).cuda()
    inputs = tree_map_only(Tensor, lambda t: t.cuda(), models.example_inputs(model))
    wide = copy.deepcopy(model).float()
    with FunctionalMode(wide, estimator):
        truth = outputs_of(wide, inputs)[0].double()

    def error(inner: str) -> float:
        got = outputs_of(compiled(model, estimator=estimator, inner=inner), inputs)[0].double()
        return float((got - truth).norm() / truth.norm())

    kernels = error(inner)
    without_kernels(monkeypatch)
    # The two differ by single steps of single elements: their errors may differ by chance. Not
    # against Inductor's decomposition: it leaves roundings out that the model has.
    assert kernels <= 1.1 * error("aot_eager")


@pytest.mark.full
@torch.no_grad()
def test_graph_breaks_in_the_experts() -> None:
    """The loop over experts depends on data: each graph reports the norms that it holds."""
    model = build("Mixtral", F32)
    model.set_experts_implementation("eager")
    inputs = models.example_inputs(model)
    with FunctionalMode(model, "mxnorm"):
        want = outputs_of(model, inputs)
    with mxnorm_pass.record() as report:
        got = outputs_of(compiled(model), inputs)
    assert same_bits(got, want)
    assert len(report.graphs) > 1
    # Both layers run one graph, and the final norm is in another.
    (layer, final) = (graph for graph in report.graphs if graph.sites)
    assert [site.status for site in layer.sites] == ["fused", "skipped"]
    assert [site.reason for site in final.sites] == [SkipReason.NO_MX_CAST]
