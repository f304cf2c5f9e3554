"""The example scripts at tiny sizes: in this process, or as a user runs them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from paths import EXAMPLES
from run_examples import run_example, run_example_here


def losses_of(arm: str, output: str) -> list[float]:
    """First and last loss, from the line that ends the arm's training."""
    (line,) = re.findall(rf"^  {arm} +(\S+) (\S+)  \(\d+ norms fused", output, re.M)
    return [float(loss) for loss in line]


def llama(layers: int) -> list[str]:
    sizes = ["--layers", str(layers), "--hidden", "64", "--tokens", "32", "--device", "cpu"]
    return ["llama.py", *sizes, "--inner", "aot_eager"]


def check_llama(done: CompletedProcess[str], layers: int) -> None:
    assert done.returncode == 0, done.stderr
    norms = 2 * layers + 1
    assert f"inference_0: {norms} norms, {2 * layers} fused, 1 skipped" in done.stdout
    of_layers = "{0, 1}" if layers == 2 else "0"
    assert f"fused    model.layers.{of_layers}.post_attention_layernorm" in done.stdout
    assert "CalibrationWarning" not in done.stderr
    estimate, casts, both = (
        float(error) for error in re.findall(r"(?:baseline|model) +(\d\.\d{4})$", done.stdout, re.M)
    )
    assert 0 < casts < estimate < 0.5
    assert 0 < both < 0.5


@pytest.mark.full
def test_llama_reports_errors_and_times() -> None:
    check_llama(run_example_here(*llama(1)), 1)


@pytest.mark.full
def test_llama_reports_errors_times_and_losses() -> None:
    layers = 2
    done = run_example(*llama(layers), "--train", "2")
    check_llama(done, layers)
    assert done.stdout.count(f"({2 * layers} norms fused, 1 skipped)") == 2
    for arm in ("mxnorm", "exact"):
        assert all(map(math.isfinite, losses_of(arm, done.stdout)))


def test_llama_refuses_a_wrong_model_path(tmp_path: Path) -> None:
    missing = str(tmp_path / "no_such_checkpoint")
    done = run_example_here("llama.py", "--model", missing)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"llama.py: cannot load {missing!r}: no such folder"


def test_llama_refuses_a_wrong_option() -> None:
    done = run_example_here("llama.py", "--p", "-1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("llama.py: ")


@pytest.mark.full
@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_pass_time_saves_rows_that_grow(tmp_path: Path, format: str) -> None:
    path = tmp_path / "rows.json"
    sizes = ["--layers", "1", "2", "--inner", "aot_eager", "--format", format]
    done = run_example_here("pass_time.py", *sizes, "--json", str(path))
    assert done.returncode == 0, done.stderr
    entry = json.loads(path.read_text())
    assert entry["torch"] and f"--format {format}" in entry["command"]
    assert entry["format"] == format and f"{format} casts" in done.stdout
    one, two = entry["rows"]
    assert (one["layers"], two["layers"]) == (1, 2)
    assert (one["fused"], two["fused"]) == (2, 4)
    assert 0 < one["nodes"] < two["nodes"]
    assert one["pass_seconds"] > 0
    assert one["growth"] is None and two["growth"] > 0
    assert "share" in done.stdout


def test_pass_time_converts_linears_to_mxfp8_alone() -> None:
    done = run_example_here("pass_time.py", "--converted", "--format", "nvfp4")
    assert done.returncode == 2
    assert done.stderr.endswith("error: --converted casts to mxfp8, not to nvfp4\n")


@pytest.mark.full
def test_explain_cost_saves_what_both_runs_take(tmp_path: Path) -> None:
    config, path = tmp_path / "tiny.json", tmp_path / "rows.json"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    config.write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    done = run_example("explain_cost.py", "--model", str(config), "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["config"], row["training"]) for row in rows] == [("tiny", False), ("tiny", True)]
    # Importing torch alone takes that much.
    assert all(row["cpu_seconds"] > 1 and 100 < row["peak_memory"] < 4096 for row in rows)


@pytest.mark.full
def test_explain_cost_tells_of_a_run_that_fails(tmp_path: Path) -> None:
    config, path = tmp_path / "broken.json", tmp_path / "rows.json"
    config.write_text("{}")
    done = run_example_here("explain_cost.py", "--model", str(config), "--json", str(path))
    assert done.returncode == 1 and not path.exists()
    assert "broken.json" in done.stderr and "Traceback" not in done.stderr


def test_calibrate_refuses_text_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "book.txt")
    done = run_example_here(
        "calibrate.py", "--calibration-text", missing, "--evaluation-text", missing
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"calibrate.py: no such file or folder: {missing!r}"


def test_calibrate_wants_both_texts() -> None:
    done = run_example_here("calibrate.py", "--calibration-text", "book.txt")
    assert done.returncode == 2
    assert "give both texts or neither: they must not overlap" in done.stderr


@pytest.mark.full
def test_quickstart_is_short_and_shows_what_it_says() -> None:
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 25
    done = run_example("quickstart.py")
    assert done.returncode == 0, done.stderr
    compiled, explained = done.stdout.split("mxnorm: training_0: ")[1:]
    assert compiled.startswith("4 norms, 4 fused, 0 skipped\n")
    assert "  fused    {1..3}.norm -> .up (mxnorm, fold," in compiled
    assert explained.startswith("4 norms, 3 fused, 1 skipped\n")
    assert "  skipped  0.norm: DISABLED: " in explained
    assert "  fused    3.norm -> 3.up (exact, " in explained
