"""Llamas whose inserted casts have other formats than MXFP8."""

from __future__ import annotations

import pytest
import torch
from pairwise import some
from reference import Recipe, build_llama, reference_of
from torch import nn
from training import IDS, assert_gradients_equal, train

import mxnorm_pass

FORMATS = ["mxfp6", "mxfp6 e3m2", "mxfp4"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compiled(model: nn.Module, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


@some(["mxfp4-bf16"], format=FORMATS, dtype=DTYPES)
def test_logits_and_gradients_are_those_of_functional(format: str, dtype: torch.dtype) -> None:
    model = build_llama(dtype, layers=1)
    reference = reference_of(model, Recipe(cast={"format": format}))
    want, want_gradients = train(reference, reference)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, format=format), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)
    fused = {site.format for site in report.fused}
    assert len(report.fused) == 2 and {f.rsplit(" rceil")[0] for f in fused} == {
        functional_name(format)
    }
    with torch.no_grad():
        got = compiled(model, format=format)(IDS, use_cache=False).logits
        assert torch.equal(got, reference(IDS, use_cache=False).logits)


def functional_name(format: str) -> str:
    return mxnorm_pass.functional.block_format(format).name.rsplit(" rceil")[0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
def test_verify(format: str, estimator: str) -> None:
    model = build_llama(torch.float32, layers=1)
    train(compiled(model, format=format, estimator=estimator, verify=True), model)


def test_quantize_all_and_inductor() -> None:
    model = build_llama(torch.bfloat16, layers=1)
    reference = reference_of(model, Recipe(cast={"format": "mxfp4"}, every_linear=True))
    with torch.no_grad():
        want = reference(IDS, use_cache=False).logits
        got = compiled(model, format="mxfp4", quantize="all")(IDS, use_cache=False).logits
        assert torch.equal(got, want)
        fast = compiled(model, format="mxfp4", quantize="all", inner="inductor")
        near = fast(IDS, use_cache=False).logits
    assert (near - want).float().norm() < 0.05 * want.float().norm()
