"""The benchmark of recipes without a GPU: its cases, bytes, kinds of kernels and tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_recipe_kernels as kernels
import bench_recipe_steps as steps
import bench_recipes
import pytest
import torch
from bench_recipe_kernels import FORMS, RECIPES, Case
from benchlib import Timing, save_json
from paths import PACKAGE
from run_examples import run_example_here

from mxnorm_pass import functional
from mxnorm_pass.numerics.philox import Draw

ROWS, WIDTH = 128, 192


def cast_nbytes(case: Case) -> int:
    """Of what ``functional`` makes of both operands."""
    total = 0
    shapes, forms = ((ROWS, WIDTH), (WIDTH, ROWS)), (case.form, case.form_along_t)
    for operand, shape, form in zip(case.operands, shapes, forms, strict=True):
        quantized = functional.cast_operand(
            torch.ones(shape, dtype=torch.bfloat16),
            operand.cast,
            hadamard=operand.hadamard,
            draw=Draw(torch.tensor(1), operand.matmul),
            use=operand.use,
        )
        wide = quantized.dequantize(torch.bfloat16).nbytes
        packed = quantized.values.nbytes + quantized.scales.nbytes
        total += wide if form == "bf16" else packed
    return total


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_the_tensors(recipe: str, form: Any) -> None:
    of_gradient = Case("gradient", recipe, form, WIDTH, ROWS)
    assert of_gradient.bytes == 2 * ROWS * WIDTH + cast_nbytes(of_gradient)
    of_norm = Case("norm", recipe, form, WIDTH, ROWS)
    assert of_norm.bytes == 2 * ROWS * WIDTH + 2 * WIDTH + cast_nbytes(of_norm)


def test_operands_are_those_of_the_backward() -> None:
    rows, along_t = Case("gradient", "nvfp4", "packed", WIDTH).operands
    assert (rows.matmul, along_t.matmul) == ("dgrad", "wgrad")
    assert rows.hadamard is None and along_t.hadamard is not None
    rows, along_t = Case("norm", "mxfp4-rht-sr", "packed", WIDTH).operands
    assert rows.cast.format == functional.block_format("mxfp8") and rows.is_plain
    assert along_t.cast.is_stochastic and along_t.has_random_signs


def test_norms_are_measured_in_two_recipes() -> None:
    of_norms = [str(c) for c in kernels.cases(RECIPES) if c.source == "norm"]
    assert of_norms == [
        f"norm {recipe} 8192x4096 {form}" for recipe in ("mxfp8", "mxfp4-rht-sr") for form in FORMS
    ]
    assert len(kernels.cases(["mxfp4-sr"])) == 4


def test_a_norms_cast_along_t_stays_packed() -> None:
    of_norm, of_gradient = (Case(s, "mxfp8", "bf16", WIDTH) for s in ("norm", "gradient"))
    assert (of_norm.form_along_t, of_gradient.form_along_t) == ("packed", "bf16")


def test_each_kernel_is_compiled_once() -> None:
    jobs = [job.args for job in kernels.compile_jobs(kernels.cases(["mxfp8", "mxfp4-sr"]))]
    assert len(set(jobs)) == len(jobs)
    assert {c.width for c, name in jobs if name == "Inductor"} == set(kernels.WIDTHS)
    assert {c.recipe for c, name in jobs if name == "Inductor"} == {"mxfp8"}
    casts = {(c.recipe, c.form) for c, name in jobs if name == "kernel" and c.source == "gradient"}
    assert len(casts) == 4


@torch.no_grad()
def test_inductor_compiles_what_the_kernel_does() -> None:
    case = Case("gradient", "mxfp4", "packed", WIDTH, ROWS)
    (x,) = kernels.draw(case, 1, "cpu")
    results = kernels.cast_both(*kernels.reads(case, x), x)
    assert [tuple(t.shape) for t in results] == [(128, 96), (128, 6), (192, 64), (192, 4)]
    assert all(t.is_contiguous() for t in results)
    assert sum(t.nbytes for t in (x, *results)) == case.bytes


@pytest.mark.parametrize(
    "name, kind",
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matmul"),
        ("triton_tem_fused_mm_3", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_mm_5", "rest"),
        ("void at::native::GammaBetaBackwardCUDAKernel<float>", "rest"),
        ("Memset (Device)", "rest"),
        ("operand_casts_kernel_0", "casts"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert steps.kind_of(name) == kind


def test_our_kernels_are_casts_and_matmuls() -> None:
    found = [
        line.split("(")[0].removeprefix("def ")
        for path in (PACKAGE / "kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    ]
    assert len(found) >= 3
    for name in found:
        assert steps.kind_of(name) == ("matmul" if name.startswith("mx_linear") else "casts")


def timing(us: float) -> Timing:
    return Timing(us, us, us)


def step(recipe: str, ms: float, casts: float, rest: float) -> steps.Measured:
    kinds = {"matmul": 3e4, "attention": 2e3, "casts": casts * 1e3, "rest": rest * 1e3}
    kernel = steps.Kernel("nvjet", 14, 3e4)
    times = {"time": timing(ms * 1e3), "bf16": timing(4e4)}
    return steps.Measured(recipe, **times, peak_bytes=2**33, compile_seconds=9.0, error=0.01,
                          kinds=kinds, kernels=[kernel])  # fmt: skip


def kernel(form: Any, **us: float) -> kernels.Measured:
    times = {name.replace("_", " "): timing(t) for name, t in us.items()}
    case = Case("gradient", "mxfp8", form, 4096)
    return kernels.Measured(case, case.bytes, 2, times, {}, {}, {})


def results_file(path: Path, **parts: list[Any]) -> Path:
    content = {"kernels": [], "steps": [], "failures": []} | parts
    of_json = {name: [m if isinstance(m, str) else asdict(m) for m in content[name]]
               for name in content}  # fmt: skip
    save_json(path, of_json)
    return path


def test_tables_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = kernel("packed", copy=30, kernel=40, two_calls=60, Inductor=120)
    one = results_file(tmp_path / "one.json", kernels=[packed, kernel("bf16", copy=50, kernel=50)])
    two = results_file(
        tmp_path / "two.json",
        steps=[step("bf16", 40, 0, 5), step("mxfp8", 60, 10, 9)],
        failures=["steps nvfp4 failed: RuntimeError: why"],
    )
    assert bench_recipes.main(["--tables-of", str(one), str(two)]) == 0
    of_kernels, of_steps, failures = capsys.readouterr().out.strip().split("\n\n")
    assert of_kernels.splitlines()[2:] == [
        "| gradient | mxfp8 | 4096 | 30.0 | 40.0 | 60.0 | 120.0 | 0.75 "
        "| 50.0 | 50.0 |  |  | 1.00 |"
    ]  # fmt: skip
    assert of_steps.splitlines()[2:] == [
        "| bf16 | 40.00 | 1.00x | 8.0 | 30.00 | 2.00 | 0.00 | 5.00 | 0.00 |",
        "| mxfp8 | 60.00 | 1.50x | 8.0 | 30.00 | 2.00 | 10.00 | 9.00 | 14.00 |",
    ]
    assert failures == "steps nvfp4 failed: RuntimeError: why"
    for table in (of_kernels, of_steps):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_one_failure_is_not_the_end() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel")

    results = bench_recipes.Results()
    assert "no kernel" in results.add(bench_recipes.Planned("steps", "nvfp4", fail))
    assert results.add(bench_recipes.Planned("steps", "bf16", lambda: step("bf16", 40, 0, 5)))
    assert [m.recipe for m in results.steps] == ["bf16"] and len(results.failures) == 1


def test_parts_and_recipes_are_chosen() -> None:
    def planned(*argv: str) -> list[str]:
        return [f"{p.part} {p.name}" for p in bench_recipes.plan(bench_recipes.parse_args([*argv]))]

    assert planned("--part", "steps", "--recipes", "mxfp8", "none") == [
        "steps bf16", "steps mxfp8", "steps none"
    ]  # fmt: skip
    assert len(planned("--part", "kernels", "--recipes", "mxfp4-sr", "none")) == 4
    assert planned()[-6:] == [f"steps {r}" for r in ("bf16", *steps.RECIPES)]


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_example_here("bench_recipes.py")
    assert done.returncode == 2
    assert done.stderr.endswith("no CUDA GPU here; --tables-of JSON shows earlier results "
                                "without one\n")  # fmt: skip


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[]")
    done = run_example_here("bench_recipes.py", "--tables-of", str(tmp_path / "bad.json"))
    assert done.returncode == 2 and "cannot read" in done.stderr
