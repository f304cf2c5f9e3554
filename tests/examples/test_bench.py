"""The kernel benchmark without a GPU: its grid, bytes, contestants, checks and reports."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench_contestants as contestants
import bench_kernels
import bench_report
import pytest
import torch
from bench_checks import Check, codes_in_order, compare, poison, unwritten
from bench_contestants import FORMATS, VARIANTS, Inputs
from bench_kernels import Case, grid
from bench_report import Measured, Verdict
from benchlib import Timing, interleaved, save_json
from measurements import measured
from paths import EXAMPLES
from run_examples import run_example, run_example_here
from torch import Tensor

TOKENS, WIDTH = 64, 128
needs_e8m0 = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="Inductor cannot compile torchao's cast for a CPU"
)
ALL = contestants.CONTESTANTS


def verdict(cases: list[Measured], words: str) -> Verdict:
    (found,) = [v for v in bench_report.verdicts(cases) if words in v.claim]
    return found


def inputs_for(variant: str, format: str = "mxfp8") -> Inputs:
    torch.manual_seed(0)
    x, residual = (3 * torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    weight = 1 + 0.1 * torch.randn(WIDTH, dtype=torch.bfloat16)
    scale = contestants.tensor_scale(weight, format)
    return Inputs(x, residual if variant == "residual" else None, weight, scale)


formats = pytest.mark.parametrize("format", FORMATS)


@formats
def test_bytes_are_those_of_the_tensors(format: str) -> None:
    for variant in VARIANTS:
        inputs = inputs_for(variant, format)
        outputs = contestants.reference("exact", variant, inputs, TOKENS, format)
        tensors = [inputs.x, inputs.residual, inputs.weight, *outputs.values()]
        total = sum(t.nbytes for t in tensors if t is not None)
        assert contestants.moved_bytes(variant, TOKENS, WIDTH, format) == total


def test_grid_starts_with_what_moves_most() -> None:
    cases = grid(VARIANTS, bench_kernels.TOKENS, bench_kernels.WIDTHS)
    assert len(cases) == len(set(cases)) == 8 * 5 * 2 + 5
    assert cases[0] == Case("residual", 32768, 16384)
    assert [c.bytes for c in cases] == sorted((c.bytes for c in cases), reverse=True)
    assert {c.tokens for c in cases if c.variant == "both"} == {8192}


def test_graphs_hold_enough_calls() -> None:
    largest, small = Case("residual", 32768, 16384), Case("norm", 1, 2048)
    assert largest.calls == 2
    assert small.calls == bench_kernels.MAX_CALLS
    middle = Case("norm", 8192, 4096)
    assert 3e9 <= middle.calls * middle.bytes < 3e9 + middle.bytes


@formats
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_our_ops_do_what_is_compared(variant: Any, format: str) -> None:
    inputs = inputs_for(variant, format)
    for name in contestants.OURS:
        ((_, call),) = contestants.candidates(name, variant, TOKENS, inputs.weight, format)
        expected = contestants.reference(name, variant, inputs, TOKENS, format)
        assert compare(call(inputs), expected, 0).differing == 0


@formats
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_opponents_do_the_same_work(variant: Any, format: str) -> None:
    # Uncompiled, HuggingFace's norm and torchao's cast round where functional does.
    inputs = inputs_for(variant, format)
    expected = contestants.reference("exact", variant, inputs, TOKENS, format)
    norms = (
        contestants.hf_norm(WIDTH, inputs.weight),
        contestants.BlockedNorm(inputs.weight),
    )
    for norm in norms:
        function = contestants.norm_cast_function(norm, variant, format)
        outputs = function(inputs.x, inputs.residual, inputs.tensor_scale)
        named = dict(zip(contestants.NAMES[variant], outputs, strict=True))
        assert compare(named, expected, 0).differing == 0
        for name, tensor in named.items():
            assert tensor.shape == expected[name].shape and tensor.is_contiguous()


# The same rounding as in eager mode, which Inductor leaves out unless told.
@pytest.mark.full
@torch._inductor.config.patch(emulate_precision_casts=True)
@torch.no_grad()
@needs_e8m0
def test_the_opponents_compile() -> None:
    inputs = inputs_for("norm")
    expected = contestants.reference("exact", "norm", inputs, TOKENS)
    torch._dynamo.utils.counters.clear()
    names = ("inductor", *contestants.TUNED)
    for name in names:
        call = contestants.contestant(name, "norm", WIDTH, inputs.weight)
        assert compare(call(inputs), expected, 0).differing <= 2
    # Each has a compile of its own, with its own options.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(names)


# In a process of its own: the key of Inductor's cache holds more than the kernel, such as the
# number of threads, and what other tests have imported or set.
FIND_COMPILED = f"""
import torch, bench_contestants, bench_kernels
case = bench_kernels.Case("norm", {TOKENS}, {WIDTH})
argv = ["--precompile", "1", "--contestants", "copy-kernel", "inductor"]
bench_kernels.precompile([case], bench_kernels.parse_args(argv), "cpu")
(inputs,) = bench_kernels.draw_inputs(case, 1, "cpu")
with torch.no_grad():
    bench_contestants.contestant("inductor", "norm", {WIDTH}, inputs.weight)(inputs)
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.full
@needs_e8m0
def test_what_other_processes_compiled_is_found() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(EXAMPLES)}
    command = [sys.executable, "-c", FIND_COMPILED]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.stdout == "1\n", result.stdout + result.stderr


def test_what_a_kernel_leaves_out_is_found() -> None:
    outputs = {
        "values": torch.ones(4, 64).to(torch.float8_e4m3fn),
        "total": torch.ones(4, 64, dtype=torch.bfloat16),
        "rho": torch.ones(4, 1),
    }
    poison(outputs)
    assert unwritten(outputs) == 4 * 64 + 4 * 64 + 4
    # NaNs all of them, so that no finite input gives them.
    assert all(tensor.float().isnan().all() for tensor in outputs.values())
    outputs["values"][:, 1:] = torch.tensor(-448.0).to(torch.float8_e4m3fn)
    outputs["total"].fill_(-1.0)
    outputs["rho"].fill_(-1.0)
    assert unwritten(outputs) == 4


def test_a_block_of_4_bits_that_a_kernel_leaves_out_is_found() -> None:
    outputs = {"values": torch.zeros(4, 64, dtype=torch.uint8)}
    assert unwritten(outputs) == 0
    poison(outputs)
    assert unwritten(outputs) == 4 * 64
    # Of the others in the block one is not -6.
    outputs["values"][:, ::8] = 0xFE
    assert unwritten(outputs) == 0


def test_codes_follow_the_values() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = codes.view(dtype).float()
        finite = values.isfinite()
        order = codes_in_order(codes.view(dtype))[finite]
        pairs = sorted(zip(order.tolist(), values[finite].tolist(), strict=True))
        assert all(a[1] < b[1] for a, b in zip(pairs, pairs[1:], strict=False) if a[0] != b[0])
        assert order[values[finite] == 0].tolist() == [0, 0]


def test_codes_of_4_bits_follow_the_values() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    packed = codes[::2] | codes[1::2] << 4
    assert codes_in_order(packed[None]).tolist() == [[*range(8), 0, *range(-1, -8, -1)]]


def quantized(values: Tensor, scales: Tensor) -> dict[str, Tensor]:
    dtypes = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    return {n: t.view(d) for n, t, d in zip(("values", "scales"), (values, scales), dtypes)}  # noqa: B905


def test_differences_are_counted_in_steps() -> None:
    values, scales = (torch.full(s, 60, dtype=torch.uint8) for s in ((2, 64), (2, 2)))
    right = quantized(values, scales)
    assert compare(right, right, 3) == Check(3, 2 * 64 + 2 * 2, 0, 0)
    one, far, other_scale = values.clone(), values.clone(), scales.clone()
    one[0, 0] += 1
    assert compare(quantized(one, scales), right, 0) == Check(0, 132, 1, 1)
    far[0, 0] += 9
    assert compare(quantized(far, scales), right, 0).steps == 9
    # In a block of another scale, values of another size are no fault of their own.
    other_scale[0, 0] += 1
    assert compare(quantized(far, other_scale), right, 0) == Check(0, 132, 2, 1)
    other_scale[0, 0] += 1
    assert compare(quantized(values, other_scale), right, 0).steps == 2


def test_a_wrong_sum_is_no_rounding() -> None:
    total = torch.ones(2, 32, dtype=torch.bfloat16)
    wrong = total.clone()
    wrong[1, 3] += 0.01
    assert compare({"total": wrong}, {"total": total}, 0) == Check(0, 64, 1, 2)


def test_verdicts_take_the_worst_shape() -> None:
    good = measured(copy_kernel=95, mxnorm=100, mxnorm_fold=100)
    assert verdict([good], "T*D >= 2^25").passed is True
    for worse in (
        measured(copy_kernel=94, mxnorm=100, mxnorm_fold=98),
        measured(copy_kernel=94, mxnorm=98, mxnorm_fold=100),
    ):
        found = verdict([good, worse], "T*D >= 2^25")
        assert found.passed is False
        assert found.found == "0.940 at 8192x4096 norm"
    # Too small to count, and of another variant.
    assert verdict([good, measured(tokens=4096, copy_kernel=1, mxnorm=9)], "T*D >= 2^25").passed
    assert verdict([good, measured("residual", copy_kernel=1, mxnorm=9)], "T*D >= 2^25").passed


def test_speed_up_is_a_geometric_mean_over_many_tokens() -> None:
    cases = [
        measured(tokens=4096, inductor=3.2, mxnorm=1),
        measured(tokens=16384, inductor=1.6, mxnorm=2),
        measured(tokens=1024, inductor=0.1, mxnorm=1),
    ]
    mean = math.sqrt(3.2 * 0.8)
    found = verdict(cases, "over inductor: 1.6")
    assert found == Verdict("geometric mean, T >= 4096, over inductor: 1.6", f"{mean:.3f}", True)
    cases[0] = measured(tokens=4096, inductor=3.19, mxnorm=1)
    assert verdict(cases, "over inductor: 1.6").passed is False
    assert verdict(cases, "never slower than inductor: 1.0").passed is False
    assert verdict(cases, "over inductor-tuned: 1.45").passed is None


def test_both_directions_are_judged_at_their_shapes() -> None:
    words = "both directions"
    good = measured("both", copy_kernel=90, mxnorm=100)
    slow = measured("both", width=8192, copy_kernel=89, mxnorm=100)
    assert verdict([good], words).passed is True
    assert verdict([good, slow], words).passed is False
    assert verdict([measured("both", width=16384, copy_kernel=1, mxnorm=100)], words).passed is None


def test_tuned_is_the_faster_spelling() -> None:
    case = measured(tuned_flat=30, tuned_blocks=20, mxnorm=10, copy_kernel=9)
    assert case.ratio("inductor-tuned", "mxnorm") == 2
    assert case.gbps("mxnorm") == case.bytes / 10e-6 / 1e9
    assert measured(mxnorm=10).timing("inductor-tuned") is None


def test_slower_than_exact_only_beyond_noise() -> None:
    assert verdict([measured(exact=10, exact_repeat=10.2, mxnorm=10.3)], "exact").passed is True
    assert verdict([measured(exact=10, exact_repeat=10.2, mxnorm=10.5)], "exact").passed is False
    spread = measured(exact=10, exact_repeat=10, mxnorm=10.5)
    spread.times["mxnorm"] = Timing(10.5, 9.9, 11)
    assert verdict([spread], "exact").passed is True


@pytest.mark.parametrize(
    "check, passed",
    [
        (Check(0, 10_000, 1, 1), True),
        (Check(1, 10_000, 0, 0), False),
        (Check(0, 10_000, 2, 1), False),
        (Check(0, 100_000, 1, 2), False),
    ],
)
def test_equality_with_functional(check: Check, passed: bool) -> None:
    case = measured(mxnorm=1)
    case.checks["mxnorm"] = check
    # Opponents may round elsewhere.
    case.checks["inductor"] = Check(0, 100, 50, 9)
    assert verdict([case], "equal to functional").passed is passed


def test_failures_show() -> None:
    case = measured(copy_kernel=1)
    case.failures["mxnorm"] = "RuntimeError: no kernel"
    assert verdict([case], "every contestant ran").passed is False
    assert bench_report.cell(case, "mxnorm") == "failed"


def results_file(path: Path) -> Path:
    us = {name.replace("-", "_"): 10.0 + i for i, name in enumerate(ALL)}
    cases = [
        measured(variant, tokens, width, **us)
        for variant in VARIANTS
        for tokens in (8192, 16384)
        for width in (2048, 4096)
    ]
    facts = {"gpu": "some GPU", "torch": "2.11", "triton": "3.6", "torchao": "0.17"}
    save_json(path, {"machine": facts, "runs": [], "cases": [asdict(c) for c in cases]})
    return path


@pytest.mark.full
def test_plot_only_needs_no_gpu(tmp_path: Path) -> None:
    path = results_file(tmp_path / "kernels.json")
    done = run_example_here("bench_kernels.py", "--plot-only", str(path))
    assert done.returncode in (0, None), done.stderr
    assert "some GPU" in done.stdout
    assert len(re.findall(r"^ +(2048|4096) +(8192|16384) ", done.stdout, re.M)) == 3 * 4
    assert "PASS" in done.stdout and "FAIL" in done.stdout
    png = (tmp_path / "kernels.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_results_survive_the_file(tmp_path: Path) -> None:
    path = results_file(tmp_path / "kernels.json")
    results = bench_kernels.load(path)
    bench_kernels.save(tmp_path / "again.json", results)
    assert json.loads(path.read_text()) == json.loads((tmp_path / "again.json").read_text())
    args = bench_kernels.parse_args(["--tokens", "8192", "64", "--widths", "2048", "32"])
    left = list(bench_kernels.remaining(args, results["cases"]))
    assert Case("norm", 8192, 2048) not in left
    assert {c.width for c in left if c.tokens == 8192} == {32}
    assert sum(c.tokens == 64 for c in left) == 2 * 2
    args = bench_kernels.parse_args(["--tokens", "8192", "--widths", "2048", "--format", "nvfp4"])
    left = list(bench_kernels.remaining(args, results["cases"]))
    assert left == [Case(v, 8192, 2048, "nvfp4") for v in ("residual", "both", "norm")]


def test_formats_have_tables_of_their_own() -> None:
    cases = [
        replace(measured(inductor=3, nested=2, mxnorm=1), format=format)
        for format in ("mxfp8", "nvfp4")
    ]
    *of_formats, of_all = [str(table.title) for table in bench_report.tables(cases)]
    assert [title.split(",")[1].split(":")[0].strip() for title in of_formats] == [
        "mxfp8", "mxfp8", "nvfp4", "nvfp4"
    ]  # fmt: skip
    assert of_all.startswith("Speed-up of mxnorm: geometric mean")


def test_nested_is_judged_as_the_others_are() -> None:
    good = measured(nested=12, mxnorm=10, mxnorm_fold=9)
    slow = measured(width=8192, nested=10, mxnorm=10.1, mxnorm_fold=9)
    with_residual = measured("residual", nested=11, mxnorm=10)
    found = verdict([good, with_residual], "over nested: 1.0")
    assert (found.found, found.passed) == ("1.200", True)
    assert verdict([good, with_residual], "nested, with the residual").found == "1.100"
    assert verdict([good], "never slower than nested").passed is True
    never = verdict([good, slow], "never slower than nested")
    assert (never.passed, never.found) == (False, "0.990 at 8192x8192 norm")


def test_nested_may_round_elsewhere_but_not_do_less() -> None:
    case = measured(nested=1)
    words = "nested does the same"
    for check, passed in (
        (Check(0, 1000, 40, 1), True),
        (Check(0, 1000, 400, 1), False),
        (Check(0, 1000, 40, 2), False),
        (Check(1, 1000, 0, 0), False),
    ):
        case.checks["nested"] = check
        assert verdict([case], words).passed is passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run_example_here("bench_kernels.py", "--quick", "--json", str(tmp_path / "x.json"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("bench_kernels.py: no CUDA GPU here")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_our_kernels_are_right(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    sizes = ["--tokens", "64", "8192", "--widths", "256", "--rounds", "2", "--json", str(path)]
    chosen = ["--contestants", "copy-memcpy", "copy-kernel", *contestants.OURS]
    done = run_example("bench_kernels.py", *sizes, *chosen)
    assert done.returncode == 0, done.stderr
    cases = bench_kernels.load(path)["cases"]
    assert [str(Case(c.variant, c.tokens, c.width)) for c in cases] == [
        "residual 8192x256 mxfp8", "both 8192x256 mxfp8", "norm 8192x256 mxfp8",
        "residual 64x256 mxfp8", "norm 64x256 mxfp8",
    ]  # fmt: skip
    assert verdict(cases, "equal to functional").passed
    assert verdict(cases, "every contestant ran").passed


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"cases": [{}]}')
    done = run_example_here("bench_kernels.py", "--plot-only", str(path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"bench_kernels.py: cannot read {path}")


def test_runs_take_turns() -> None:
    seen: list[str] = []
    runs = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    samples = interleaved(runs, rounds=20, device="cpu", before=lambda: seen.append("-"))
    assert {name: len(own) for name, own in samples.items()} == dict.fromkeys("abc", 20)
    assert seen[::2] == ["-"] * 60
    rounds = ["".join(seen[i + 1 : i + 6 : 2]) for i in range(0, 120, 6)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 1


def test_timing_has_the_median_and_the_spread() -> None:
    assert Timing.of([float(i) for i in range(101)]) == Timing(50, 10, 90)


def measured_layers(work: str, estimator: str, path: Path) -> dict[str, Any]:
    """The arms of a run, each compiled from cold caches, which takes a while on a CPU."""
    sizes = ["--hidden", "128", "--tokens", "64", "--layers", "1", "--device", "cpu"]
    sizes += ["--work", work, "--rounds", "2", "--no-warm-up", "--estimators", estimator]
    done = run_example("bench_layer.py", *sizes, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert f"{work} T = 64: {estimator} " in done.stdout
    (scenario,) = json.loads(path.read_text())["scenarios"]
    assert (scenario["work"], scenario["tokens"]) == (work, 64)
    arms = scenario["arms"]
    assert {n: arm["fused"] for n, arm in arms.items()} == {"inductor": 0, estimator: 2}
    for arm in arms.values():
        assert 0 < arm["timing"]["low"] <= arm["timing"]["us"] <= arm["timing"]["high"]
        assert arm["compile_seconds"] > arm["pass_seconds"] >= 0
    assert arms[estimator]["pass_seconds"] > 0 == arms["inductor"]["pass_seconds"]
    if estimator == "exact":
        assert f"PASS {work} T = 64: exact as near" in done.stdout
    return arms


@pytest.mark.full
def test_layers_are_measured_on_a_cpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Code without vectors compiles faster.
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")
    # Training differs in the model alone, and its code for a CPU takes minutes to compile.
    exact = measured_layers("prefill", "exact", tmp_path / "prefill.json")
    assert exact["exact"]["from_inductor"] < 0.05


def test_layers_refuse_a_wrong_shape() -> None:
    done = run_example_here("bench_layer.py", "--hidden", "100")
    assert done.returncode == 2
    assert "--hidden must be a multiple of 128" in done.stderr
