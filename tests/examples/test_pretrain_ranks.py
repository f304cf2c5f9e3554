"""examples/pretrain_ranks.py: two ranks under torchrun, over gloo, are one process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pretrain_ranks
import pytest
import torch
from checkpointlib import BadInput
from paths import EXAMPLES, LIB, ROOT
from prepare_text import load_text
from pretrain_checkpoint import checkpoints, load_newest
from pretrain_metrics import Line, read_lines
from pretrain_settings import new_run
from pretraining import PLAIN, prepared
from pretraining_ranks import in_fp32, resume, train, two_layers
from torch import Tensor


@dataclass(frozen=True)
class Bound:
    """Of relative differences: of losses, gradient norms, and each weight's change in its norm."""

    loss: float
    gradient: float
    weight: float


BOUNDS = {
    # fp32 sums in another order: 2e-7 of a loss, as when one process reads a batch's rows in
    # reverse. AdamW's steps do not shrink with a gradient, so that weights differ by more: 1e-5.
    "plain": Bound(1e-6, 1e-5, 1e-4),
    # At some step a sum that is another in its last bit rounds to the other neighbour in MXFP8,
    # also in one process that begins with such sums. Until then losses differ as above, then by
    # 1e-4, gradient norms by 1e-3, weights by 5e-4.
    "mxfp8": Bound(1e-3, 1e-2, 5e-3),
}


@dataclass(frozen=True)
class Runs:
    """Folders of runs, and what the ranks printed."""

    text: Path
    one: Path
    two: Path
    printed: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("ranks")
    text = prepared(root / "text")
    one, two = root / "one", root / "two"
    with two_layers(), in_fp32():
        for name in ("plain", "mxfp8"):
            train(name, load_text(text), one)
    return Runs(text, one, two, ranks_trained(text, one, two))


def ranks_trained(text: Path, one: Path, two: Path) -> str:
    """What the ranks printed."""
    paths = os.pathsep.join(map(str, (ROOT, EXAMPLES, LIB)))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(LIB / "pretraining_ranks.py")]
    arguments = [*command, str(text), str(one), str(two)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(arguments, env=env, stdout=pipe, stderr=pipe, text=True)
    try:
        printed, errors = process.communicate(timeout=240)
    finally:
        # Which torchrun, unlike a kill, passes on to the ranks.
        process.terminate()
    assert process.returncode == 0, errors[-5000:]
    return printed


def steps(path: Path) -> list[Line]:
    return [line for line in read_lines(path) if line["kind"] == "step"]


def weights(folder: Path) -> dict[str, Tensor]:
    """Of the last step."""
    assert checkpoints(folder)[-1].step == 6
    state = load_newest(folder, "cpu")
    assert state is not None
    found: dict[str, Tensor] = state["model"]
    return found


def assert_steps_close(got: list[Line], want: list[Line], bound: Bound) -> None:
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for g, w in zip(got, want, strict=True):
        assert g["lr"] == w["lr"]
        assert g["loss"] == pytest.approx(w["loss"], rel=bound.loss)
        assert g["gradient_norm"] == pytest.approx(w["gradient_norm"], rel=bound.gradient)


def assert_weights_close(got: Path, want: Path, tolerance: float) -> None:
    ours, theirs = weights(got), weights(want)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= tolerance * weight.norm(), name


def assert_second_half_close(resumed: Path, runs: Runs) -> None:
    """Of the run with casts, to that of one process."""
    bound, whole = BOUNDS["mxfp8"], steps(runs.one / "mxfp8.jsonl")
    assert_steps_close(steps(resumed / "mxfp8.jsonl"), whole[3:], bound)
    assert_weights_close(resumed / "mxfp8", runs.one / "mxfp8", bound.weight)


@pytest.mark.full
@pytest.mark.parametrize("name", BOUNDS)
def test_two_ranks_are_one_process(name: str, runs: Runs) -> None:
    one, two = runs.one / f"{name}.jsonl", runs.two / "whole" / f"{name}.jsonl"
    got, want, bound = read_lines(two), read_lines(one), BOUNDS[name]
    assert [line["kind"] for line in got] == [line["kind"] for line in want]
    assert (got[0]["ranks"], want[0]["ranks"]) == (2, 1)
    assert_steps_close(steps(two), steps(one), bound)
    for kind in ("held_out", "end"):
        ours, theirs = ([x["loss"] for x in lines if x["kind"] == kind] for lines in (got, want))
        assert ours == pytest.approx(theirs, rel=bound.loss)
    ratios, expected = norms_of(got), norms_of(want)
    assert len(expected) == 5 and ratios == pytest.approx(expected, rel=bound.loss)
    assert_weights_close(runs.two / "whole" / name, runs.one / name, bound.weight)


def norms_of(lines: list[Line]) -> dict[str, float]:
    (norms,) = [line["norms"] for line in lines if line["kind"] == "norms"]
    return {norm["name"]: norm["ratio"] for norm in norms}


@pytest.mark.full
def test_ranks_cast_what_one_process_casts(runs: Runs) -> None:
    """The first loss, of equal weights, tells the arms apart."""
    plain, cast = (steps(runs.one / f"{name}.jsonl")[0]["loss"] for name in BOUNDS)
    ranks = steps(runs.two / "whole" / "mxfp8.jsonl")[0]["loss"]
    assert abs(ranks - cast) < abs(plain - cast) / 10


@pytest.mark.full
def test_one_process_resumes_what_two_ranks_wrote(runs: Runs, tmp_path: Path) -> None:
    with two_layers(), in_fp32():
        resume("mxfp8", load_text(runs.text), runs.two / "whole", tmp_path)
    assert_second_half_close(tmp_path, runs)


@pytest.mark.full
def test_two_ranks_resume_what_one_process_wrote(runs: Runs) -> None:
    assert_second_half_close(runs.two / "of_one", runs)


@pytest.mark.full
def test_ranks_resume_with_every_bit(runs: Runs) -> None:
    """With a random recipe, whose draws go on where they were."""
    whole, resumed = runs.two / "whole", runs.two / "of_two"
    lines, half = steps(whole / "random.jsonl"), steps(resumed / "random.jsonl")
    assert_steps_close(half, lines[3:], Bound(0, 0, 0))
    assert_weights_close(resumed / "random", whole / "random", 0)


@pytest.mark.full
def test_one_rank_speaks(runs: Runs) -> None:
    assert runs.printed.count("held-out loss") == 1


@pytest.mark.parametrize(
    "device, gpus, ranks, said",
    [
        ("cpu", 0, 3, "batch of 8 rows cannot be split evenly over 3 ranks: give --batch a multi"),
        ("cuda", 1, 2, "2 ranks on a machine where torch finds 1 GPUs.* use --nproc-per-node 1"),
        ("cuda:1", 2, 2, "each rank takes a GPU of its own; use device cuda"),
    ],
)
def test_ranks_that_cannot_be(
    device: str, gpus: int, ranks: int, said: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    run = new_run("nano", **PLAIN, device=device)
    with pytest.raises(BadInput, match=said):
        pretrain_ranks.check(run, ranks, ranks)
    if gpus:
        pretrain_ranks.check(new_run("nano", **PLAIN, device="cuda"), 4, gpus)


def test_ranks_that_see_other_checkpoints(monkeypatch: Any) -> None:
    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, None]

    monkeypatch.setattr(pretrain_ranks, "count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    pretrain_ranks.check_same_step(None)
    with pytest.raises(BadInput, match=r"steps \[3, None\]: give --checkpoint a folder that all"):
        pretrain_ranks.check_same_step(3)
