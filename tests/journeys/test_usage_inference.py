"""What users do with a model at inference: shapes, generate, modes, state dicts, graph breaks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from pairwise import each_value, some
from reference import Recipe, build_llama, reference_of, token_ids
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from transformers import CompileConfig, LlamaForCausalLM
from usage import (
    AOT,
    IDS,
    Block,
    assert_as_good_as_eager,
    assert_every_graph_fuses,
    block_reference,
    eager_and_truth,
    generate,
    infer,
    inputs,
    relative_error,
)

import mxnorm_pass

# Shapes


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "dim"),
    [
        ("automatic", 1),
        pytest.param("automatic", 0, marks=pytest.mark.full),
        pytest.param("dynamic", 1, marks=pytest.mark.full),
        pytest.param("marked", 1, marks=pytest.mark.full),
    ],
)
def test_twenty_sizes_take_no_more_compiles_than_two(how: str, dim: int) -> None:
    model = build_llama(layers=1)
    reference = reference_of(model, Recipe())
    dynamic = True if how == "dynamic" else None
    compiled = torch.compile(model, backend="mxnorm", dynamic=dynamic, options=AOT)
    counters.clear()
    with mxnorm_pass.record() as report:
        # Not 2 at first: of equal sizes Dynamo makes one symbol.
        for size in range(3, 23):
            ids = token_ids(*((size, 4) if dim == 0 else (2, size)))
            if how == "marked":
                torch._dynamo.mark_dynamic(ids, dim)
            assert torch.equal(infer(compiled, ids), infer(reference, ids)), size
    # The first size is compiled as it is, the second for all that follow.
    assert_every_graph_fuses(report, fused=2, graphs=2 if how == "automatic" else 1)
    assert counters["stats"]["unique_graphs"] == len(report.graphs)


@pytest.mark.full
def test_inductor_compiles_once_for_all_lengths() -> None:
    block = Block()
    compiled = torch.compile(block, backend="mxnorm", dynamic=True)
    double = copy.deepcopy(block).double()
    with mxnorm_pass.record() as report, torch.no_grad():
        for length in (3, 7, 16, 33):
            x = inputs(2, length, 64)
            eager, truth = block_reference(block, x), block_reference(double, x.double())
            assert_as_good_as_eager(compiled(x), eager, truth)
    assert (len(report.graphs), len(report.fused)) == (1, 1)


def test_another_eps_is_compiled_as_a_number_again() -> None:
    """Dynamo makes a float that changed between two compiles of one function a graph input."""
    blocks = [Block(eps) for eps in (1e-6, 1e-2, 3e-1)]
    x = inputs(4, 64)
    with mxnorm_pass.record() as report, torch.no_grad():
        for block in blocks:
            block.compile(backend="mxnorm", options=AOT)
            assert torch.equal(block(x), block_reference(block, x))
    assert len(report.fused) == len(report.graphs) == 3


# Modes of torch


@pytest.mark.full
@each_value(fullgraph=[False, True], mode=[torch.no_grad, torch.inference_mode])
def test_grad_modes_and_fullgraph(fullgraph: bool, mode: Callable[[], Any]) -> None:
    model = build_llama()
    want = infer(reference_of(model, Recipe()))
    compiled = torch.compile(model, backend="mxnorm", fullgraph=fullgraph, options=AOT)
    with mxnorm_pass.record() as report, mode():
        got = compiled(IDS, use_cache=False).logits
    assert torch.equal(got, want)
    assert got.is_inference() == (mode is torch.inference_mode)
    assert_every_graph_fuses(report, graphs=1)


@pytest.mark.full
def test_inference_mode_after_training_and_back() -> None:
    """Each mode has a graph of its own, and none runs in the place of another."""
    model = build_llama(layers=1)
    want = infer(reference_of(model, Recipe()))
    compiled = torch.compile(model, backend="mxnorm", options=AOT)
    modes = [torch.enable_grad, torch.inference_mode, torch.no_grad, torch.enable_grad]
    with mxnorm_pass.record() as report:
        for mode in modes:
            with mode():
                logits = compiled(IDS, use_cache=False).logits
            assert torch.equal(logits, want)
            assert logits.requires_grad == (mode is torch.enable_grad)
    assert_every_graph_fuses(report, fused=2, graphs=3)


# generate() and masks


def left_padded() -> dict[str, Tensor]:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :5], mask[0, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_padding_mask() -> None:
    model = build_llama()
    batch = left_padded()
    want = infer(
        reference_of(model, Recipe()), batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    with mxnorm_pass.record() as report:
        compiled = torch.compile(model, backend="mxnorm", options=AOT)
        got = infer(compiled, batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(got, want)
    assert not torch.equal(got, infer(compiled, batch["input_ids"]))
    assert_every_graph_fuses(report)


@pytest.mark.full
@pytest.mark.parametrize(
    ("cache", "padded"), [("dynamic", False), ("static", False), ("static", True)]
)
def test_generate(cache: str, padded: bool) -> None:
    model = build_llama(layers=1)
    batch = left_padded() if padded else {"input_ids": IDS}
    reference = reference_of(model, Recipe())
    want = generate(reference, **batch, cache_implementation=cache)
    model.compile(backend="mxnorm", options=AOT)
    with mxnorm_pass.record() as report:
        got = generate(model, **batch, cache_implementation=cache)
    assert torch.equal(got, want)
    assert_every_graph_fuses(report, fused=2)
    assert len(report.graphs) >= 2  # the prompt, and one token


def test_generate_that_compiles_by_itself() -> None:
    """With a static cache it compiles as ``compile_config`` asks, all steps but the prompt's."""
    model = build_llama(layers=1)
    want = generate(plain_for_the_prompt(model), input_ids=IDS, cache_implementation="static")
    config = CompileConfig(backend="mxnorm", mode=None, options=AOT, fullgraph=True)
    config._compile_all_devices = True
    with mxnorm_pass.record() as report:
        got = generate(model, input_ids=IDS, cache_implementation="static", compile_config=config)
    assert torch.equal(got, want)
    assert_every_graph_fuses(report, fused=2)


def plain_for_the_prompt(model: LlamaForCausalLM) -> LlamaForCausalLM:
    mixed, reference = copy.deepcopy(model), reference_of(model, Recipe())
    plain = mixed.forward

    @functools.wraps(plain)
    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        return (reference if input_ids.shape[1] == 1 else plain)(input_ids=input_ids, **kwargs)

    mixed.forward = forward
    return mixed


@pytest.mark.full
def test_generate_through_inductor_with_frozen_weights() -> None:
    """The static cache, of which each step changes a part in place, must not freeze with them."""
    model = build_llama(layers=1)
    reference = reference_of(model, Recipe())
    truth = generate_logits(copy.deepcopy(reference).double())
    eager = generate_logits(reference)
    model.compile(backend="mxnorm", options={"freezing": True})
    with mxnorm_pass.record() as report:
        got = generate_logits(model)
    assert_as_good_as_eager(got, eager, truth)
    assert_every_graph_fuses(report, fused=2)


def generate_logits(model: LlamaForCausalLM) -> Tensor:
    options = {"return_dict_in_generate": True, "output_logits": True}
    output = generate(model, input_ids=IDS, cache_implementation="static", **options)
    return torch.stack(output.logits)


# Ways to compile


@contextmanager
def default_backend(name: str) -> Iterator[None]:
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend(name)
    try:
        yield
    finally:
        torch.compiler.set_default_backend(before)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_default_backend"), reason="this torch has no default backend"
)
def test_default_backend() -> None:
    model = build_llama()
    want = infer(reference_of(model, Recipe()))
    with default_backend("mxnorm"), mxnorm_pass.record() as report:
        assert torch.equal(infer(torch.compile(model, options=AOT)), want)
    assert_every_graph_fuses(report, graphs=1)
    assert torch.compiler.get_default_backend() == "inductor"


@pytest.mark.full
@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_default_backend"), reason="this torch has no default backend"
)
def test_masked_batch_through_inductor_as_the_default_backend() -> None:
    """In inference mode and as one graph."""
    model, batch = build_llama(layers=1), left_padded()
    reference = reference_of(model, Recipe())
    mask = batch["attention_mask"]
    eager = infer(reference, batch["input_ids"], attention_mask=mask)
    truth = infer(reference.double(), batch["input_ids"], attention_mask=mask)
    with default_backend("mxnorm"), torch.inference_mode(), mxnorm_pass.record() as report:
        compiled = torch.compile(model, fullgraph=True)
        got = compiled(**batch, use_cache=False).logits
    assert_as_good_as_eager(got, eager, truth)
    assert_every_graph_fuses(report, fused=2, graphs=1)


def test_explain_of_a_model_compiled_in_place() -> None:
    """It traces with its own options and not with those of the model."""
    block, x = Block(), inputs(4, 64)
    want = mxnorm_pass.explain(block, x, options=AOT)
    block.compile(backend="mxnorm", options={**AOT, "modules": {"*": False}})
    for _ in range(2):
        with mxnorm_pass.record() as recorded:
            got = mxnorm_pass.explain(block, x, options=AOT)
        assert got.sites == want.sites and len(got.fused) == 1
        assert not recorded.graphs
        block(x)


def test_mode_and_options_together_are_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(Block(), backend="mxnorm", mode="reduce-overhead", options={"p": 1})


@pytest.mark.full
@some(["reduce-overhead"], mode=["reduce-overhead", "max-autotune"])
def test_modes_reach_inductor(mode: str) -> None:
    seen: list[dict[str, Any]] = []

    def probe(graph: torch.fx.Graph) -> None:
        seen.append(inductor_config.get_config_copy())

    block, x = Block(), inputs(4, 64)
    with inductor_config.patch(joint_custom_pre_pass=probe), torch.no_grad():
        with mxnorm_pass.record() as report:
            got = torch.compile(block, backend="mxnorm", mode=mode)(x)
    (config,) = seen
    expected = list_mode_options(mode)
    assert expected and {key: config[key] for key in expected} == expected
    assert len(report.fused) == 1
    truth = block_reference(copy.deepcopy(block).double(), x.double())
    assert_as_good_as_eager(got, block_reference(block, x), truth)


def test_a_global_setting_that_turns_off_our_stage_is_refused() -> None:
    with inductor_config.patch(use_joint_graph_passes=False):
        with pytest.raises(ValueError, match="use_joint_graph_passes"):
            torch.compile(Block(), backend="mxnorm")(inputs(4, 64))
        torch.compile(Block(), backend="mxnorm", options=AOT)(inputs(4, 64))


# Weights


@pytest.mark.full
@some(["option"], through=["option", "global"])
def test_freezing_casts_weights_once_and_sees_new_ones(through: str) -> None:
    block, x = Block(), inputs(4, 64)
    options = {"freezing": True} if through == "option" else None
    frozen_globally: AbstractContextManager[Any] = inductor_config.patch(
        freezing=through == "global"
    )
    with frozen_globally, torch.no_grad(), mxnorm_pass.record() as report:
        compiled = torch.compile(block, backend="mxnorm", options=options)
        first = compiled(x)
        assert_as_good_as_eager(first, *eager_and_truth(block, x))
        # What is written into a weight that is cast is cast anew.
        block.linear.weight.mul_(2)
        assert_as_good_as_eager(compiled(x), *eager_and_truth(block, x))
        # Another tensor in its place is seen, too.
        block.linear.weight = nn.Parameter(block.linear.weight.clone())
        assert_as_good_as_eager(compiled(x), *eager_and_truth(block, x))
    assert len(report.fused) == len(report.graphs) == 2


@pytest.mark.parametrize(
    ("in_place", "inner"),
    [
        pytest.param(False, "aot_eager", id="torch.compile"),
        pytest.param(True, "aot_eager", id="model.compile"),
        pytest.param(True, "inductor", id="inductor", marks=pytest.mark.full),
    ],
)
def test_state_dicts(in_place: bool, inner: str) -> None:
    options = {"inner": inner}
    model, other = build_llama(layers=1), build_llama(layers=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    compiled: Any = model
    if in_place:
        model.compile(backend="mxnorm", options=options)
    else:
        compiled = torch.compile(model, backend="mxnorm", options=options)
    with mxnorm_pass.record() as report:
        before = infer(compiled)
        prefix = "" if in_place else "_orig_mod."
        state = compiled.state_dict()
        assert state.keys() == {prefix + name for name in other.state_dict()}
        compiled.load_state_dict({prefix + k: v for k, v in other.state_dict().items()})
        after = infer(compiled)
    reference = reference_of(other, Recipe())
    want = infer(reference)
    assert not torch.equal(before, after)
    if inner == "aot_eager":
        assert torch.equal(after, want)
    else:
        assert_as_good_as_eager(after, want, infer(reference.double()))
    assert_every_graph_fuses(report, fused=2, graphs=1)
    fresh = build_llama(layers=1)
    fresh.load_state_dict({k.removeprefix(prefix): v for k, v in compiled.state_dict().items()})
    assert torch.equal(infer(fresh), infer(other))


@pytest.mark.parametrize("options", [AOT, {}], ids=["aot_eager", "inductor"])
def test_weights_changed_after_the_compile_are_used(options: dict[str, Any]) -> None:
    block, x = Block(), inputs(4, 64)
    compiled = torch.compile(block, backend="mxnorm", options=options)
    with torch.no_grad(), mxnorm_pass.record() as report:
        compiled(x)
        block.linear.weight.mul_(-2)
        block.norm.weight.copy_(torch.linspace(0.5, 2, 64))
        got = compiled(x)
        block.norm.weight = nn.Parameter(torch.linspace(2, 0.5, 64))
        again = compiled(x)
    want, truth = eager_and_truth(block, x)
    assert_as_good_as_eager(again, want, truth)
    assert relative_error(got, truth) > 0.1
    assert len(report.fused) == len(report.graphs)
