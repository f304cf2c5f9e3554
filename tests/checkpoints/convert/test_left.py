"""What convert leaves as it is, and says so; settings that it refuses; a failure in the middle."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import build_llama, token_ids
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import mxnorm_pass
from mxnorm_pass import Calibration, ConversionError
from mxnorm_pass.checkpoints.convert import convert as convert_module
from mxnorm_pass.errors import MXNormWarning

BF16 = torch.bfloat16


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def linear(inputs: int = 64, outputs: int = 64, dtype: torch.dtype = BF16) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=dtype)


def model_of(one: nn.Module, **others: nn.Module) -> nn.Module:
    """Holds the linear "one" and, behind it, what is converted always."""
    return nn.ModuleDict({"one": one, **others, "plain": linear()}).eval()


def parametrized() -> nn.Module:
    return model_of(nn.utils.parametrizations.weight_norm(linear()))


def tied() -> nn.Module:
    model = model_of(linear(), embedding=nn.Embedding(64, 64, dtype=BF16))
    model["embedding"].weight = model["one"].weight
    return model


def tied_by_memory() -> nn.Module:
    model = model_of(linear())
    model["other"] = nn.Embedding(64, 64, dtype=BF16)
    model["other"].weight = nn.Parameter(model["one"].weight.data)
    return model


def with_adapter() -> nn.Module:
    config = LoraConfig(r=32, target_modules=["one"])
    return get_peft_model(model_of(linear()), config).base_model.model.eval()


def in_training() -> nn.Module:
    model = model_of(linear()).train()
    model["plain"].requires_grad_(False)
    return model


def int8() -> nn.Module:
    model = model_of(linear())
    quantize_(model["one"], Int8WeightOnlyConfig(version=2))
    return model


def transposed() -> nn.Module:
    model = model_of(linear())
    model["one"].weight = nn.Parameter(model["one"].weight.data.t())
    return model


def fakes() -> nn.Module:
    model = model_of(linear())
    with FakeTensorMode() as mode:
        model["one"].weight = nn.Parameter(mode.from_tensor(model["one"].weight))
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "columns": (lambda: model_of(linear(inputs=48)), "[64, 48] is not in whole blocks of 32"),
    "rows": (lambda: model_of(linear(outputs=8)), "[8, 64] is not in whole blocks of 32"),
    "empty": (lambda: model_of(linear(outputs=0)), "[0, 64] is not in whole blocks of 32"),
    "float32": (lambda: model_of(linear(dtype=torch.float32)), "in torch.float32, and torchao"),
    "float64": (lambda: model_of(linear(dtype=torch.float64)), "in torch.float64, and torchao"),
    "float16": (lambda: model_of(linear(dtype=torch.float16)), "in torch.float16, and torchao"),
    "meta": (lambda: model_of(linear().to("meta")), "on the meta device: load it first"),
    "fake": (fakes, "its weight is a FakeTensor"),
    "int8": (int8, "its weight is a Int8Tensor"),
    "parametrized": (parametrized, "computed from other tensors: remove the parametrization"),
    "own forward": (
        lambda: model_of(Doubled(64, 64, dtype=BF16)),
        "it is a Doubled with a forward",
    ),
    "tied": (tied, "its weight is embedding.weight, too"),
    "tied by memory": (tied_by_memory, "its weight is other.weight, too"),
    "training": (in_training, "it is in training: call model.eval()"),
    "transposed": (transposed, "its weight is not contiguous"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_has_a_reason(case: str) -> None:
    make, reason = LEFT[case]
    model = make()
    weight = model["one"].weight
    conversion = mxnorm_pass.convert(model)
    assert conversion.converted == ("plain",)
    assert list(conversion.left) == ["one"] and reason in conversion.left["one"]
    assert case == "parametrized" or model["one"].weight is weight
    assert isinstance(model["plain"].weight, MXTensor)


def test_adapters() -> None:
    conversion = mxnorm_pass.convert(with_adapter())
    assert conversion.converted == ("plain",)
    assert len(conversion.left) == 3
    assert set(conversion.left.values()) == {"it is part of an adapter: merge it first"}


def test_linears_that_share_a_weight() -> None:
    model = model_of(linear(), two=linear())
    model["two"].weight = model["one"].weight
    left = mxnorm_pass.convert(model).left
    assert left == {
        "one": "its weight is two.weight, too",
        "two": "its weight is one.weight, too",
    }


def test_a_head_that_is_tied_to_the_embedding_stays_although_it_is_named() -> None:
    model = build_llama(BF16, layers=1, tie_word_embeddings=True).eval()
    conversion = mxnorm_pass.convert(model, {"modules": {"lm_head": True}})
    assert conversion.left == {"lm_head": "its weight is model.embed_tokens.weight, too"}


def test_attention_that_reads_its_output_weight_itself() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2, dtype=BF16)}).eval()
    left = mxnorm_pass.convert(model).left
    assert left == {"attention.out_proj": "nn.MultiheadAttention reads its weight"}


@pytest.mark.parametrize("name", ["gate", "router.layer", "moe_router", "wg"])
def test_what_has_the_name_of_a_router_must_be_named(name: str) -> None:
    parent, _, child = name.rpartition(".")
    holder = nn.ModuleDict({child: linear()})
    model = nn.ModuleDict({"mlp": nn.ModuleDict({parent: holder}) if parent else holder}).eval()
    full, twin = f"mlp.{name}", copy.deepcopy(model)
    reason = "it is by its name a router, and `modules` does not name it"
    assert mxnorm_pass.convert(model, {"modules": {"*": True}}).left == {full: reason}
    assert mxnorm_pass.convert(twin, {"modules": {f"*{child}": True}}).converted == (full,)


def test_a_gate_of_many_outputs_is_no_router() -> None:
    model = nn.ModuleDict({"gate": linear(outputs=2048), "gate_proj": linear()}).eval()
    assert mxnorm_pass.convert(model).converted == ("gate", "gate_proj")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "norm-fed": ({"quantize": "norm-fed"}, "convert sees weights, no graph: give quantize='all'"),
    "existing": ({"quantize": "existing"}, "convert sees weights, no graph: give quantize='all'"),
    "fold": ({"gain": "fold"}, "a converted weight is cast already: give gain='activation'"),
    "prefix": ({"prefix": "model.layers.3"}, "convert the whole model"),
    "nvfp4": ({"format": "nvfp4"}, "'one' is to be converted to NVFP4 on 'cpu'"),
    "nvfp4 of one": ({"modules": {"plain": {"format": "nvfp4"}}}, "give format='mxfp4'"),
    "e5m2": (
        {"elem_dtype": torch.float8_e5m2, "scale_mode": "floor"},
        "Give scale_mode='rceil', or elem_dtype=torch.float8_e4m3fn",
    ),
    "value": ({"format": "mxfp7"}, "format='mxfp7' is not valid"),
    "key": ({"formats": "mxfp8"}, "the nearest valid one is 'format'"),
    "calibration": (
        {"calibration": Calibration({"norm": torch.ones(2)}, channels={"gain": torch.rand(64)})},
        "the calibration belongs to other weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_it_cannot_honour(case: str) -> None:
    options, message = REFUSED[case]
    torch.manual_seed(0)
    model = model_of(linear())
    model.gain = nn.Parameter(torch.rand(64))
    with pytest.raises(ValueError) as raised:
        mxnorm_pass.convert(model, options)
    assert message in str(raised.value)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_what_is_no_model() -> None:
    with pytest.raises(ValueError, match="model is a function; it must be an nn.Module"):
        mxnorm_pass.convert(lambda x: x)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["*.o_porj", "model.layers.0", "model.layers.0.*.qproj"])
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    model, text = build_llama(BF16, layers=1).eval(), "matches no norm and no linear of the model"
    with pytest.warns(MXNormWarning, match=f"{re.escape(repr(pattern))} in `modules` {text}"):
        mxnorm_pass.convert(model, {"modules": {pattern: False}})


@torch.no_grad()
def test_a_failure_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it are converted, the model runs, and a second call does the rest."""
    model = build_llama(BF16, layers=1).eval()
    twin = copy.deepcopy(model)
    original, calls = convert_module.quantize_weight, iter(range(99))

    def fails(*args: Any) -> None:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        original(*args)

    names = list(mxnorm_pass.convert(twin).converted)
    with monkeypatch.context() as patch, pytest.raises(ConversionError) as raised:
        patch.setattr(convert_module, "quantize_weight", fails)
        mxnorm_pass.convert(model)
    for part in (f"{names[2]!r} cannot be converted: CUDA out of memory.", ", ".join(names[:2])):
        assert part in str(raised.value)
    assert "2 of 7 linears are converted" in str(raised.value)
    types = [type(model.get_submodule(name).weight) for name in names]
    assert types == [MXTensor] * 2 + [nn.Parameter] * 5
    assert model(token_ids()).logits.isfinite().all()
    assert mxnorm_pass.convert(model).converted == tuple(names[2:])
    assert torch.equal(model(token_ids()).logits, twin(token_ids()).logits)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_compiled_model_and_a_single_linear(is_compiled: bool) -> None:
    single = linear().eval()
    given = torch.compile(single, backend="eager") if is_compiled else single
    assert mxnorm_pass.convert(given, progress=False).converted == ("",)
    assert isinstance(single.weight, MXTensor)
