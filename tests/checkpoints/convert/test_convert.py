"""convert: the bits of the weights, the memory they take, what eager calls and compiles give."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from pairwise import some
from reference import Recipe, build_llama, expected_sites, reference_of, token_ids
from sm100 import believed_sm100
from torch import Tensor, nn
from torchao.prototype.mx_formats import constants
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.mx_formats.utils import from_blocked
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common import KernelPreference

import mxnorm_pass
from mxnorm_pass import Conversion, functional
from mxnorm_pass.checkpoints.convert import convert as convert_module
from mxnorm_pass.options.config import MXNormConfig

BF16 = torch.bfloat16
E5M2 = torch.float8_e5m2
# Options, and what torchao calls the elements.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "mxfp8": ({}, torch.float8_e4m3fn),
    "mxfp8 floor": ({"scale_mode": "floor"}, torch.float8_e4m3fn),
    "mxfp8 ceil": ({"scale_mode": "ceil"}, torch.float8_e4m3fn),
    "mxfp8 even": ({"scale_mode": "even"}, torch.float8_e4m3fn),
    "mxfp8 e5m2": ({"elem_dtype": E5M2}, E5M2),
    "mxfp6": ({"format": "mxfp6"}, constants.DTYPE_FP6_E2M3),
    "mxfp6 e3m2": ({"format": "mxfp6 e3m2"}, constants.DTYPE_FP6_E3M2),
    "mxfp4": ({"format": "mxfp4"}, torch.float4_e2m1fn_x2),
    "mxfp4 even": ({"format": "mxfp4", "scale_mode": "even"}, torch.float4_e2m1fn_x2),
}


def llama(**overrides: Any) -> nn.Module:
    return build_llama(BF16, **overrides).eval()


DOWN = "model.layers.0.mlp.down_proj"  # which a later rule turns on again


def is_layers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def layers_linears(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if is_layers(m, name)}


def bytes_of(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def in_rows(weight: Any) -> Tensor:
    """[N, D / block size]: the scales of a converted weight, out of their tiles of 128x4."""
    rows, width = weight.shape
    blocks = width // weight.block_size
    return from_blocked(bytes_of(weight.scale).flatten(), rows, blocks)


@torch.no_grad()
def compiled_logits(model: nn.Module, **options: Any) -> tuple[Tensor, mxnorm_pass.Report]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})
    with mxnorm_pass.record() as report:
        logits = compiled(token_ids()).logits
    return logits, report


@some(["mxfp8", "mxfp8 floor", "mxfp6", "mxfp4 even"], case=CASES)
def test_weights_are_those_of_torchao_and_of_functional(case: Any) -> None:
    options, elements = case
    model, original = llama(layers=1), llama(layers=1)
    mxnorm_pass.convert(model, options)
    config = MXDynamicActivationMXWeightConfig(
        activation_dtype=elements,
        weight_dtype=elements,
        kernel_preference=KernelPreference.EMULATED,
        scaling_mode=ScaleCalculationMode(options.get("scale_mode", "rceil")),
    )
    torchao = copy.deepcopy(original)
    quantize_(torchao, config, filter_fn=is_layers)
    cast_format = MXNormConfig(**options).cast_format
    for name, linear in layers_linears(original).items():
        got, want = model.get_submodule(name).weight, torchao.get_submodule(name).weight
        assert isinstance(got, MXTensor) and not got.requires_grad
        assert got.__tensor_flatten__() == want.__tensor_flatten__()
        values, scales = functional.mx_cast(linear.weight, cast_format)
        for qdata, scale in ((want.qdata, in_rows(want)), (values, bytes_of(scales))):
            assert torch.equal(bytes_of(got.qdata), bytes_of(qdata))
            assert torch.equal(in_rows(got), scale)


@torch.no_grad()
def test_eager_calls_are_those_of_torchao_and_functional() -> None:
    model, original = llama(), llama()
    mxnorm_pass.convert(model)
    got = model(token_ids()).logits
    exact = compiled_logits(model, quantize="all", estimator="exact")[0]
    plain = compiled_logits(original, quantize="all", estimator="exact", gain="activation")[0]
    assert torch.equal(got, exact)
    assert torch.equal(got, plain)


@some(["mxfp8", "mxfp4 even"], case=CASES)
@torch.no_grad()
def test_a_compile_gives_what_it_gives_without_conversion(case: Any) -> None:
    options = {**case[0], "quantize": "all"}
    model, original = llama(), llama()
    mxnorm_pass.convert(model, options)
    got, report = compiled_logits(model, **options)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(2)
    assert {s.gain for s in report.fused} == {"activation"}
    want, _ = compiled_logits(original, gain="activation", **options)
    assert torch.equal(got, want)
    recipe = Recipe(
        cast={"format": MXNormConfig(**options).cast_format}, gain="activation", every_linear=True
    )
    assert torch.equal(got, reference_of(original, recipe)(token_ids()).logits)


SIZES = {"mxfp8": 33 / 64, "mxfp6": 33 / 64, "mxfp4": 17 / 64}


@pytest.mark.parametrize("fmt", SIZES)
def test_weights_take_as_little_memory_as_their_casts(fmt: str) -> None:
    # In whole tiles of scales.
    model = llama(layers=1, hidden=128, intermediate_size=256)
    size = sum(m.weight.nbytes for m in layers_linears(model).values())
    rest = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - size
    conversion = mxnorm_pass.convert(model, {"format": fmt})
    assert conversion.bytes_before == rest + size
    assert conversion.bytes_after == rest + size * SIZES[fmt]
    stored = [t for t in model.state_dict().values() if isinstance(t, MXTensor)]
    assert len(stored) == len(conversion.converted) == 7
    assert sum(t.qdata.nbytes + t.scale.nbytes for t in stored) == size * SIZES[fmt]


def test_one_weight_after_the_other_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, dtype=BF16) for _ in range(4))).eval()
    alive = [weakref.ref(linear.weight) for linear in model]
    original, seen = convert_module.quantize_weight, []

    def counted(*args: Any) -> None:
        seen.append(sum(ref() is not None for ref in alive))
        original(*args)

    gc.disable()
    monkeypatch.setattr(convert_module, "quantize_weight", counted)
    try:
        mxnorm_pass.convert(model)
    finally:
        gc.enable()
    assert seen == [4, 3, 2, 1]


@torch.no_grad()
def test_modules_decide_as_in_a_compile() -> None:
    options: dict[str, Any] = {
        "quantize": "all",
        "modules": {
            "model.layers.0.*": False,
            "*.down_proj": {"format": "mxfp4"},
            "*lm_head": True,
        },
    }
    model, original = llama(), llama()
    conversion = mxnorm_pass.convert(model, options)
    first = {name for name in layers_linears(original) if ".layers.0." in name}
    assert conversion.left == dict.fromkeys(first - {DOWN}, "`modules` turns it off")
    assert "lm_head" in conversion.converted
    down = model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert down.elem_dtype == torch.float4_e2m1fn_x2
    got, report = compiled_logits(model, **options)
    want, _ = compiled_logits(original, gain="activation", **options)
    assert torch.equal(got, want)
    assert report.sites[-1].consumers == ("lm_head",)


@torch.no_grad()
def test_a_model_that_is_converted_in_part() -> None:
    """What a second call finds converted it leaves; one of torchao's, too."""
    model, original = llama(), llama()
    quantize_(
        model,
        MXDynamicActivationMXWeightConfig(kernel_preference=KernelPreference.EMULATED),
        filter_fn=lambda module, name: name.endswith("q_proj"),
    )
    first = mxnorm_pass.convert(model, {"modules": {"*.mlp.*": False}})
    second = mxnorm_pass.convert(model)
    assert {name.split(".")[-1] for name in first.converted} == {"k_proj", "v_proj", "o_proj"}
    assert all(".mlp." in name for name in second.converted)
    reasons = {reason for name, reason in second.left.items() if "self_attn" in name}
    assert reasons == {"its weight is converted already, a MXTensor"}
    assert first.bytes_after == second.bytes_before
    got, _ = compiled_logits(model, quantize="all")
    want, _ = compiled_logits(original, quantize="all", gain="activation")
    assert torch.equal(got, want)


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"freezing": True}], ids=["plain", "freezing"])
@torch.no_grad()
def test_through_inductor(options: dict[str, Any]) -> None:
    model = llama(layers=1)
    mxnorm_pass.convert(model)
    want, _ = compiled_logits(model)
    got, report = compiled_logits(model, inner="inductor", **options)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(1)
    # Inductor rounds elsewhere than eager ops, and a cast turns that into a step of an element.
    assert (got - want).norm() < 0.05 * want.norm()


@torch.no_grad()
def test_layers_compiled_one_by_one_an_exported_program_and_verify() -> None:
    model = llama()
    mxnorm_pass.convert(model)
    want, _ = compiled_logits(model, verify=True)
    exported = torch.export.export(model, (token_ids(),), {"use_cache": False}, strict=False)
    program = mxnorm_pass.apply(exported)
    assert torch.equal(program.module()(token_ids(), use_cache=False).logits, want)
    torch._dynamo.reset()
    mxnorm_pass.compile_layers(model, "model.layers.*", options={"inner": "aot_eager"})
    with mxnorm_pass.record() as report:
        assert torch.equal(model(token_ids()).logits, want)
    assert len(report.fused) == 4


def test_the_linears_of_a_recipe() -> None:
    """In the format of its forward, but for the layers that it leaves in high precision."""
    model = llama(layers=3)
    recipe = {"forward": "mxfp4", "high_precision_last": 1 / 3}
    conversion = mxnorm_pass.convert(model, {"recipe": recipe})
    assert {name.split(".")[2] for name in conversion.converted} == {"0", "1"}
    why = "it is in the last of the 3 layers of model.layers, which its recipe leaves in high"
    assert all(r.startswith(why) for n, r in conversion.left.items() if n != "lm_head")
    weight = model.get_submodule(conversion.converted[0]).weight
    assert weight.elem_dtype == torch.float4_e2m1fn_x2


@pytest.fixture
def on_sm100(monkeypatch: pytest.MonkeyPatch) -> Any:
    for module in ("convert", "formats"):
        path = f"mxnorm_pass.checkpoints.convert.{module}.multiplies_natively"
        monkeypatch.setattr(path, lambda device: True)
    with believed_sm100():
        yield


@torch.no_grad()
def test_nvfp4(on_sm100: None) -> None:
    model, original = llama(layers=1), llama(layers=1)
    mxnorm_pass.convert(model, {"format": "nvfp4"})
    for name, linear in layers_linears(original).items():
        got = model.get_submodule(name).weight
        assert isinstance(got, NVFP4Tensor) and not got.act_quant_kwargs.use_triton_kernel
        tensor_scale = functional.nvfp4_tensor_scale(linear.weight)
        values, scales = functional.mx_cast(linear.weight, "nvfp4", tensor_scale=tensor_scale)
        assert torch.equal(bytes_of(got.qdata), bytes_of(values))
        assert torch.equal(in_rows(got), bytes_of(scales))
        assert torch.equal(got.per_tensor_scale, tensor_scale)
    got, report = compiled_logits(model, format="nvfp4", quantize="all", estimator="exact")
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(1)
    assert torch.equal(got, model(token_ids()).logits)


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp8 e5m2", "mxfp4"])
def test_native_matmuls_where_torchao_has_them(fmt: str, on_sm100: None) -> None:
    model = llama(layers=1)
    name = mxnorm_pass.convert(model, CASES[fmt][0]).converted[0]
    preference = model.get_submodule(name).weight.kernel_preference
    expected = KernelPreference.EMULATED if "e5m2" in fmt else KernelPreference.AUTO
    assert preference == expected


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 8)])
def test_explain_of_few_tokens(shape: tuple[int, int]) -> None:
    model = llama()
    mxnorm_pass.convert(model, progress=False)
    with torch.no_grad():
        report = mxnorm_pass.explain(model, torch.zeros(shape, dtype=torch.long))
    assert len(report.fused) == 4 and report.graphs[0].ops_after["mxnorm_pass.mx_linear.default"]


def test_it_prints_equal_layers_in_one_line() -> None:
    model = llama(layers=4)
    text = str(mxnorm_pass.convert(model, {"modules": {"*.3.mlp.*_proj": False}})).splitlines()
    assert text == [
        "mxnorm: 25 of 29 linears converted, 0.3 MB -> 0.2 MB",
        "  converted  model.layers.{0..3}.self_attn.{q_proj, k_proj, v_proj, o_proj}",
        "  converted  model.layers.{0..2}.mlp.{gate_proj, up_proj, down_proj}",
        "  left       model.layers.3.mlp.{gate_proj, up_proj, down_proj}: `modules` turns it off",
        "  left       lm_head: it is a head, and `modules` does not name it",
    ]


def test_it_prints_what_is_not_folded() -> None:
    names = ("a.0.b.0.c", "a.1.b.1.c", "d", "2", "e.7.f")
    lines = str(Conversion(names, {"": "why"}, 0, 0)).splitlines()[1:]
    converted = ["a.0.b.0.c", "a.1.b.1.c", "{d, 2}", "e.7.f"]
    assert lines == [
        *(f"  converted  {name}" for name in converted),
        "  left       the model itself: why",
    ]
