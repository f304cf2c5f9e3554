"""Options, toggles, warnings, logs and caches of ``torch.compile(model, backend="mxnorm")``."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from reference import Recipe, build_llama, quantize_with_torchao, reference_of, token_ids
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import MXNormConfig, SkipReason
from mxnorm_pass.compilation.inductor_passes import MXNormPass
from mxnorm_pass.passes.before_autograd.scopes import scopes_of
from mxnorm_pass.passes.joint import GraphFacts

IDS = token_ids()


def infer(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mxnorm_pass.MXNormWarning)
        yield


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimater": "exact"}, ["estimater", "estimator"]),
        ({"estimator": "rms"}, ["estimator", "rms", "mxnorm", "exact"]),
        ({"p": 0}, ["p", "0"]),
        ({"p": "two"}, ["p", "two"]),
        ({"gradient": True}, ["gradient", "True", "true", "orthogonal", "paper"]),
        ({"elem_dtype": torch.int8}, ["elem_dtype", "torch.int8", "float8_e4m3fn"]),
        ({"modules": {"re:(": False}}, ["re:("]),
        ({"modules": {"*": {"inner": "eager"}}}, ["inner", "p"]),
        ({"max_autotun": True}, ["max_autotun", "max_autotune"]),
    ],
)
def test_bad_options_are_a_value_error_at_compile(options, words) -> None:
    model = torch.compile(nn.Linear(32, 32), backend="mxnorm", options=options)
    with pytest.raises(ValueError) as error:
        model(torch.randn(2, 32))
    for word in words:
        assert word in str(error.value)


def test_a_mode_that_turns_off_our_stage_is_refused() -> None:
    model = torch.compile(nn.Linear(32, 32), backend="mxnorm", mode="lite")
    with pytest.raises(ValueError, match="use_joint_graph_passes"):
        model(torch.randn(2, 32))


def test_a_norm_that_is_off_keeps_its_casts_and_the_exact_rms() -> None:
    model = build_llama(layers=1)
    want = infer(reference_of(model, Recipe(norm={"estimator": "exact"}, gain="activation")))
    with mxnorm_pass.record() as report, no_warning():
        got = infer(compiled(model, modules={"*norm": False}))
    assert {s.reason for s in report.sites} == {SkipReason.DISABLED}
    assert torch.equal(got, want)


def test_override_for_one_layer() -> None:
    model = build_llama()
    reference = reference_of(model, Recipe())
    other = reference_of(model, Recipe(norm={"p": 1}))
    reference.model.layers[1] = other.model.layers[1]
    got = infer(compiled(model, modules={"model.layers.1.*": {"p": 1}}))
    assert torch.equal(got, infer(reference))
    assert not torch.equal(got, infer(compiled(model)))


@pytest.mark.full
@pytest.mark.parametrize(
    "modules",
    [
        {"re:.*layers\\.[0-9]+\\.input_layernorm": False},
        {"*.input_layernorm": False},
        {"*": False, "*.post_attention_layernorm": True, "*.mlp.*": True},
    ],
    ids=["regex", "glob", "last match wins"],
)
def test_patterns(modules) -> None:
    report = mxnorm_pass.explain(build_llama(), IDS, use_cache=False, options={"modules": modules})
    assert [s.norm for s in report.fused] == [
        f"model.layers.{i}.post_attention_layernorm" for i in range(2)
    ]


@pytest.mark.full
def test_lm_head_is_converted_when_named() -> None:
    options = {"modules": {"lm_head": True}}
    report = mxnorm_pass.explain(build_llama(layers=1), IDS, use_cache=False, options=options)
    assert [s.consumers for s in report.fused][-1] == ("lm_head",)
    assert len(report.fused) == 3


def test_unmatched_pattern_is_named_with_the_nearest_names() -> None:
    options = {"modules": {"model.layers.0.input_layernrm": False}}
    with pytest.warns(mxnorm_pass.MXNormWarning) as caught:
        infer(compiled(build_llama(layers=1), **options))
    (message,) = [str(w.message) for w in caught if "pattern" in str(w.message)]
    assert "model.layers.0.input_layernrm" in message
    assert "model.layers.0.input_layernorm" in message


@pytest.mark.full
def test_uncalibrated_inference_warns_once_and_says_how_to_silence() -> None:
    model = build_llama(layers=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        infer(compiled(model))
        torch._dynamo.reset()
        infer(compiled(model))
    (warning,) = [w for w in caught if w.category is mxnorm_pass.CalibrationWarning]
    assert "calibration" in str(warning.message)
    assert "mxnorm_pass.CalibrationWarning" in str(warning.message)


@pytest.mark.full
def test_training_and_exact_do_not_warn() -> None:
    with no_warning():
        model = build_llama(layers=1)
        compiled(model)(IDS, labels=IDS, use_cache=False).loss.backward()
        torch._dynamo.reset()
        infer(compiled(model, estimator="exact"))


def test_a_graph_without_a_norm_is_untouched_with_one_warning() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.randn(4, 64)
    with pytest.warns(mxnorm_pass.MXNormWarning) as caught, mxnorm_pass.record() as report:
        got = compiled(model)(x)
    assert torch.equal(got, model(x))
    (graph,) = report.graphs
    assert graph.before == graph.after and not report.sites
    assert len(caught) == 1 and "no RMSNorm" in str(caught[0].message)


def test_info_line_and_debug_graphs(caplog) -> None:
    with caplog.at_level(logging.DEBUG, logger="mxnorm_pass"):
        infer(compiled(build_llama()))
    (line,) = [r for r in caplog.records if r.name == "mxnorm_pass" and r.levelno == logging.INFO]
    assert "5 norms, 4 fused, 1 skipped" in line.getMessage()
    assert any("torch.ops.mxnorm_pass.norm_cast" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gain", ["fold", "activation"])
def test_special_inputs_spread_as_in_norm_and_cast(special, gain) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    x = torch.randn(4, 64)
    x[1, 3] = special
    outputs = []
    for estimator in ("mxnorm", "exact"):
        torch._dynamo.reset()
        outputs.append(compiled(Model(), gain=gain, estimator=estimator)(x))
    mxnorm, exact = outputs
    assert torch.equal(mxnorm.isnan(), exact.isnan())
    assert torch.equal(mxnorm.isinf(), exact.isinf())
    assert not mxnorm.isfinite().all() and mxnorm[0].isfinite().all()


_kernel_runs: list[str] = []


@torch.library.custom_op("mxnorm_tests::witness", mutates_args=())
def witness(x: Tensor) -> Tensor:
    """A kernel that notes every run."""
    _kernel_runs.append("forward")
    return x.clone()


def _witness_backward(ctx: Any, grad: Tensor) -> Tensor:
    return witness(grad)


witness.register_fake(torch.empty_like)
witness.register_autograd(_witness_backward)


class Witnessed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = witness(self.linear(self.norm(witness(x))))
        torch._dynamo.graph_break()
        return witness(y)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_explain_runs_no_kernel(training) -> None:
    _kernel_runs.clear()
    model, x = Witnessed(), torch.randn(4, 64)
    with torch.set_grad_enabled(training):
        report = mxnorm_pass.explain(model, x)
        assert not _kernel_runs
        model(x)
    assert _kernel_runs
    kind = "training" if training else "inference"
    assert [g.name for g in report.graphs] == [f"{kind}_0", f"{kind}_1"]
    assert len(report.fused) == 1
    assert ("backward" in report.graphs[0].after) == training


def test_report_round_trip_and_counts() -> None:
    report = mxnorm_pass.explain(build_llama(), IDS, use_cache=False)
    again = mxnorm_pass.Report.from_json(report.to_json())
    assert again == report and str(again) == str(report)
    assert len(report.fused) + len(report.skipped) == 5
    (graph,) = report.graphs
    assert graph.ops_after["mxnorm_pass.norm_cast.default"] == 1
    assert graph.ops_after["mxnorm_pass.add_norm_cast.default"] == 3
    assert "mxnorm_pass.norm_cast.default" not in graph.ops_before


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path) -> None:
    report = mxnorm_pass.Report()
    with pytest.raises(OSError):
        report.save_html(tmp_path / "missing" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        report.save_html(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def with_facts(**facts: Any) -> MXNormPass:
    scopes = scopes_of(torch.fx.symbolic_trace(nn.Identity()))
    return MXNormPass(
        MXNormConfig(), module_paths=("a",), scopes=scopes, facts=lambda _: GraphFacts(**facts)
    )


def test_uuid_tells_configs_sources_and_module_names_apart() -> None:
    base = MXNormPass(MXNormConfig(), module_paths=("a",))
    assert base.uuid() == MXNormPass(MXNormConfig(), module_paths=("a",)).uuid()
    assert with_facts().uuid() == with_facts().uuid()
    others = [
        MXNormPass(MXNormConfig(p=1), module_paths=("a",)),
        MXNormPass(MXNormConfig(modules={"x": False}), module_paths=("a",)),
        MXNormPass(MXNormConfig(), module_paths=("b",)),
        with_facts(),
        with_facts(tensor_subclass="DTensor"),
        with_facts(parameters=frozenset({1})),
        with_facts(differentiated=True),
    ]
    assert len({base.uuid(), *(o.uuid() for o in others)}) == 8


@pytest.mark.full
def test_equal_graphs_with_other_module_names_do_not_share_cache_entries() -> None:
    """`modules` selects by name, and Inductor's cache key knows no names."""

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.name = name
            self.add_module(name, nn.Sequential(nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 32)))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.name)(x)

    x = torch.randn(4, 64)
    options = {"modules": {"first.*": False}}
    results, fused = [], []
    for name in ("first", "second"):
        torch._dynamo.reset()
        with mxnorm_pass.record() as report, torch.no_grad():
            results.append(torch.compile(Named(name), backend="mxnorm", options=options)(x))
        fused.append(len(report.fused))
    assert fused == [0, 1]
    assert not torch.equal(*results)


_SCRIPT = """
import torch
from torch._dynamo.utils import counters
import mxnorm_pass
torch.manual_seed(0)
model, x = torch.nn.Sequential(torch.nn.RMSNorm(64), torch.nn.Linear(64, 64)), torch.ones(32, 64)
with mxnorm_pass.record() as report:
    c = torch.compile(model, backend="mxnorm")
    c(x).sum().backward()
    with torch.no_grad():
        c(x)
print("HITS", counters["aot_autograd"]["autograd_cache_hit"])
print(report.to_json())
"""


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.full
def test_a_warm_cache_gives_the_same_report(tmp_path) -> None:
    """The stored one, or one traced anew where none is stored or what is stored is broken."""

    def compile_in_a_process() -> list[str]:
        # Code without vectors compiles faster.
        return run_script(_SCRIPT, TORCHINDUCTOR_VEC_ISA_OK="0").stdout.split("\n", 1)

    cold, warm = compile_in_a_process(), compile_in_a_process()
    assert (cold[0], warm[0]) == ("HITS 0", "HITS 2")
    assert warm[1] == cold[1]
    report = mxnorm_pass.Report.from_json(warm[1])
    assert [g.name for g in report.graphs] == ["training_0", "inference_1"]
    assert len(report.fused) == 2
    stored = list((tmp_path / "inductor" / "mxnorm_pass").iterdir())
    assert len(stored) == 2
    stored[0].unlink()
    stored[1].write_text("{")
    assert compile_in_a_process() == warm


@pytest.mark.full
def test_backend_needs_no_import_and_torch_logs_shows_it() -> None:
    script = (
        "import torch; m = torch.nn.Sequential(torch.nn.RMSNorm(64, eps=1e-6), "
        "torch.nn.Linear(64, 32)); torch.compile(m, backend='mxnorm', "
        "options={'inner': 'aot_eager'})(torch.randn(4, 64))"
    )
    result = run_script(script, TORCH_LOGS="+mxnorm_pass")
    assert re.search(r"training graph: 1 norms, 1 fused, 0 skipped, pass took", result.stderr)
    assert "torch.ops.mxnorm_pass.norm_cast" in result.stderr


@pytest.mark.full
def test_a_compile_leaves_nothing_global_behind() -> None:
    from torch._inductor import config
    from torch._inductor.codegen import cpp_utils

    tables = [dict(cpp_utils.DTYPE_TO_CPP), dict(cpp_utils.DTYPE_TO_ATEN)]
    settings = config.save_config_portable()
    model = quantize_with_torchao(build_llama(torch.bfloat16, layers=1))
    infer(torch.compile(model, backend="mxnorm"))
    assert [dict(cpp_utils.DTYPE_TO_CPP), dict(cpp_utils.DTYPE_TO_ATEN)] == tables
    assert config.save_config_portable() == settings


@pytest.mark.full
def test_even_through_inductor_goes_as_far_as_plain_inductor() -> None:
    """torchao's EVEN cast assigns NaN under a mask to a bitcast, which torch 2.13 cannot lower.

    Norm-fed casts are replaced; those of o_proj and down_proj stay as torchao wrote them. Where
    plain Inductor compiles the model, ours must be as near to the eager result.
    """
    model = quantize_with_torchao(build_llama(torch.bfloat16, layers=1), "even")
    eager = infer(model)
    options = {"estimator": "exact"}
    try:
        plain = infer(torch.compile(model, backend="inductor"))
    except torch._inductor.exc.InductorError as error:
        assert "make_reindexer" in str(error)
        torch._dynamo.reset()
        with pytest.raises(torch._inductor.exc.InductorError, match="make_reindexer"):
            infer(torch.compile(model, backend="mxnorm", options=options))
    else:
        torch._dynamo.reset()
        got = infer(torch.compile(model, backend="mxnorm", options=options))
        # Both leave out bf16 roundings that eager makes, not the same ones.
        assert (got - eager).norm() <= 2 * (plain - eager).norm()


@pytest.mark.full
def test_users_inductor_passes_run_before_ours() -> None:
    seen: list[bool] = []

    def users_pass(graph: torch.fx.Graph) -> None:
        targets = {n.target for n in graph.nodes}
        seen.append(torch.ops.mxnorm_pass.norm_cast.default in targets)

    model = nn.Sequential(nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 32))
    options = {"joint_custom_pre_pass": users_pass}
    with mxnorm_pass.record() as report:
        torch.compile(model, backend="mxnorm", options=options)(torch.randn(4, 64))
    assert seen == [False]
    assert len(report.fused) == 1
