"""Layers that are compiled one by one: their names, toggles, caches and limits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import Recipe, build_llama, reference_of, token_ids
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import mxnorm_pass
from mxnorm_pass import MXNormWarning, Site, functional
from mxnorm_pass.compilation import layers
from mxnorm_pass.names import clean_module_path

IDS = token_ids()
ISOLATED = layers._isolation()


class Block(nn.Module):
    """A residual block, cheap to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6)
        self.linear = nn.Linear(64, 64)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def reference_output(model: Stack, x: Tensor, recipes: dict[int, dict[str, Any]]) -> Tensor:
    """The stack in ``functional`` alone; ``recipes`` holds what is not the default."""
    for i, block in enumerate(model.blocks):
        norm, linear = block.norm, block.linear
        options: dict[str, Any] = {"eps": norm.eps, **recipes.get(i, {})}
        y = functional.mxnorm(x, norm.weight, **options)
        quantized = functional.mxnorm_cast(x, **options)[:2]
        out = functional.mx_linear(
            y, linear.weight, linear.bias, quantized=quantized, gain=norm.weight
        )
        x = x + out
    return x


def aot_eager(**options: Any) -> dict[str, Any]:
    return {"inner": "aot_eager", **options}


def inputs() -> Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


def block_sites(depth: int) -> list[tuple[str, tuple[str, ...]]]:
    return [(f"blocks.{i}.norm", (f"blocks.{i}.linear",)) for i in range(depth)]


@pytest.mark.full
@pytest.mark.skipif(not ISOLATED, reason="this torch counts the compiles of all layers together")
def test_every_layer_of_many_is_rewritten_with_its_own_rules() -> None:
    """More layers than Dynamo's recompile limit, three kinds of rules."""
    model, x = Stack(12), inputs()
    modules = {"blocks.3.*": {"p": 1}, "re:blocks\\.1[01]\\..*": {"p": 3}}
    names = mxnorm_pass.compile_layers(model, "blocks.*", options=aot_eager(modules=modules))
    assert names == tuple(f"blocks.{i}" for i in range(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MXNormWarning)
        warnings.simplefilter("ignore", mxnorm_pass.CalibrationWarning)
        with mxnorm_pass.record() as report:
            got = model(x)
    assert [(s.norm, s.consumers) for s in report.fused] == block_sites(12)
    assert len(report.sites) == len(report.graphs) == 12
    want = reference_output(model, x, {3: {"p": 1}, 10: {"p": 3}, 11: {"p": 3}})
    assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(got.square().sum(), model.blocks[0].norm.weight)
    (expected,) = torch.autograd.grad(want.square().sum(), model.blocks[0].norm.weight)
    # Sums in another order, as in tests/journeys/test_llama.py.
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def _apart(site: Site) -> Site:
    """The site without what depends on the graph around its layer."""
    return replace(site, residual=False, before=None, after=None)


@pytest.mark.full
def test_layers_of_an_unmodified_llama() -> None:
    model = build_llama(layers=3)
    reference = reference_of(model, Recipe())
    reference.model.layers[1] = model.model.layers[1]
    with torch.no_grad():
        want = reference(IDS, use_cache=False).logits
    modules = {"model.layers.1.*": False}
    mxnorm_pass.compile_layers(model, "model.layers.*", options=aot_eager(modules=modules))
    with mxnorm_pass.record() as report, torch.no_grad():
        got = model(IDS, use_cache=False).logits
    assert torch.equal(got, want)
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{i}.{norm}" for i in range(3) for norm in norms]
    assert [s.norm for s in report.sites] == names
    assert [s.norm for s in report.fused] == names[:2] + names[4:]
    whole = mxnorm_pass.explain(model, IDS, use_cache=False, options=aot_eager(modules=modules))
    # Of a layer on its own the residual add in front of it is in no graph.
    alone = [_apart(site) for site in report.sites]
    assert [_apart(site) for site in whole.sites if site.norm in names] == alone


def test_prefix_of_a_layer_that_replaces_the_original() -> None:
    """As FSDP recipes do it: ``layers[i] = torch.compile(layers[i])``."""
    model, x = Stack(3), inputs()
    for i, block in enumerate(model.blocks):
        options = aot_eager(prefix=f"blocks.{i}", modules={"blocks.1.*": False})
        model.blocks[i] = torch.compile(block, backend="mxnorm", options=options)
    with mxnorm_pass.record() as report:
        model(x)
    assert [s.norm for s in report.sites] == [name for name, _ in block_sites(3)]
    assert [s.status for s in report.sites] == ["fused", "skipped", "fused"]


def test_ops_of_the_layer_itself_have_the_name_of_the_prefix() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.linear = nn.Parameter(torch.ones(64)), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.gain)

    options = aot_eager(prefix="stack.7")
    report = mxnorm_pass.explain(Layer(), inputs(), options=options)
    assert [(s.norm, s.consumers) for s in report.fused] == [("stack.7", ("stack.7.linear",))]


def test_prefix_reaches_into_checkpointed_modules() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    options = aot_eager(prefix="stack.7", modules={"stack.7.block.linear": {"scale_mode": "floor"}})
    report = mxnorm_pass.explain(Layer(), inputs(), options=options)
    (site,) = report.sites
    assert (site.norm, site.consumers) == ("stack.7.block.norm", ("stack.7.block.linear",))
    assert site.format == "mxfp8 e4m3fn floor block 32"


@pytest.mark.full
@pytest.mark.parametrize("isolated", [False, True])
def test_reaching_dynamos_limit_is_no_silent_fallback(isolated) -> None:
    if isolated and not ISOLATED:
        pytest.skip("this torch cannot count the compiles of one function apart")
    model = Stack(5)
    for i, block in enumerate(model.blocks):
        arguments = ISOLATED if isolated else {}
        block.compile(backend="mxnorm", options=aot_eager(prefix=f"blocks.{i}"), **arguments)
    with (
        torch._dynamo.config.patch(recompile_limit=3),
        warnings.catch_warnings(record=True) as caught,
        mxnorm_pass.record() as report,
    ):
        warnings.simplefilter("always", MXNormWarning)
        model(inputs())
    messages = [str(w.message) for w in caught if "recompile_limit" in str(w.message)]
    if isolated:
        assert not messages
        assert len(report.fused) == 5
    else:
        assert len(messages) == 1 and "'blocks.2'" in messages[0]
        assert len(report.fused) == 3


def test_compile_layers_where_torch_cannot_isolate(monkeypatch) -> None:
    monkeypatch.setattr(layers, "_isolation", dict)
    model = Stack(3)
    mxnorm_pass.compile_layers(model, "blocks.*", options=aot_eager())
    with torch._dynamo.config.patch(recompile_limit=2):
        with pytest.warns(MXNormWarning, match="recompile_limit"):
            model(inputs())


def test_rules_of_names_without_prefix_are_said_to_match_nothing() -> None:
    model = Stack(1)
    options = aot_eager(modules={"blocks.0.*": False})
    model.blocks[0].compile(backend="mxnorm", options=options)
    with pytest.warns(MXNormWarning) as caught:
        model(inputs())
    (message,) = [str(w.message) for w in caught]
    for word in ("'blocks.0.*'", "norm", "'prefix'", "mxnorm_pass.compile_layers"):
        assert word in message


def test_a_misspelt_name_within_the_whole_model_gets_no_hint_of_a_prefix() -> None:
    options = aot_eager(modules={"blocks.0.nrm": False})
    with pytest.warns(MXNormWarning, match=r"blocks\.0\.norm") as caught:
        torch.compile(Stack(1), backend="mxnorm", options=options)(inputs())
    assert "prefix" not in str(caught[0].message)


def test_rules_that_fit_no_compiled_layer_warn_once_and_early() -> None:
    model = Stack(2)
    modules = {"blocks.*.nrm": False, "blocks.0.*": {"p": 1}}
    with pytest.warns(MXNormWarning) as caught:
        mxnorm_pass.compile_layers(model, "blocks.*", options=aot_eager(modules=modules))
    (message,) = [str(w.message) for w in caught]
    assert "'blocks.*.nrm'" in message and ".norm" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error", MXNormWarning)
        model(inputs())


def test_a_rule_for_the_layer_as_a_whole_warns_when_it_is_compiled() -> None:
    """ "blocks.0" names no norm and no linear: "blocks.0.*" is meant."""
    model = Stack(2)
    options = aot_eager(modules={"blocks.0": False})
    mxnorm_pass.compile_layers(model, "blocks.*", options=options)
    with pytest.warns(MXNormWarning, match="blocks.0.norm") as caught:
        model(inputs())
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("pattern", "compiled"),
    [
        ("blocks.*", ("blocks.0", "blocks.1")),
        ("*blocks*", ("blocks.0", "blocks.1")),
        ("*.linear", ("blocks.0.linear", "blocks.1.linear")),
        ("re:blocks\\.\\d", ("blocks.0", "blocks.1")),
        ("blocks.1", ("blocks.1",)),
    ],
)
def test_which_submodules_a_pattern_names(pattern, compiled) -> None:
    assert mxnorm_pass.compile_layers(Stack(2), pattern) == compiled


def test_a_model_inside_a_larger_one() -> None:
    model = Stack(2)
    options = aot_eager(prefix="tower", modules={"tower.blocks.0.*": False})
    assert mxnorm_pass.compile_layers(model, "tower.blocks.*", options=options) == (
        "tower.blocks.0",
        "tower.blocks.1",
    )
    with mxnorm_pass.record() as report:
        model(inputs())
    assert [s.norm for s in report.fused] == ["tower.blocks.1.norm"]


def test_nothing_to_compile_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'block\.\*'.*blocks\.0"):
        mxnorm_pass.compile_layers(Stack(1), "block.*")
    with pytest.raises(ValueError, match="estimater"):
        mxnorm_pass.compile_layers(Stack(1), "blocks.*", options={"estimater": "exact"})


@pytest.mark.parametrize(
    "prefix", ["layers.*", ".layers", "layers.", "a..b", "re:x", "a[0]", 3, None]
)
def test_a_prefix_is_one_full_name(prefix) -> None:
    with pytest.raises(ValueError) as error:
        mxnorm_pass.MXNormConfig(prefix=prefix)
    assert f"prefix={prefix!r}" in str(error.value)
    assert "'model.layers.3'" in str(error.value)


@pytest.mark.full
def test_layers_treated_alike_share_inductors_cache() -> None:
    """Through Inductor: the second layer's kernels are the first's, the third's are its own."""
    model, x = Stack(3), inputs()
    modules = {"blocks.2.*": {"p": 1}}
    want = reference_output(model, x, {2: {"p": 1}})
    mxnorm_pass.compile_layers(model, "blocks.*", options={"modules": modules}, mode="default")
    counters.clear()
    with mxnorm_pass.record() as report, torch.no_grad():
        got = model(x)
    assert [(s.norm, s.consumers) for s in report.fused] == block_sites(3)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert counters["aot_autograd"]["autograd_cache_miss"] == 2
    # Inductor sums in another order, and one e4m3 step is 2^-3 of an element; the median is
    # blind to the few elements that cross one.
    assert (got - want).abs().median() <= 1e-5


def test_options_that_treat_layers_alike_have_one_fingerprint() -> None:
    modules = {"layers.1.*": {"p": 1}, "layers.2.norm": False}

    def fingerprint(layer: int, **options: Any) -> str:
        prefix = f"layers.{layer}"
        config = mxnorm_pass.MXNormConfig(prefix=prefix, modules=modules, **options)
        return config.fingerprint_for((f"{prefix}.norm", f"{prefix}.linear"))

    assert fingerprint(0) == fingerprint(3)
    assert len({fingerprint(i) for i in range(3)} | {fingerprint(0, gradient="paper")}) == 4


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['self'].layers[0].norm", "layers.0.norm"),
        ("L['self']._modules['tower']._modules['0'].norm", "tower.0.norm"),
        (
            "L['self'].__dict__['_modules']['base'].__dict__['_modules']['model'].norm",
            "base.model.norm",
        ),
        ("getattr(L['self'].layers, '0').norm", "layers.0.norm"),
        ("L['self'].layers.0._orig_mod.norm", "layers.0.norm"),
        ("L['self']._orig_mod.norm", "norm"),
        ("L['self'].layers.0._checkpoint_wrapped_module.norm", "layers.0.norm"),
        ("L['self']._orig_model.norm", "_orig_model.norm"),
    ],
)
def test_dynamos_spellings_of_a_name(path, name) -> None:
    assert clean_module_path(path) == name


def test_a_compiled_layer_within_a_compiled_model_has_the_names_of_the_original() -> None:
    model = Stack(2)
    model.blocks[0] = torch.compile(model.blocks[0], backend="mxnorm", options=aot_eager())
    options = aot_eager(modules={"blocks.0.*": False})
    report = mxnorm_pass.explain(model, inputs(), options=options)
    assert [s.norm for s in report.sites] == ["blocks.0.norm", "blocks.1.norm"]
    assert [s.norm for s in report.fused] == ["blocks.1.norm"]
