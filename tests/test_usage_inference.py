"""What users do with a model at inference: shapes, generate, modes, state dicts, graph breaks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import U
from reference import (
    Recipe,
    build_llama,
    quantize_with_torchao,
    reference_of,
    token_ids,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from transformers import CompileConfig, LlamaForCausalLM

import mxnorm_pass
from mxnorm_pass import Report, SkipReason, functional

IDS = token_ids()
AOT: dict[str, Any] = {"inner": "aot_eager"}


def infer(model: Callable[..., Any], ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def assert_every_graph_fuses(report: Report, fused: int = 4, graphs: int | None = None) -> None:
    assert report.graphs
    for graph in report.graphs:
        assert sum(site.status == "fused" for site in graph.sites) == fused, str(report)
        assert len(graph.sites) == fused + 1
    if graphs is not None:
        assert len(report.graphs) == graphs


class Block(nn.Module):
    """A norm and the linear that it feeds."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.RMSNorm(64, eps=eps), nn.Linear(64, 32)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def block_reference(block: Block, x: Tensor) -> Tensor:
    """The gain folded into the weight."""
    eps = block.norm.eps
    y = functional.mxnorm(x, block.norm.weight, eps=eps)
    values, scales, _ = functional.mxnorm_cast(x, eps=eps)
    linear = block.linear
    quantized = (values, scales)
    return functional.mx_linear(
        y, linear.weight, linear.bias, gain=block.norm.weight, quantized=quantized
    )


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_as_good_as_eager(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Inductor's error against float64 is that of eager mode: which elements round to another
    fp8 value decides it. Where none does, sums of up to 128 terms in any order are off by 128 U.
    """
    assert relative_error(got, truth) <= max(1.5 * relative_error(eager, truth), 128 * U)


# Shapes


@pytest.mark.parametrize(
    ("how", "dim"), [("automatic", 0), ("automatic", 1), ("dynamic", 1), ("marked", 1)]
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_grad_modes_and_fullgraph(fullgraph: bool, mode: Callable[[], Any]) -> None:
    model = build_llama()
    want = infer(reference_of(model, Recipe()))
    compiled = torch.compile(model, backend="mxnorm", fullgraph=fullgraph, options=AOT)
    with mxnorm_pass.record() as report, mode():
        got = compiled(IDS, use_cache=False).logits
    assert torch.equal(got, want)
    assert got.is_inference() == (mode is torch.inference_mode)
    assert_every_graph_fuses(report, graphs=1)


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


def generate(model: LlamaForCausalLM, **kwargs: Any) -> Tensor:
    model.generation_config.eos_token_id = None
    return model.generate(max_new_tokens=4, do_sample=False, pad_token_id=0, **kwargs)


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


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
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


@pytest.mark.parametrize("through", ["option", "global"])
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
        # Inductor's meaning of freezing: what is written into a weight later is not read.
        block.linear.weight.mul_(2)
        assert torch.equal(compiled(x), first)
        # Another tensor in its place is.
        block.linear.weight = nn.Parameter(block.linear.weight.clone())
        assert_as_good_as_eager(compiled(x), *eager_and_truth(block, x))
    assert len(report.fused) == len(report.graphs) == 2


def eager_and_truth(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    return block_reference(block, x), block_reference(copy.deepcopy(block).double(), x.double())


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_state_dicts(in_place: bool) -> None:
    model, other = build_llama(layers=1), build_llama(layers=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    compiled: Any = model
    if in_place:
        model.compile(backend="mxnorm", options=AOT)
    else:
        compiled = torch.compile(model, backend="mxnorm", options=AOT)
    with mxnorm_pass.record() as report:
        before = infer(compiled)
        prefix = "" if in_place else "_orig_mod."
        state = compiled.state_dict()
        assert state.keys() == {prefix + name for name in other.state_dict()}
        compiled.load_state_dict({prefix + k: v for k, v in other.state_dict().items()})
        after = infer(compiled)
    want = infer(reference_of(other, Recipe()))
    assert torch.equal(after, want) and not torch.equal(before, after)
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


# Graph breaks


class BreakBeforeLinear(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        torch._dynamo.graph_break()
        return self.linear(y)


class BreakInsideNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        torch._dynamo.graph_break()
        return self.linear(x * rho * self.norm.weight)


class BreakBetweenSites(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + F.pad(super().forward(x), (0, 32))
        print("a graph break that users write")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
@pytest.mark.parametrize(
    ("kind", "inner", "statuses"),
    [
        (BreakBeforeLinear, "aot_eager", [["NO_MX_CAST"], []]),
        (BreakInsideNorm, "aot_eager", [[], []]),
        (BreakBetweenSites, "aot_eager", [["fused"], ["fused"]]),
        (BreakBetweenSites, "inductor", [["fused"], ["fused"]]),
    ],
)
def test_each_graph_says_what_it_saw(kind: type[Block], inner: str, statuses: Any) -> None:
    block, x = kind(), inputs(4, 64)
    with mxnorm_pass.record() as report, torch.no_grad():
        got = torch.compile(block, backend="mxnorm", options={"inner": inner})(x)
    seen = [[s.reason.name if s.reason else s.status for s in g.sites] for g in report.graphs]
    assert seen == statuses
    for graph in report.graphs:
        assert (graph.before == graph.after) == ("fused" not in {s.status for s in graph.sites})
    with torch.no_grad():
        want = two_sites(block, x) if kind is BreakBetweenSites else block(x)
        truth = two_sites(copy.deepcopy(block).double(), x.double())
    if inner == "aot_eager":
        assert torch.equal(got, want)
    else:
        assert_as_good_as_eager(got, want, truth)


def two_sites(block: Block, x: Tensor) -> Tensor:
    return block_reference(block, x + F.pad(block_reference(block, x), (0, 32)))


# Mutations


class Mutating(Block):
    """Writes into its input before the norm, and the norm's output into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(4, 64))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = self.norm(x)
        self.last.copy_(y.detach())
        return self.linear(y)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_mutated_inputs_and_buffers(train: bool) -> None:
    block = Mutating()
    with mxnorm_pass.record() as report, torch.set_grad_enabled(train):
        compiled = torch.compile(block, backend="mxnorm", options=AOT)
        for seed in range(2):
            x = inputs(4, 64, seed=seed)
            twice = 2 * x
            got = compiled(x)
            assert torch.equal(x, twice)
            assert torch.equal(got, block_reference(block, twice))
            # Not fused, so it holds the exact norm.
            torch.testing.assert_close(block.last, block.norm(twice), rtol=1e-6, atol=1e-6)
    assert len(report.fused) == len(report.graphs) == 1


def test_freezing_keeps_guards_on_shared_storage() -> None:
    """Two inputs of one storage are compiled for, and not taken for two that share none."""

    class TwoInputs(Block):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(y)

    block, base = TwoInputs(), inputs(8, 64)
    with torch.no_grad(), mxnorm_pass.record() as report:
        compiled = torch.compile(block, backend="mxnorm", options={"freezing": True})
        for first, second in (((0, 4), (4, 8)), ((0, 4), (0, 4)), ((2, 6), (4, 8))):
            rows, want = base.clone(), base.clone()
            got = compiled(rows[slice(*first)], rows[slice(*second)])
            want[slice(*first)] *= 2
            assert torch.equal(rows, want)
            assert_as_good_as_eager(got, *eager_and_truth(Block(), want[slice(*second)]))
    assert len(report.fused) == len(report.graphs)


# Tensor subclasses


class Tagged(torch.Tensor):
    """A traceable wrapper around one tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tagged:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return "Tagged"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors: Any, context: None, size: Any, stride: Any) -> Tagged:
        return cls(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        return torch.utils._pytree.tree_map_only(Tensor, cls, out)


@pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("where", ["parameter", "input"])
def test_a_foreign_tensor_subclass_is_left_alone(where: str, inner: str) -> None:
    block, x = Block().requires_grad_(False), inputs(4, 64)
    want, truth = block(x), copy.deepcopy(block).double()(x.double())
    if where == "parameter":
        block.linear.weight = nn.Parameter(Tagged(block.linear.weight.detach()), False)
    else:
        x = Tagged(x)
    with mxnorm_pass.record() as report, torch.no_grad():
        got = torch.compile(block, backend="mxnorm", options={"inner": inner})(x)
    (site,) = report.sites
    assert (site.norm, site.reason, site.detail) == ("norm", SkipReason.DTENSOR, "Tagged")
    assert report.graphs[0].before == report.graphs[0].after
    assert type(got) is Tagged
    if inner == "aot_eager":
        assert torch.equal(got.inner, want)
    else:
        assert_as_good_as_eager(got.inner, want, truth)


# torchao models


def test_generate_with_torchao_weights() -> None:
    model = build_llama(torch.bfloat16, layers=1)
    recipe = Recipe(gain="activation", every_linear=True)
    want = generate(reference_of(model, recipe), input_ids=IDS, cache_implementation="static")
    quantize_with_torchao(model)
    model.compile(backend="mxnorm", options=AOT)
    with mxnorm_pass.record() as report:
        got = generate(model, input_ids=IDS, cache_implementation="static")
    assert torch.equal(got, want)
    assert_every_graph_fuses(report, fused=2)


class Product(Block):
    """``x @ W.t()`` where the weight is no input of the graph, but an attribute of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.linear.weight.t()


def test_product_with_a_frozen_weight() -> None:
    block, x = Product(), inputs(2, 8, 64)
    with torch.no_grad(), mxnorm_pass.record() as report:
        got = torch.compile(block, backend="mxnorm", options={"freezing": True})(x)
    assert len(report.fused) == 1
    block.linear.bias = None
    assert_as_good_as_eager(got, *eager_and_truth(block, x))
