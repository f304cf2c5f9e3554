"""torchao's NVFP4 training: its casts are kernels that show no inside, and stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch
from nvfp4_training import QUANTIZE, convert_to_nvfp4_training, nvfp4_training
from pairwise import some
from reference import NORM_FED, Recipe, build_llama, expected_sites, reference_of, token_ids
from sm100 import sm100, to_fake_cuda
from torch import nn
from training import assert_gradients_equal, train

import mxnorm_pass
from mxnorm_pass import Report, SkipReason

# torchao wants rows in multiples of 128.
IDS = token_ids(1, 128)
EVERY_LINEAR = {*NORM_FED, "o_proj", "down_proj"}
LAYER_NORMS = [name for name, _ in expected_sites(1)]


@pytest.fixture(autouse=True)
def torchao_ops() -> Iterator[None]:
    with nvfp4_training():
        yield


def llama(names: Collection[str]) -> nn.Module:
    return convert_to_nvfp4_training(build_llama(torch.bfloat16, layers=1, hidden=128), names)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


def assert_nothing_is_rewritten(report: Report) -> None:
    *layers, last = report.sites
    assert [site.norm for site in layers] == LAYER_NORMS
    assert {site.reason for site in layers} == {SkipReason.CAST_NOT_RECOGNIZED}, str(report)
    assert {site.detail for site in layers} == {f"torchao::{QUANTIZE} is not known"}
    assert (last.norm, last.reason) == ("model.norm", SkipReason.NO_MX_CAST)
    assert all(graph.before == graph.after for graph in report.graphs)


@some(
    ["mxnorm-norm-fed", "exact-all"],
    1,
    estimator=["mxnorm", "exact"],
    quantize=["norm-fed", "existing", "all"],
)
def test_each_norm_says_which_op_is_unknown(estimator: str, quantize: str) -> None:
    model = llama(EVERY_LINEAR)
    want, want_gradients = train(model, model, IDS)
    with mxnorm_pass.record() as report:
        run = compiled(model, estimator=estimator, quantize=quantize)
        got, gradients = train(run, model, IDS)
    assert_nothing_is_rewritten(report)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@some(
    ["q_proj-mxnorm", "every second-exact"],
    names={
        "q_proj": {"q_proj"},
        "every second": {"k_proj", "up_proj"},
        "all but v_proj": EVERY_LINEAR - {"v_proj"},
    },
    estimator=["mxnorm", "exact"],
)
def test_a_norm_that_also_feeds_other_linears(names: Collection[str], estimator: str) -> None:
    """They get casts and the estimate, torchao's the exact norm, in forward and backward."""
    model = build_llama(torch.bfloat16, layers=1, hidden=128)
    recipe = Recipe(norm={"estimator": estimator}, off=tuple(names), gain=gain_of(estimator))
    reference = convert_to_nvfp4_training(reference_of(model, recipe), names)
    want, want_gradients = train(reference, reference, IDS)
    model = convert_to_nvfp4_training(model, names)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, estimator=estimator), model, IDS)
    consumers = [
        tuple(c for c in site[1] if not c.endswith(tuple(names))) for site in expected_sites(1)
    ]
    assert [site.consumers for site in report.fused] == [c for c in consumers if c]
    unknown = [s for s in report.skipped if s.reason is SkipReason.CAST_NOT_RECOGNIZED]
    assert len(unknown) == consumers.count(()) and len(report.sites) == 3
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


def gain_of(estimator: str) -> str:
    return "activation" if estimator == "exact" else "fold"


@torch.no_grad()
def test_inference_on_cuda() -> None:
    model = llama(EVERY_LINEAR)
    with sm100():
        to_fake_cuda(model)
        ids = IDS.to("cuda")
        report = mxnorm_pass.explain(model, ids, use_cache=False, options={"inner": "aot_eager"})
    assert_nothing_is_rewritten(report)
