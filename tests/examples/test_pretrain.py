"""Pre-training: text, runs that can be killed, arms, and what is made of them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plot_pretrain
import prepare_text
import pretrain
import pretrain_arms
import pytest
import torch
from checkpointlib import BadInput
from paths import EXAMPLES, ROOT
from pretrain_checkpoint import CheckpointError, checkpoints
from pretrain_metrics import read_lines
from pretrain_norms import measured
from pretrain_settings import SIZES, Places, Run, Size, backend_of, new_run
from tokenizers import Tokenizer

from mxnorm_pass import functional

RANDOM_RECIPE = {"recipe": "mxfp4-rht-sr", "norm": "mxnorm", "forward": "mxfp8"}
PLAIN = {"recipe": "bf16", "norm": "rmsnorm", "inner": "eager"}


def write_sources(folder: Path, files: int = 40) -> list[bytes]:
    """Small programs, whose words a model learns soon."""
    draw = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta", "total", "value"]
    contents = []
    folder.mkdir(parents=True)
    for i in range(files):
        lines = [
            f"def {draw.choice(names)}_{draw.randrange(30)}({draw.choice(names)}):\n"
            f"    return {draw.choice(names)} + {draw.randrange(100)}\n"
            for _ in range(40)
        ]
        contents.append("".join(lines).encode())
        (folder / f"file_{i}.py").write_bytes(contents[-1])
    return contents


def prepare(sources: Path, out: Path, *more: str) -> prepare_text.Provenance:
    arguments = [f"data={sources}", "--vocab-size", "320", "--held-out", "0.2", "--out", str(out)]
    return prepare_text.prepare(prepare_text.parse_args([*arguments, *more]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared text."""
    root = tmp_path_factory.mktemp("text")
    write_sources(root / "sources")
    prepare(root / "sources", root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    size = Size(64, 96, 1, 1, sequence=32, batch=4, steps=6, lr=1e-2, held_out_rows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", size)
        yield


@pytest.fixture(scope="module")
def whole(tiny, folder) -> pretrain.Result:
    """A run with a random recipe that nothing interrupted."""
    run = tiny_run(**RANDOM_RECIPE, log_every=2)
    return pretrain.train(run, prepare_text.load_text(folder), Places(), progress=False)


def tiny_run(**given: Any) -> Run:
    return new_run("tiny", **{"log_every": 1, **given})


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


# The text.


def test_tokens_hold_the_files_and_the_hash_is_theirs(tmp_path) -> None:
    contents = write_sources(tmp_path / "a")
    (tmp_path / "a" / "again.py").write_bytes(contents[0])
    (tmp_path / "a" / "latin.py").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "a" / "left.txt").write_text("no program")
    facts = prepare(tmp_path / "a", tmp_path / "out", "--licence", "data=MIT")
    text = prepare_text.load_text(tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    found = []
    for part in (text.train, text.val):
        assert part.dtype == np.uint16
        decoded = tokenizer.decode(part.tolist(), skip_special_tokens=False)
        found.append(decoded.split(prepare_text.END)[:-1])
    digests = sorted(hashlib.sha256(content).digest() for content in contents)
    assert text.sha256 == facts.sha256 == hashlib.sha256(b"".join(digests)).hexdigest()
    assert sorted([*found[0], *found[1]]) == sorted(c.decode() for c in contents)
    assert found[0] and found[1]
    assert (facts.duplicates, facts.not_text) == (1, 1)
    assert facts.tokens == {"train": len(text.train), "val": len(text.val)}
    (source,) = facts.sources
    assert (source.licence, source.files, source.bytes) == ("MIT", 40, sum(map(len, contents)))
    assert str(tmp_path) not in (tmp_path / "out" / "provenance.json").read_text()


def test_the_same_files_give_the_same_tokens_wherever_they_lie(tmp_path, folder) -> None:
    for i, content in enumerate(reversed(write_sources(tmp_path / "a"))):
        (tmp_path / "b" / str(i)).mkdir(parents=True)
        (tmp_path / "b" / str(i) / "moved.py").write_bytes(content)
    prepare(tmp_path / "b", tmp_path / "out")
    files = [path.name for path in folder.iterdir()]
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "no such folder: 'nowhere'"),
        (["--package", "no-such-package"], "no package 'no-such-package' is installed"),
        (["--package", "python", "--licence", "b=MIT"], "no such source; there are python"),
    ],
)
def test_sources_that_cannot_be(arguments: list[str], said: str, tmp_path, capsys) -> None:
    assert prepare_text.main([*arguments, "--pattern", "this.py", "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_too_little_text_says_which_vocabulary_it_gives(tmp_path, capsys) -> None:
    write_sources(tmp_path / "a", files=20)
    command = [str(tmp_path / "a"), "--vocab-size", "8192", "--held-out", "0.2"]
    assert prepare_text.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "give more text or --vocab-size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_text_that_is_missing_cut_or_damaged(tmp_path) -> None:
    with pytest.raises(BadInput, match="no prepared text in .*prepare_text.py"):
        prepare_text.load_text(tmp_path)
    write_sources(tmp_path / "a")
    prepare(tmp_path / "a", tmp_path / "out")
    train = tmp_path / "out" / "train.npy.xz"
    damage(train)
    with pytest.raises(BadInput, match="is damaged .*prepare_text.py anew"):
        prepare_text.load_text(tmp_path / "out")
    prepare_text.save_tokens(train, np.zeros(5, dtype=np.uint16))
    with pytest.raises(BadInput, match="are of two texts"):
        prepare_text.load_text(tmp_path / "out")


# Settings.


def test_arms_differ_in_backend_options_alone() -> None:
    exact, ours = (
        backend_of(new_run("nano", norm, "mxfp8", device="cpu")) for norm in ("rmsnorm", "mxnorm")
    )
    assert exact.backend is ours.backend
    assert exact.options["modules"] == {"lm_head": False}
    assert exact.options["quantize"] == "all"
    assert {**exact.options, "estimator": "mxnorm"} == ours.options
    with_forward = backend_of(new_run("nano", **RANDOM_RECIPE))
    assert with_forward.options["recipe"] == {"base": "mxfp4-rht-sr", "forward": "mxfp8"}
    assert backend_of(new_run("nano", "rmsnorm", "bf16", inner="inductor")).backend == "inductor"
    assert "recipe" not in backend_of(new_run("nano", "mxnorm", "none")).options


@pytest.mark.parametrize(
    "given, said",
    [
        ({"recipe": "mxfp4-sr"}, "no maxima to take: add forward mxfp8"),
        ({"recipe": "bf16"}, "use norm rmsnorm"),
        ({"recipe": "mxfp5"}, "Allowed: 'mxfp8'"),
        ({"recipe": '{"forward": "mxfp8"'}, "Expecting"),
        ({"lr": float("nan")}, "lr nan: give a number above 0"),
        ({"steps": 5, "warmup": 5}, "warmup 5: give 0 to 4"),
        ({"size": "huge"}, "choose nano"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        new_run(**{"size": "nano", "norm": "mxnorm", "recipe": "mxfp8", **given})


def test_the_learning_rate_rises_and_falls_to_a_tenth() -> None:
    run = new_run("nano", "mxnorm", "mxfp8", tokens=1024 * 1000 - 5, lr=1.0)
    assert (run.steps, run.warmup, run.tokens_per_step) == (1000, 100, 1024)
    rates = [run.learning_rate(step) for step in range(run.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[99] == rates[100] == 1.0
    assert rates[550] == pytest.approx(0.55)
    assert 0.1 <= rates[-1] < 0.1001
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_each_epoch_reads_every_row_once() -> None:
    order = pretrain.Order(rows=6, batch=4, seed=0)
    read = torch.cat([order(step) for step in range(6)]).tolist()
    epochs = [read[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    # The position alone decides.
    assert pretrain.Order(6, 4, 0)(4).tolist() == read[16:20]
    assert torch.cat([pretrain.Order(6, 4, 1)(step) for step in range(6)]).tolist() != read


def test_statistics_of_what_norms_read() -> None:
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    ratio, spread, kurtosis = measured(x, 2.0).tolist()
    assert ratio == pytest.approx(1, abs=0.01) and spread < 0.02
    assert kurtosis == pytest.approx(3, abs=0.1)
    x[:, 0] = 1e4
    ratio, _, kurtosis = measured(x, 2.0).tolist()
    # One of a block's 32 elements holds the energy that the estimate expects in all of them.
    assert ratio == pytest.approx(functional.rms_constant(2.0, 32) / 32**0.5, rel=0.01)
    assert kurtosis == pytest.approx(4096, rel=0.01)


# Runs.


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


# Arms.


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


# What is made of them.


def write_run(folder: Path, recipe: str, norm: str, seed: int, loss: float | None) -> None:
    run = new_run("30m", norm, recipe, seed=seed, device="cpu")
    header = {"kind": "run", "run": vars(run), "text": "0", "machine": {}, "parameters": 30_000_000}
    steps = [{"kind": "step", "step": i, "loss": 700.0 - i + seed} for i in range(2, 701, 2)]
    end = {"kind": "diverged", "step": 700, "error": "loss nan"}
    if loss is not None:
        numbers = {"tokens_per_s": 100.0 + seed, "peak_memory_bytes": 2**30, "seconds": 1.0}
        end = {"kind": "end", "step": 700, "loss": loss, "held_out_tokens": 64, **numbers}
    content = "".join(json.dumps(line) + "\n" for line in (header, *steps, end))
    (folder / f"{recipe}_{norm}_{seed}.jsonl").write_text(content)


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
