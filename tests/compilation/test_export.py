"""``mxnorm_pass.apply`` on exported programs: the bits of ``functional``, and valid programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exporting import (
    IDS,
    InRegions,
    apply,
    both_modes,
    export,
    export_llama,
    logits,
    run,
    saved_and_loaded,
)
from matching import (
    BF16,
    CONSUMERS,
    EPS,
    F32,
    SPELLINGS,
    WIDTH,
    Model,
    Spelling,
    assert_fused,
    assert_same_bits,
    assert_skipped,
    cast_reference,
    expected_warnings,
    huggingface,
    inputs,
    only_site,
    reference,
    spellings,
)
from pairwise import each_value
from reference import (
    Recipe,
    build_llama,
    expected_sites,
    quantize_with_torchao,
    reference_of,
    token_ids,
)
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import OutputKind
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    register_dynamic_cache_export_support,
)

import mxnorm_pass
from mxnorm_pass import MXNormConfig, SkipReason, functional

# float8_e4m3fn does since torch 2.13.
SATURATES = not torch.tensor(1000.0).to(torch.float8_e4m3fn).float().isnan()

pytestmark = [
    expected_warnings,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


# What the rewritten program computes


@pytest.mark.full
@each_value(spelling=SPELLINGS, dtype=[F32, BF16])
def test_spellings_fuse(spelling: Spelling, dtype: torch.dtype) -> None:
    model = spelling.model(dtype=dtype)
    x = inputs(dtype=dtype)
    got, report = run(model, x)
    assert_fused(report, gain="fold" if spelling.has_gain else None)
    assert_same_bits(got, spelling.reference(model, x))


@both_modes
@spellings("huggingface", "nn.RMSNorm")
def test_exact_changes_no_bit(spelling: Spelling, strict: bool) -> None:
    model = spelling.model(dtype=BF16)
    x = inputs(dtype=BF16)
    program, report = apply(export(model, x, strict=strict), estimator="exact")
    assert only_site(report).estimator == "exact"
    assert_same_bits(program.module()(x), cast_reference(model, x))


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "strict"), [(F32, False), (BF16, False), (BF16, True)])
def test_llama(dtype: torch.dtype, strict: bool) -> None:
    model = build_llama(dtype)
    program, report = apply(export_llama(model, strict))
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(2)
    (skipped,) = report.skipped
    assert (skipped.norm, skipped.reason) == ("model.norm", SkipReason.NO_MX_CAST)
    assert report.graphs[0].name == "inference_0"
    assert torch.equal(logits(program.module()), logits(reference_of(model, Recipe())))


@spellings("huggingface", "nn.RMSNorm")
def test_core_aten(spelling: Spelling) -> None:
    """A program that is decomposed already: addmm and mm on transposed weights."""
    model = spelling.model(dtype=BF16)
    x = inputs(dtype=BF16)
    program, report = apply(export(model, x).run_decompositions())
    assert_fused(report)
    assert_same_bits(program.module()(x), spelling.reference(model, x))


@pytest.mark.full
def test_dynamic_shapes() -> None:
    model = build_llama(layers=1)
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
    program, report = apply(export_llama(model, dynamic_shapes=shapes))
    assert len(report.fused) == 2
    rewritten, loaded = program.module(), saved_and_loaded(program).module()
    want = reference_of(model, Recipe())
    for batch, length in [(2, 16), (3, 20), (5, 7)]:
        ids = token_ids(batch, length)
        assert torch.equal(logits(rewritten, ids), logits(want, ids))
        assert torch.equal(logits(loaded, ids), logits(want, ids))


@pytest.mark.full
def test_torchao_inference() -> None:
    """FLOOR, which is not the mode of the casts that the pass inserts."""
    mode = "floor"
    model = build_llama(BF16, layers=1)
    recipe = Recipe(cast={"scale_mode": mode}, gain="activation", every_linear=True)
    want = logits(reference_of(model, recipe))
    given = export_llama(quantize_with_torchao(model, mode))
    program, report = apply(given)
    if not SATURATES:
        # torchao leaves the clamp out of what it exports, which then overflows to NaN.
        assert {s.reason for s in report.sites[:2]} == {SkipReason.CAST_NOT_RECOGNIZED}
        return
    assert {(s.gain, s.format) for s in report.fused} == {
        ("activation", f"mxfp8 e4m3fn {mode} block 32")
    }
    assert len(report.fused) == 2
    assert torch.equal(logits(program.module()), want)
    exact, _ = apply(given, estimator="exact")
    assert torch.equal(logits(exact.module()), logits(model))


def test_a_dynamic_cache_comes_out() -> None:
    register_dynamic_cache_export_support()
    model = build_llama(layers=1)
    options = {"use_cache": True}
    program, _ = apply(torch.export.export(model, (IDS,), options, strict=False))
    with torch.no_grad():
        want = reference_of(model, Recipe())(IDS, **options)
    got = program.module()(IDS, **options)
    assert torch.equal(got.logits, want.logits)
    (a,), (b,) = got.past_key_values.layers, want.past_key_values.layers
    assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.full
def test_a_static_cache_is_updated_in_place() -> None:
    def exportable(model: nn.Module) -> TorchExportableModuleForDecoderOnlyLM:
        settings = {"batch_size": 1, "max_cache_len": 8, "device": "cpu"}
        model.generation_config.update(
            use_cache=True, cache_implementation="static", cache_config=settings
        )
        return TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=8)

    def step(i: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[3 * i + 1]]), "cache_position": torch.tensor([i])}

    model = build_llama(layers=1)
    want = exportable(reference_of(model, Recipe())).model
    given = exportable(model).export(**step(0))
    program, report = apply(given)
    assert len(report.fused) == 2
    mutated = {
        s.target
        for s in program.graph_signature.output_specs
        if s.kind is OutputKind.BUFFER_MUTATION
    }
    assert {"key_cache_0", "value_cache_0"} <= mutated
    decode = program.module()
    for i in range(3):
        with torch.no_grad():
            assert torch.equal(decode(**step(i)), want(**step(i)))


# Linears


class Product(nn.Module):
    """norm -> one product with a parameter, or with an input of the model."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.norm = Model(huggingface).norm
        self.multiply = multiply
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.multiply(self.norm(x), self.weight if other is None else other)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "linear": (F.linear, True),
    "linear on a transposed weight": (lambda y, w: F.linear(y, w.t()), False),
    "matmul": (torch.matmul, False),
    "matmul with a transposed weight": (lambda y, w: y @ w.t(), True),
    "mm": (lambda y, w: (y.flatten(0, 1) @ w).unflatten(0, (2, 8)), False),
}


@each_value(name=list(PRODUCTS), quantize=["norm-fed", "all"])
def test_products_with_a_parameter(name: str, quantize: str) -> None:
    multiply, is_rows = PRODUCTS[name]
    # 64 channels out: a cast along the wrong dimension would go through.
    rows = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3))
    model = Product(multiply, rows if is_rows else rows.t().contiguous())
    x = inputs()
    got, report = run(model, x, quantize=quantize)
    assert only_site(report).gain == "fold"
    y, gain = model.norm(x), model.norm.weight
    quantized = functional.mxnorm_cast(x, eps=EPS)[:2]
    want = functional.mx_linear(y, rows, quantized=quantized, gain=gain)
    assert_same_bits([got], [want.detach()])


@both_modes
@pytest.mark.parametrize("name", ["matmul", "mm"])
def test_a_product_of_two_inputs_is_no_linear(name: str, strict: bool) -> None:
    model = Product(PRODUCTS[name][0], torch.zeros(1))
    args = (inputs(), torch.randn(WIDTH, 64))
    given = export(model, *args, strict=strict)
    program, report = apply(given)
    assert_skipped(report, SkipReason.NO_MX_CAST)
    assert program.graph_module.code == given.graph_module.code


def test_a_batch_of_weights_is_no_linear() -> None:
    model = Product(torch.matmul, torch.randn(2, WIDTH, 64))
    got, report = run(model, inputs())
    assert_skipped(report, SkipReason.NO_MX_CAST)
    assert_same_bits([got], [model(inputs()).detach()])


class CastWeight(nn.Module):
    """A quantised linear whose weight is cast in the graph, along its last dimension."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = Model(huggingface).norm
        self.multiply = multiply
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = (_rounded(t) for t in (self.norm(x), self.weight))
        return self.multiply(x, weight)


def _rounded(x: Tensor) -> Tensor:
    return functional.mx_dequantize(*functional.mx_cast(x), x.dtype)


@pytest.mark.full
@pytest.mark.parametrize("contracts_cast_dimension", [True, False])
@pytest.mark.parametrize("op", ["linear", "matmul"])
def test_only_a_weight_cast_along_the_channels_takes_the_gain(
    op: str, contracts_cast_dimension: bool
) -> None:
    """The weight is square, so that only the count of transpositions tells."""
    if op == "linear":
        multiply = F.linear if contracts_cast_dimension else lambda y, w: F.linear(y, w.t())
    else:
        multiply = (lambda y, w: y @ w.t()) if contracts_cast_dimension else torch.matmul
    model = CastWeight(multiply)
    got, report = run(model, inputs())
    site = only_site(report)
    assert (site.status, site.gain) == (
        "fused",
        "fold" if contracts_cast_dimension else "activation",
    )
    x, gain = inputs(), model.norm.weight
    if contracts_cast_dimension:
        values, scales, _ = functional.mxnorm_cast(x, eps=EPS)
        weight = _rounded(model.weight * gain)
    else:
        values, scales, _ = functional.mxnorm_cast(x, gain, eps=EPS)
        weight = _rounded(model.weight)
    want = multiply(functional.mx_dequantize(values, scales, F32), weight)
    assert_same_bits([got], [want.detach()])


def test_quantize_all_leaves_the_head_alone() -> None:
    model = build_llama(layers=1)
    program, _ = apply(export_llama(model), quantize="all")
    want = reference_of(model, Recipe(every_linear=True))
    assert torch.equal(logits(program.module()), logits(want))


# Names and toggles


@pytest.mark.parametrize("off", CONSUMERS)
def test_a_linear_that_is_off_reads_the_exact_norm(off: str) -> None:
    model = Model(huggingface)
    x = inputs()
    fused = tuple(name for name in CONSUMERS if name != off)
    got, report = run(model, x, modules={off: False})
    assert_fused(report, fused)
    want = reference(model, x, model.norm.weight, fused=fused)
    assert_same_bits(got, [y.detach() for y in want])


@both_modes
def test_names_inside_of_regions(strict: bool) -> None:
    model = InRegions()
    x = inputs()
    program, report = apply(export(model, x, strict=strict), modules={"inner.second": False})
    site = only_site(report)
    assert (site.norm, site.consumers) == ("inner.norm", ("inner.first",))
    _, second = program.module()(x)
    assert torch.equal(second, model(x)[1])


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Model(huggingface)
        self.back = nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.back(self.inner(x)[0]))


@both_modes
def test_a_module_that_is_called_twice(strict: bool) -> None:
    _, report = apply(export(CalledTwice(), inputs(), strict=strict))
    assert [(s.norm, s.consumers) for s in report.fused] == [
        ("inner.norm", ("inner.first",)),
        ("inner.norm", ("inner.first", "inner.second")),
    ]


# What the caller is told


@pytest.mark.full
def test_warnings_are_those_of_the_backend() -> None:
    given = export(Model(huggingface), inputs())
    with pytest.warns(mxnorm_pass.MXNormWarning, match="'norn'.*nearest names: norm"):
        mxnorm_pass.apply(given, {"modules": {"norn": False}})
    with pytest.warns(mxnorm_pass.MXNormWarning, match="NO_MX_CAST"):
        mxnorm_pass.apply(given, {"quantize": "existing"})
    with pytest.warns(mxnorm_pass.MXNormWarning, match="contains no RMSNorm"):
        mxnorm_pass.apply(export(nn.Linear(32, 32), torch.ones(2, 32)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mxnorm_pass.apply(given)
        mxnorm_pass.apply(given, {"estimator": "exact"})
    (warning,) = [w for w in caught if issubclass(w.category, mxnorm_pass.MXNormWarning)]
    assert warning.category is mxnorm_pass.CalibrationWarning


@pytest.mark.full
def test_config_forms_mean_the_same() -> None:
    given = export(Model(huggingface), inputs())
    codes = {
        str(mxnorm_pass.apply(given, config))
        for config in ({"p": 1}, MXNormConfig(p=1), {"p": 1.0, "inner": "inductor"})
    }
    assert len(codes) == 1
    assert str(mxnorm_pass.apply(given)) == str(mxnorm_pass.apply(given, {}))
    assert str(mxnorm_pass.apply(given)) not in codes


BAD_CONFIGS: dict[str, tuple[Any, type[Exception], str]] = {
    "value": ({"p": 0}, ValueError, "p=0 is not valid"),
    "unknown": ({"estimater": "exact"}, ValueError, "nearest valid one is 'estimator'"),
    "inner": ({"inner": "eager"}, ValueError, "config sets 'inner'.*compiles nothing"),
    "inner of a config": (MXNormConfig(inner="eager"), ValueError, "config sets 'inner'"),
    "freezing": ({"freezing": True}, ValueError, "config sets 'freezing'"),
    "prefix": ({"prefix": "model"}, ValueError, "config sets 'prefix'"),
    "freezing of a config": (MXNormConfig(freezing=True), ValueError, "config sets 'freezing'"),
    "inductor": ({"max-autotune": True}, ValueError, "config sets 'max_autotune'"),
    "list": ([("p", 1)], TypeError, "expected an MXNormConfig, a mapping"),
    "text": ("exact", TypeError, "config='exact'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name: str) -> None:
    config, error, message = BAD_CONFIGS[name]
    with pytest.raises(error, match=message):
        mxnorm_pass.apply(export(nn.Linear(32, 32), torch.ones(2, 32)), config)


def test_bad_programs() -> None:
    given = export(Model(huggingface), inputs())
    for wrong in (Model(huggingface), given.graph_module, given.module(), None):
        with pytest.raises(TypeError, match=f"not {type(wrong).__name__}: export the model"):
            mxnorm_pass.apply(wrong)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Model(huggingface)

    def forward(self, x: Tensor) -> Tensor:
        return sum(y.sum() for y in self.inner(x))


def test_a_program_with_a_backward() -> None:
    from torch.export.experimental import _export_forward_backward

    joint = _export_forward_backward(export(Loss(), inputs()))
    with pytest.raises(ValueError, match="holds a backward: export the forward alone"):
        mxnorm_pass.apply(joint)


def test_a_rewritten_program_refuses_to_be_differentiated() -> None:
    """Not even with respect to its inputs: gradients would miss the way through the casts."""
    model, x = Model(), inputs()
    module = mxnorm_pass.apply(torch.export.export(model, (x,))).module()
    with pytest.raises(RuntimeError, match="no derivative.*no_grad"):
        module(x.requires_grad_())
    with torch.no_grad():
        assert_same_bits(module(x), reference(model, x, model.norm.weight))
