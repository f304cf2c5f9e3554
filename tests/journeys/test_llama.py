"""The main job: an unmodified HuggingFace Llama, against an eager model of functional alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pairwise import each_value, some
from reference import (
    NORM_FED,
    Recipe,
    build_llama,
    convert_to_mxfp8_training,
    expected_sites,
    quantize_with_torchao,
    reference_of,
    token_ids,
    torchao_mode,
)
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from training import (
    GRADIENT_TOLERANCE,
    IDS,
    assert_gradients_equal,
    flat,
    relative_error,
    train,
    worst_gradient,
)

import mxnorm_pass
from mxnorm_pass import SkipReason
from mxnorm_pass.compilation.e8m0_on_cpu import cpu_e8m0_support

DTYPES = [torch.float32, torch.bfloat16]


def infer(model: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


MODELS = {
    "plain": lambda model: model,
    "torchao": quantize_with_torchao,
    "torchao-training": convert_to_mxfp8_training,
}


USES = {
    f"{kind}-{dtype}-{name}": (kind, dtype, training)
    for kind in MODELS
    for dtype in DTYPES
    for training, name in ((False, "inference"), (True, "training"))
    # torchao's inference weights take no gradient and no dtype but bf16.
    if kind != "torchao" or (dtype == torch.bfloat16 and not training)
}


@pytest.mark.full
@some(
    [
        "plain-torch.float32-training-2",
        "plain-torch.bfloat16-inference-2",
        "torchao-torch.bfloat16-inference-1",
        "torchao-training-torch.bfloat16-training-1",
    ],
    use=USES,
    layers=[1, 2],
)
def test_two_norms_per_layer_are_fused(use, layers) -> None:
    kind, dtype, training = use
    model = MODELS[kind](build_llama(dtype, layers=layers))
    with torch.set_grad_enabled(training):
        labels = {"labels": IDS} if training else {}
        report = mxnorm_pass.explain(model, IDS, use_cache=False, **labels)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(layers)
    (skipped,) = report.skipped
    assert (skipped.norm, skipped.reason) == ("model.norm", SkipReason.NO_MX_CAST)
    assert len(report.graphs) == 1
    assert report.graphs[0].name == ("training_0" if training else "inference_0")


@some(["torch.bfloat16-2-fold"], dtype=DTYPES, p=[1, 2, 3.5], gain=["fold", "activation"])
def test_plain_logits_and_gradients_are_those_of_functional(dtype, p, gain) -> None:
    model = build_llama(dtype, layers=1)
    reference = reference_of(model, Recipe(norm={"p": p}, gain=gain))
    want, want_gradients = train(reference, reference)
    got, gradients = train(compiled(model, p=p, gain=gain), model)
    assert torch.equal(got, want)
    assert torch.equal(infer(compiled(model, p=p, gain=gain)), want)
    assert_gradients_equal(gradients, want_gradients)


@pytest.mark.full
@each_value(dtype=DTYPES, gradient=["true", "orthogonal", "paper"])
def test_gradient_modes(dtype, gradient) -> None:
    model = build_llama(dtype, layers=1)
    reference = reference_of(model, Recipe(norm={"gradient": gradient}))
    want, want_gradients = train(reference, reference)
    got, gradients = train(compiled(model, gradient=gradient), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@pytest.mark.full
def test_the_gradient_modes_differ_by_more_than_the_tolerance() -> None:
    gradients = {}
    for gradient in ("true", "orthogonal", "paper"):
        model = build_llama(layers=1)
        gradients[gradient] = train(compiled(model, gradient=gradient), model)[1]
    for a, b in (("true", "orthogonal"), ("true", "paper"), ("orthogonal", "paper")):
        assert (
            worst_gradient(gradients[a], gradients[b])[1] > 10 * GRADIENT_TOLERANCE[torch.float32]
        )


@pytest.mark.full
@each_value(
    dtype=DTYPES,
    off=[("q_proj",), ("k_proj", "up_proj"), ("v_proj", "q_proj")],
    gradient=["true", "orthogonal"],
)
def test_a_linear_that_is_off_reads_the_exact_norm(dtype, off, gradient) -> None:
    """Its siblings stay fused, and each side's gradient goes through its own norm."""
    model = build_llama(dtype, layers=1)
    modules = {f"*.{name}": False for name in off}
    reference = reference_of(model, Recipe(norm={"gradient": gradient}, off=off))
    want, want_gradients = train(reference, reference)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, gradient=gradient, modules=modules), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)
    assert len(report.fused) == 2
    assert not any(c.endswith(off) for s in report.fused for c in s.consumers)


@pytest.mark.full
def test_quantize_all_casts_every_linear_but_lm_head() -> None:
    model = build_llama()
    reference = reference_of(model, Recipe(every_linear=True))
    want, want_gradients = train(reference, reference)
    got, gradients = train(compiled(model, quantize="all"), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


def test_quantize_existing_leaves_a_plain_model_alone() -> None:
    model = build_llama()
    with pytest.warns(mxnorm_pass.MXNormWarning, match="NO_MX_CAST"):
        got = infer(compiled(model, quantize="existing"))
    assert torch.equal(got, infer(model))


@some(
    ["even-torch.float8_e5m2"],
    1,
    mode=["rceil", "floor", "ceil", "even"],
    elem_dtype=[torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_formats_of_inserted_casts(mode, elem_dtype) -> None:
    model = build_llama(torch.bfloat16, layers=1)
    options = {"scale_mode": mode, "elem_dtype": elem_dtype}
    want = infer(reference_of(model, Recipe(cast=options)))
    assert torch.equal(infer(compiled(model, **options)), want)


@some(["rceil"], mode=["rceil", "floor", "ceil", "even"])
def test_torchao_inference(mode) -> None:
    model = build_llama(torch.bfloat16, layers=1)
    recipe = Recipe(cast={"scale_mode": mode}, gain="activation", every_linear=True)
    want = infer(reference_of(model, recipe))
    quantize_with_torchao(model, mode)
    with mxnorm_pass.record() as report:
        got = infer(compiled(model))
    assert torch.equal(got, want)
    assert {s.gain for s in report.fused} == {"activation"}
    assert {s.format for s in report.fused} == {f"mxfp8 e4m3fn {mode} block 32"}


@pytest.mark.full
@some(["rceil", "even"], mode=["rceil", "floor", "ceil", "even"])
def test_exact_changes_no_bit_of_a_torchao_model(mode) -> None:
    model = quantize_with_torchao(build_llama(torch.bfloat16, layers=1), mode)
    with mxnorm_pass.record() as report:
        got = infer(compiled(model, estimator="exact"))
    assert len(report.fused) == 2
    assert torch.equal(got, infer(model))


@some(
    ["torch.bfloat16-rceil-mx-wgrad"],
    dtype=DTYPES,
    mode=["rceil", "floor"],
    wgrad_with_hp={"mx-wgrad": False, "hp-wgrad": True},
)
def test_torchao_training(dtype, mode, wgrad_with_hp) -> None:
    model = build_llama(dtype, layers=1)
    backward = "mx-hp-wgrad" if wgrad_with_hp else "mx"
    recipe = Recipe(
        cast={"scale_mode": mode},
        kept={"scale_mode": torchao_mode(mode)},
        every_linear=True,
        backward=backward,
    )
    reference = reference_of(model, recipe)
    want, want_gradients = train(reference, reference)
    convert_to_mxfp8_training(model, mode, wgrad_with_hp)
    got, gradients = train(compiled(model), model)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@pytest.mark.full
@some(["torch.float32"], dtype=DTYPES)
def test_exact_training_changes_no_bit(dtype) -> None:
    model = convert_to_mxfp8_training(build_llama(dtype, layers=1))
    want, want_gradients = train(torch.compile(model, backend="aot_eager"), model)
    got, gradients = train(compiled(model, estimator="exact"), model)
    assert torch.equal(got, want)
    assert all(torch.equal(gradients[n], want_gradients[n]) for n in want_gradients)


@pytest.mark.full
def test_interpreter_gives_the_same_bits() -> None:
    model = build_llama(layers=1)
    want, want_gradients = train(compiled(model), model)
    got, gradients = train(compiled(model, inner="eager"), model)
    assert torch.equal(got, want)
    assert all(torch.equal(gradients[n], want_gradients[n]) for n in want_gradients)


@pytest.mark.full
@each_value(training={"inference": False, "training": True}, dtype=DTYPES)
def test_inductor_error_is_that_of_aot_eager(dtype, training) -> None:
    """Error against float64 at most 1.5 times that of the aot_eager result."""
    model = build_llama(dtype, layers=1)
    reference = reference_of(copy.deepcopy(model), Recipe()).double()
    errors = {}
    if training:
        _, truth = train(reference, reference)
        for inner in ("aot_eager", "inductor"):
            _, got = train(compiled(model, inner=inner), model)
            # All parameters as one vector: one fp8 step on a small one is not the model's error.
            errors[inner] = relative_error(flat(got), flat(truth))
    else:
        truth = infer(reference)
        for inner in ("aot_eager", "inductor"):
            errors[inner] = relative_error(infer(compiled(model, inner=inner)), truth)
    assert errors["inductor"] <= 1.5 * errors["aot_eager"], errors


def plain_inductor(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    """Inductor without any pass of ours; e8m0 support alone, or FLOOR and CEIL do not compile."""
    return compile_fx(gm, inputs, inner_compile=cpu_e8m0_support()(compile_fx_inner))


@pytest.mark.full
@some(["rceil"], mode=["rceil", "floor", "ceil"])
def test_exact_through_inductor_is_no_worse_than_plain_inductor(mode) -> None:
    """Against the same casts of high-precision weights, a model without e8m0 inputs."""
    model = build_llama(torch.bfloat16, layers=1)
    recipe = Recipe(norm={"estimator": "exact"}, cast={"scale_mode": mode}, every_linear=True)
    truth = infer(reference_of(model, replace(recipe, gain="activation")).double())
    plain = convert_to_mxfp8_training(copy.deepcopy(model), mode)
    plain_error = relative_error(infer(torch.compile(plain, backend=plain_inductor)), truth)
    quantize_with_torchao(model, mode)
    error = relative_error(infer(compiled(model, estimator="exact", inner="inductor")), truth)
    assert error <= plain_error


def test_norm_fed_linears() -> None:
    """The reference's list of linears that a norm feeds is the one that the backend finds."""
    report = mxnorm_pass.explain(build_llama(), IDS, use_cache=False)
    assert {c.rsplit(".", 1)[1] for s in report.fused for c in s.consumers} == set(NORM_FED)


@pytest.mark.full
@each_value(estimator=["mxnorm", "exact"], dims=[(0,), (1,), (0, 1)])
def test_dynamic_shapes_of_torchao_models(estimator, dims) -> None:
    """Symbolic sizes among a view's inputs hide no cast."""
    model = build_llama(torch.bfloat16, layers=1)
    recipe = Recipe(norm={"estimator": estimator}, gain="activation", every_linear=True)
    reference = reference_of(model, recipe)
    quantize_with_torchao(model)
    ids = token_ids()
    torch._dynamo.mark_dynamic(ids, dims)
    run = compiled(model, estimator=estimator)
    with torch.no_grad(), mxnorm_pass.record() as report:
        for tokens in (ids, token_ids(*(5 if d in dims else ids.shape[d] for d in (0, 1)))):
            assert torch.equal(run(tokens, use_cache=False).logits, reference(tokens).logits)
    assert len(report.graphs) == 1 and len(report.fused) == 2


@pytest.mark.full
def test_dynamic_shapes_of_torchao_training() -> None:
    model = convert_to_mxfp8_training(build_llama(layers=1))
    ids = token_ids()
    torch._dynamo.mark_dynamic(ids, 0)
    report = mxnorm_pass.explain(model, ids, labels=ids, use_cache=False)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(1)
