"""Compile caches, several configs and several threads in one process, passes of the user."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pairwise import each_value, some
from reference import Recipe, build_llama, quantize_with_torchao, reference_of, token_ids
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.codegen import cpp_utils
from torch._inductor.custom_graph_pass import CustomGraphPass

import mxnorm_pass
from mxnorm_pass import Report
from mxnorm_pass.report import recording

IDS = token_ids()
AOT: dict[str, Any] = {"inner": "aot_eager"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 32)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def inputs() -> Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


def compile_and_run(
    model: nn.Module, train: bool = False, **options: Any
) -> tuple[list[Tensor], Report]:
    """Output and gradients of a fresh compile; ``counters`` count this compile alone."""
    torch._dynamo.reset()
    counters.clear()
    model.zero_grad()
    x = inputs().requires_grad_(train)
    with mxnorm_pass.record() as report, torch.set_grad_enabled(train):
        y = torch.compile(model, backend="mxnorm", options=options)(x)
        if train:
            y.square().sum().backward()
    gradients = [t.grad for t in (x, *model.parameters()) if t.grad is not None]
    return [y.detach(), *gradients], report


def autograd_cache_hits() -> int:
    return counters["aot_autograd"]["autograd_cache_hit"]


def assert_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Cold and warm


@pytest.mark.full
@each_value(
    autograd_cache={"FX graph": False, "AOTAutograd": True},
    train={"inference": False, "training": True},
)
def test_a_second_compile_hits_the_cache(autograd_cache: bool, train: bool) -> None:
    with functorch_config.patch(enable_autograd_cache=autograd_cache):
        cold, cold_report = compile_and_run(Block(), train)
        assert autograd_cache_hits() == counters["inductor"]["fxgraph_cache_hit"] == 0
        warm, warm_report = compile_and_run(Block(), train)
    assert autograd_cache_hits() == autograd_cache
    assert counters["inductor"]["fxgraph_cache_hit"] >= 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert_equal(warm, cold)
    assert len(warm) == (5 if train else 1)
    assert warm_report == cold_report and len(warm_report.fused) == 1
    eager, _ = compile_and_run(Block(), train, **AOT)
    for got, want in zip(warm, eager, strict=True):
        # fp32 sums of up to 64 terms in another order, and nothing that crosses an fp8 step.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_a_warm_compile_with_dynamic_shapes() -> None:
    """The first compile starts over, for eps is a graph input at first."""
    reports, outputs = [], []
    for hits in (0, 1):
        torch._dynamo.reset()
        counters.clear()
        with mxnorm_pass.record() as report, torch.no_grad():
            compiled = torch.compile(Block(), backend="mxnorm", dynamic=True)
            outputs.append([compiled(inputs()[:rows].clone()) for rows in (4, 3)])
        assert autograd_cache_hits() == hits
        reports.append(report)
    assert_equal(*outputs)
    assert reports[0] == reports[1]
    assert len(reports[0].graphs) == len(reports[0].fused) == 1


@pytest.mark.full
def test_cache_artifacts_of_another_machine(tmp_path, monkeypatch) -> None:
    """They bring compiled code and no report, which is then traced anew."""
    cold, cold_report = compile_and_run(Block())
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "elsewhere"))
    torch.compiler.load_cache_artifacts(saved[0])
    assert not (tmp_path / "elsewhere" / "mxnorm_pass").exists()
    warm, warm_report = compile_and_run(Block())
    assert autograd_cache_hits() == 1
    assert_equal(warm, cold)
    assert warm_report == cold_report and len(warm_report.fused) == 1


# Several configs in one process


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
@some(["inference"], train={"inference": False, "training": True})
def test_configs_do_not_share_cache_entries(train: bool) -> None:
    """Each compiled cold, then each with all others in the cache."""
    configs: list[dict[str, Any]] = [
        {},
        {"p": 1},
        {"modules": {"norm": {"estimator": "exact"}}},
        {"modules": {"norm": {"estimator": "exact"}, "*": True}},
        {"modules": {"*": True, "norm": {"estimator": "exact"}}},
        {"modules": {"linear": False}},
    ]
    cold = [compile_and_run(Block(), train, **options) for options in configs]
    for options, (want, want_report) in zip(configs, cold, strict=True):
        got, report = compile_and_run(Block(), train, **options)
        assert autograd_cache_hits() == 1
        assert_equal(got, want)
        assert report == want_report
    # The third and the fifth mean the same, the first and the fourth too.
    groups = [[0, 3], [1], [2, 4], [5]]
    for group in groups:
        for i in range(len(configs)):
            same = torch.equal(cold[group[0]][0][0], cold[i][0][0])
            assert same == (i in group), (group, i)
    for options, (want, _) in zip(configs, cold, strict=True):
        eager, _ = compile_and_run(Block(), train, **AOT, **options)
        torch.testing.assert_close(want[0], eager[0], rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_gradient_modes_do_not_share_cache_entries() -> None:
    """They differ in the gradient of the norm's input alone."""
    true, paper = (compile_and_run(Block(), True, gradient=g)[0] for g in ("true", "paper"))
    assert autograd_cache_hits() == 0
    assert not torch.equal(true[1], paper[1])
    assert_equal([true[0], *true[2:]], [paper[0], *paper[2:]])


@pytest.mark.full
def test_a_second_compile_of_one_model_with_other_options() -> None:
    """Without a reset in between, as in a notebook."""
    model = build_llama(layers=1)
    recipes = {
        1: Recipe(norm={"p": 1}),
        2: Recipe(),
        3.5: Recipe(norm={"p": 3.5}),
    }
    models = {p: torch.compile(model, backend="mxnorm", options={**AOT, "p": p}) for p in recipes}
    for _ in range(2):
        for p, recipe in recipes.items():
            with torch.no_grad():
                got = models[p](IDS, use_cache=False).logits
                want = reference_of(model, recipe)(IDS, use_cache=False).logits
            assert torch.equal(got, want), p


@pytest.mark.full
def test_a_general_p_through_inductor() -> None:
    """Wide enough that Inductor keeps the reductions over blocks as loops."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(512), nn.Linear(512, 64))
    x = torch.randn(8, 512) * torch.randn(8, 1).exp()
    with torch.no_grad():
        got, want, other = (
            torch.compile(model, backend="mxnorm", options=options)(x)
            for options in ({"p": 3.5}, {**AOT, "p": 3.5}, {**AOT, "p": 1})
        )
    # Another order of sums may move a float8 value by a step.
    assert (got - want).norm() < 0.1 * (other - want).norm()


class PlainNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (64,), None, 1e-6)


class TwoSites(nn.Module):
    """Two norms without parameters, which run in the given order."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.first, self.second = PlainNorm(), PlainNorm()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        early, late = (getattr(self, name) for name in self.order)
        return self.two(late(self.one(early(x))))


@pytest.mark.full
@some(["inference"], train={"inference": False, "training": True})
def test_equal_graphs_of_the_same_modules_in_another_order(train: bool) -> None:
    """``modules`` selects by name, and the graph's code does not say which norm came first."""
    options = {"modules": {"first": {"p": 1}}}
    for order in (("first", "second"), ("second", "first")):
        got, report = compile_and_run(TwoSites(*order), train, **options)
        want, _ = compile_and_run(TwoSites(*order), train, **AOT, **options)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        assert [site.norm for site in report.fused] == list(order)


@pytest.mark.full
def test_torchao_weights_of_another_scale_mode() -> None:
    """The classes, shapes and the graph's code are the same."""
    for hits in (0, 1):
        for mode in ("rceil", "floor"):
            model = quantize_with_torchao(Block().to(torch.bfloat16), mode)
            torch._dynamo.reset()
            counters.clear()
            with mxnorm_pass.record() as report, torch.no_grad():
                torch.compile(model, backend="mxnorm")(inputs().bfloat16())
            assert autograd_cache_hits() == hits
            assert [site.format for site in report.fused] == [f"mxfp8 e4m3fn {mode} block 32"]


# Passes of the user


class NoNorms(CustomGraphPass):
    """Makes of every norm something that is none."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default):
            node.target = torch.ops.aten.sigmoid.default

    def uuid(self) -> str:
        return "no norms"


def no_norms(graph: fx.Graph) -> None:
    NoNorms()(graph)


def given(where: str, passes: Any) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
    if where == "options":
        return inductor_config.patch(), {"joint_custom_pre_pass": passes}
    return inductor_config.patch(joint_custom_pre_pass=passes), {}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
@some(
    ["pass-options", "function-global"],
    passes={
        "pass": NoNorms(),
        "function": no_norms,
        "list": [NoNorms()],
        "tuple": (NoNorms(), no_norms),
    },
    where=["options", "global"],
)
def test_the_users_passes_run_first(passes: Any, where: str) -> None:
    """Ours sees their graph, and no compile without them finds their report or code."""
    plain, plain_report = compile_and_run(Block())
    setting, options = given(where, passes)
    with setting:
        changed, changed_report = compile_and_run(Block(), **options)
        assert "sigmoid" in changed_report.graphs[0].before
        assert not changed_report.sites
        assert not torch.equal(changed[0], plain[0])
        again, again_report = compile_and_run(Block(), **options)
        # A pass that cannot name itself keeps its compiles out of the cache.
        assert autograd_cache_hits() == (no_norms is not passes and no_norms not in as_list(passes))
        assert_equal(again, changed)
        assert again_report == changed_report
        explained = mxnorm_pass.explain(Block().requires_grad_(False), inputs(), options=options)
        assert not explained.sites
    warm, warm_report = compile_and_run(Block())
    assert autograd_cache_hits() == 1
    assert_equal(warm, plain)
    assert warm_report == plain_report and len(warm_report.fused) == 1


def as_list(passes: Any) -> list[Any]:
    return list(passes) if isinstance(passes, (list, tuple)) else [passes]


@pytest.mark.full
def test_passes_in_options_replace_the_global_ones_as_in_inductor() -> None:
    ran: list[str] = []
    with inductor_config.patch(joint_custom_pre_pass=lambda graph: ran.append("global")):
        options = {"joint_custom_pre_pass": lambda graph: ran.append("options")}
        _, report = compile_and_run(Block(), **options)
    assert ran == ["options"] and len(report.fused) == 1


# Threads


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """All jobs start together."""
    barrier = threading.Barrier(len(jobs))

    def run_job(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run_job, jobs))


@pytest.mark.full
def test_threads_that_compile_other_options_and_models() -> None:
    settings = inductor_config.save_config_portable()
    tables = [dict(cpp_utils.DTYPE_TO_CPP), dict(cpp_utils.DTYPE_TO_ATEN)]
    recipes = [{"p": 1}, {"p": 2}, {"estimator": "exact"}]
    layers = [1, 2, 3]

    def job(options: dict[str, Any], count: int) -> tuple[Tensor, Tensor, Report]:
        model = build_llama(layers=count)
        gain = "activation" if "estimator" in options else "fold"
        reference = reference_of(model, Recipe(norm=options, gain=gain))
        compiled = torch.compile(model, backend="mxnorm", options={**AOT, **options, "gain": gain})
        with mxnorm_pass.record() as report, torch.no_grad():
            got = compiled(IDS, use_cache=False).logits
            return got, reference(IDS, use_cache=False).logits, report

    jobs = [lambda o=o, n=n: job(o, n) for o, n in zip(recipes, layers, strict=True)]
    for (got, want, report), count in zip(in_threads(jobs), layers, strict=True):
        assert torch.equal(got, want)
        assert len(report.graphs) == 1 and len(report.fused) == 2 * count
    assert recording._open == []
    assert inductor_config.save_config_portable() == settings
    assert [dict(cpp_utils.DTYPE_TO_CPP), dict(cpp_utils.DTYPE_TO_ATEN)] == tables


@pytest.mark.full
def test_threads_that_train_through_inductor() -> None:
    """The backward of one is compiled while another compiles."""

    def job(model: Block, p: float) -> tuple[list[Tensor], Report]:
        x = inputs().requires_grad_()
        with mxnorm_pass.record() as report:
            y = torch.compile(model, backend="mxnorm", options={"p": p})(x)
            y.square().sum().backward()
        return [y.detach(), x.grad, *(q.grad for q in model.parameters())], report

    powers = (1, 2)
    # Built here: the seed of parameters is global.
    models = [Block() for _ in powers]
    jobs = [lambda m=m, p=p: job(m, p) for m, p in zip(models, powers, strict=True)]
    results = in_threads(jobs)
    for p, (got, report) in zip(powers, results, strict=True):
        with inductor_config.patch(force_disable_caches=True):
            alone, _ = compile_and_run(Block(), True, p=p)
        assert_equal(got, alone)
        assert len(report.graphs) == len(report.fused) == 1
    assert recording._open == []


def test_a_thread_that_does_not_record_reports_to_those_that_do() -> None:
    def job(p: float) -> None:
        with torch.no_grad():
            torch.compile(Block(), backend="mxnorm", options={**AOT, "p": p})(inputs())

    with mxnorm_pass.record() as outer, mxnorm_pass.record() as inner:
        in_threads([lambda p=p: job(p) for p in (1, 3)])
    assert len(outer.fused) == len(inner.fused) == 2
