"""examples/pretrain.py: runs that can be killed at any step."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import prepare_text
import pretrain
import pytest
import torch
from checkpointlib import BadInput
from paths import EXAMPLES, ROOT
from pretrain_checkpoint import CheckpointError, checkpoints
from pretrain_metrics import read_lines
from pretrain_settings import Places, Run
from pretraining import PLAIN, RANDOM_RECIPE, damage, prepared, tiny_run, tiny_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared text."""
    return prepared(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    with tiny_size():
        yield


@pytest.fixture(scope="module")
def whole(tiny, folder) -> pretrain.Result:
    """A run with a random recipe that nothing interrupted."""
    run = tiny_run(**RANDOM_RECIPE, log_every=2)
    return pretrain.train(run, prepare_text.load_text(folder), Places(), progress=False)


def losses(lines: Any) -> list[tuple[int, float, float]]:
    """All that must repeat of the logged steps, every bit of it."""
    steps = (line for line in lines if line["kind"] == "step")
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in steps]


class Killed(BaseException):
    """As a process ends that nothing can catch."""


def kill_after(monkeypatch, step: int) -> None:
    original = pretrain.Training.train_step

    def train_step(training: pretrain.Training) -> None:
        if training.step == step:
            raise Killed
        original(training)

    monkeypatch.setattr(pretrain.Training, "train_step", train_step)


@pytest.mark.full
def test_a_killed_run_resumes_with_every_bit(whole, folder, tmp_path, monkeypatch) -> None:
    text, run = prepare_text.load_text(folder), whole.run
    places = Places(tmp_path / "metrics.jsonl", tmp_path / "checkpoint", checkpoint_every=3)
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            pretrain.train(run, text, places, progress=False)
    # The line of step 4 is of the time after the checkpoint, and the next was cut off.
    with places.metrics.open("a") as file:
        file.write('{"kind": "st')
    assert [line["step"] for line in read_lines(places.metrics)[1:]] == [2, 4]
    resumed = pretrain.train(run, text, places, progress=False)
    assert losses(resumed.steps) == losses(whole.steps)
    assert [step for step, *_ in losses(resumed.steps)] == [2, 4, 6]
    assert resumed.held_out == whole.held_out
    lines = read_lines(places.metrics)
    assert [line["kind"] for line in lines] == ["run", "step", "resumed", "step", "step", "end"]
    assert lines[0]["run"]["recipe"] == "mxfp4-rht-sr" and lines[0]["command"]
    # Other draws give other losses, so that equal ones say something.
    checkpoints(places.checkpoint)[-1].path.unlink()
    monkeypatch.setattr(torch, "set_rng_state", lambda state: torch.manual_seed(123))
    other = pretrain.train(run, text, replace(places, metrics=None), progress=False)
    assert losses(other.steps)[-1] != losses(whole.steps)[-1]


@pytest.mark.full
def test_looking_does_not_disturb(whole, folder, tmp_path) -> None:
    text, places = prepare_text.load_text(folder), Places(tmp_path / "metrics.jsonl")
    run = replace(whole.run, evaluate_every=1, norms_every=3)
    seen = pretrain.train(run, text, places, progress=False)
    assert losses(seen.steps) == losses(whole.steps)
    assert seen.held_out == whole.held_out
    lines = read_lines(places.metrics)
    assert [line["step"] for line in lines if line["kind"] == "held_out"] == [1, 2, 3, 4, 5]
    (_, norms) = [line["norms"] for line in lines if line["kind"] == "norms"]
    assert [norm["name"] for norm in norms] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.norm",
    ]
    assert all(0.3 < norm["ratio"] < 3 and norm["kurtosis"] > 1 for norm in norms)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads, and two processes with one each are faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.full
def test_nano_learns_and_survives_a_kill(one_thread, folder, tmp_path) -> None:
    """The command line, ended by a signal that no program can catch."""
    text = prepare_text.load_text(folder)
    arguments = ["--text", str(folder), "--batch", "2", "--sequence", "64", "--steps", "16"]
    arguments += ["--held-out-rows", "8", "--log-every", "1", "--checkpoint-every", "6"]
    arguments += ["--device", "cpu", "--metrics", str(tmp_path / "m.jsonl")]
    arguments += ["--checkpoint", str(tmp_path / "c")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), *arguments]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    args = pretrain.parse_args(arguments)
    whole = pretrain.train(pretrain.run_of(args), text, Places(), progress=False)
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path / "c") and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert pretrain.main(arguments) == 0
    lines = read_lines(tmp_path / "m.jsonl")
    assert "resumed" in [line["kind"] for line in lines]
    assert losses(lines) == losses(whole.steps)
    assert lines[-1]["loss"] == whole.held_out
    assert losses(lines)[0][1] > 5 and whole.held_out < 4


@pytest.fixture
def saved(tiny, folder, tmp_path) -> tuple[Run, prepare_text.Text, Places]:
    """A run of 6 steps that has checkpoints of the steps 4 and 6."""
    run, text = tiny_run(**PLAIN), prepare_text.load_text(folder)
    places = Places(checkpoint=tmp_path / "c", checkpoint_every=2)
    pretrain.train(run, text, places, progress=False)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "c")] == [4, 6]
    return run, text, places


@pytest.mark.full
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(saved) -> None:
    run, text, places = saved
    newest = checkpoints(places.checkpoint)[-1].path
    damage(newest)
    with pytest.raises(CheckpointError, match=f"{newest.name}.*delete it to resume from step 4"):
        pretrain.train(run, text, places, progress=False)
    newest.unlink()
    result = pretrain.train(run, text, places, progress=False)
    assert [step for step, *_ in losses(result.steps)] == [5, 6]


@pytest.mark.full
def test_a_checkpoint_of_other_settings_is_refused(saved) -> None:
    run, text, places = saved
    with pytest.raises(BadInput, match="of another run .lr: 0.01 there, 0.5 here.*another folder"):
        pretrain.train(replace(run, lr=0.5), text, places, progress=False)
    with pytest.raises(BadInput, match="text: "):
        pretrain.train(run, replace(text, sha256="0"), places, progress=False)


@pytest.mark.full
def test_a_full_disk_leaves_the_last_checkpoint(tiny, folder, tmp_path, monkeypatch) -> None:
    """A limit on the size of files is what a full disk is to a process."""
    run, text = tiny_run(**PLAIN), prepare_text.load_text(folder)
    places = Places(checkpoint=tmp_path / "c", checkpoint_every=2)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = pretrain.save

    def save(folder: Path, step: int, state: dict[str, Any]) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old[0] if step < 4 else 2**14, old[1]))
        try:
            return original(folder, step, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    monkeypatch.setattr(pretrain, "save", save)
    with pytest.raises(CheckpointError, match="step 4 .*of step 2, is kept. Make room"):
        pretrain.train(run, text, places, progress=False)
    assert [path.name[:13] for path in places.checkpoint.iterdir()] == ["step-00000002"]


@pytest.mark.full
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_no_number_replaces_no_checkpoint(
    broken: str, tiny, folder, tmp_path, monkeypatch
) -> None:
    text = prepare_text.load_text(folder)
    run = tiny_run(**PLAIN, log_every=6)
    places = Places(tmp_path / "m.jsonl", tmp_path / "c", checkpoint_every=2)
    original = pretrain.Training.loss

    def loss(training: pretrain.Training, rows: torch.Tensor) -> torch.Tensor:
        value = original(training, rows)
        if training.step != 3:
            return value
        # The square root has no gradient at 0.
        return value * float("nan") if broken == "loss" else value + (value - value).sqrt()

    monkeypatch.setattr(pretrain.Training, "loss", loss)
    with pytest.raises(pretrain.Diverged, match="nan at step 4: try a lower --lr.*is kept"):
        pretrain.train(run, text, places, progress=False)
    assert [checkpoint.step for checkpoint in checkpoints(places.checkpoint)] == [2]
    last = read_lines(places.metrics)[-1]
    assert last["kind"] == "diverged" and "step 4" in last["error"]


@pytest.mark.full
def test_a_finished_run_is_not_overwritten_and_a_late_one_is_not_finished(
    tiny, folder, tmp_path
) -> None:
    text, run = prepare_text.load_text(folder), tiny_run(**PLAIN)
    places = Places(tmp_path / "m.jsonl", deadline=time.time())
    with pytest.raises(pretrain.OutOfTime, match="step 1 of 6"):
        pretrain.train(run, text, places, progress=False)
    places = replace(places, deadline=None)
    pretrain.train(run, text, places, progress=False)
    before = places.metrics.read_bytes()
    assert losses(read_lines(places.metrics))[-1][0] == 6
    with pytest.raises(BadInput, match="holds a finished run"):
        pretrain.train(run, text, places, progress=False)
    assert places.metrics.read_bytes() == before


def test_too_little_held_out_text_says_so(tiny, folder) -> None:
    text = prepare_text.load_text(folder)
    with pytest.raises(BadInput, match="a batch has 4: hold out more text"):
        pretrain.Training(tiny_run(**PLAIN), replace(text, val=text.val[:70]))
