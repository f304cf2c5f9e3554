"""examples/pretrain_arms.py and plot_pretrain.py: many runs, and what they amount to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import plot_pretrain
import prepare_text
import pretrain_arms
import pytest
from checkpointlib import BadInput
from pretrain_metrics import read_lines
from pretrain_settings import Places
from pretraining import PLAIN, prepared, tiny_run, tiny_size, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared text."""
    return prepared(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    with tiny_size():
        yield


def test_arms_are_read_and_written_alike() -> None:
    text = "mxfp4-rht-sr/mxnorm/forward=mxfp8/lr=0.002/seed=1"
    arm = pretrain_arms.Arm.parse("mxfp4-rht-sr/mxnorm/lr=2e-3/seed=1/forward=mxfp8")
    assert str(arm) == text and pretrain_arms.Arm.parse(text) == arm
    run = arm.run("30m", {"lr": 0.5, "steps": 7})
    assert (run.lr, run.seed, run.forward, run.steps) == (0.002, 1, "mxfp8", 7)
    with pytest.raises(BadInput, match="give recipe/norm"):
        pretrain_arms.Arm.parse("mxfp8")
    with pytest.raises(BadInput, match="'speed=3' is no setting; give key=value of lr"):
        pretrain_arms.Arm.parse("mxfp8/mxnorm/speed=3")
    with pytest.raises(BadInput, match="seed takes int, not 'x'"):
        pretrain_arms.Arm.parse("mxfp8/mxnorm/seed=x")


def test_the_set_of_recipes_has_all_of_seed_0_first() -> None:
    arms = pretrain_arms.recipe_arms()
    seeds = [dict(arm.settings)["seed"] for arm in arms]
    assert seeds == [0] * 13 + [1] * 13
    kinds = {(arm.recipe, arm.norm, dict(arm.settings).get("forward")) for arm in arms}
    assert len(kinds) == 13
    for recipe, _, forward in kinds:
        assert forward == ("mxfp8" if recipe.startswith("mxfp4") else None)
    assert all(arm.run("30m", {}).steps for arm in arms)
    assert len({arm.file_name for arm in arms}) == 26


@pytest.mark.full
def test_arms_run_once_and_a_second_command_skips_them(folder, tmp_path, capsys) -> None:
    arms = [f"bf16/rmsnorm/seed={seed}" for seed in range(3)]
    shape = ["--size", "nano", "--batch", "1", "--sequence", "32", "--steps", "2"]
    command = ["--text", str(folder), "--out", str(tmp_path / "arms"), *shape]
    command += ["--held-out-rows", "1", "--inner", "eager", "--workers", "2", "--device", "cpu"]
    command += ["--arms", *arms]
    assert pretrain_arms.main([*command, "--time-limit", "0"]) == 0
    assert capsys.readouterr().out.count("not finished") == 3
    assert not (tmp_path / "arms").exists()
    (tmp_path / "arms").mkdir()
    files = [tmp_path / "arms" / f"bf16_rmsnorm_seed={seed}.jsonl" for seed in range(3)]
    write_run(tmp_path, "bf16", "rmsnorm", 0, 7.5)
    (tmp_path / "bf16_rmsnorm_0.jsonl").rename(files[0])
    # One that was stopped.
    files[1].write_text(files[0].read_text()[:5000])
    finished = files[0].read_bytes()
    assert pretrain_arms.main(command) == 0
    out = capsys.readouterr().out
    assert "3 arms, 1 finished before" in out and "7.5000" in out
    assert files[0].read_bytes() == finished
    losses = [read_lines(path)[-1]["loss"] for path in files[1:]]
    assert losses[0] != losses[1]
    for loss in losses:
        assert f"held-out loss {loss:.4f}" in out
    contents = [path.read_bytes() for path in files]
    assert pretrain_arms.main(command) == 0
    out = capsys.readouterr().out
    assert "3 arms, 3 finished before" in out and "held-out loss" not in out
    assert [path.read_bytes() for path in files] == contents


def test_an_arm_that_fails_is_told_and_no_other_is_lost(tiny, folder, tmp_path) -> None:
    text = prepare_text.load_text(folder)
    run = tiny_run(**PLAIN, held_out_rows=2)
    outcome = pretrain_arms.perform(pretrain_arms.Task("arm", run, Places()), text)
    assert outcome.failed and "hold out more text" in outcome.text


def test_summary_table_and_plot(tmp_path, capsys) -> None:
    write_run(tmp_path, "bf16", "rmsnorm", 0, 2.0)
    for seed in (0, 1):
        write_run(tmp_path, "mxfp8", "rmsnorm", seed, 2.5 + 0.5 * seed)
        write_run(tmp_path, "mxfp8", "mxnorm", seed, 3.0 if seed else None)
    (tmp_path / "cut.jsonl").write_text('{"kind": "run"}\n')
    command = [str(tmp_path), "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "p.png")]
    assert plot_pretrain.main(command) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        ["bf16", "RMSNorm", "2.0000", "1", "", "", "", "100", "1.00"],
        ["mxfp8", "RMSNorm", "2.7500", "2", "0.5000", "+0.7500", "", "100", "1.00"],
        ["mxfp8", "MXNorm", "3.0000", "1, 1 diverged", "", "+1.0000", "+0.2500", "101", "1.00"],
    ]
    summary = json.loads((tmp_path / "s.json").read_text())
    _, exact, ours = summary["arms"]
    assert exact["held_out"] == {"0": 2.5, "1": 3.0} and ours["diverged"] == {"0": "loss nan"}
    curve = exact["curve"]
    # 350 points in groups of 4, each at its last step; the mean of two seeds.
    assert len(curve["steps"]) == len(curve["loss"]) == 88
    assert (curve["steps"][0], curve["loss"][0]) == (8, 700 - 5 + 0.5)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared(tmp_path, capsys) -> None:
    assert plot_pretrain.main([str(tmp_path)]) == 2
    assert "run examples/pretrain_arms.py" in capsys.readouterr().err
    write_run(tmp_path, "bf16", "rmsnorm", 0, 2.0)
    write_run(tmp_path, "bf16", "rmsnorm", 1, 2.0)
    path = tmp_path / "bf16_rmsnorm_1.jsonl"
    path.write_text(path.read_text().replace('"steps": 700', '"steps": 600'))
    assert plot_pretrain.main([str(tmp_path)]) == 2
    assert "runs of several steps" in capsys.readouterr().err
