"""Runs that one process and two ranks do alike; as a script, what a rank does.

``torchrun --nproc-per-node 2 pretraining_ranks.py TEXT ONE TWO``: ONE is the folder of the runs of
one process, in TWO are those of the ranks.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pretrain
import pretrain_ranks
import pytest
import torch
import torch.distributed as dist
from prepare_text import Text, load_text
from pretrain_checkpoint import checkpoints
from pretrain_settings import Places, Run
from pretraining import PLAIN, RANDOM_RECIPE, tiny_run, tiny_size

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "mxfp8": {"recipe": "mxfp8", "norm": "mxnorm"},
    "random": RANDOM_RECIPE,
}


@contextmanager
def two_layers() -> Iterator[None]:
    with tiny_size(layers=2):
        yield


@contextmanager
def in_fp32() -> Iterator[None]:
    """Without autocast, so that one process and ranks differ in the order of fp32 sums alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.Training, "autocast", lambda training: nullcontext())
        yield


def run_of(name: str) -> Run:
    return tiny_run(**SETTINGS[name], evaluate_every=2, norms_every=6)


def train(name: str, text: Text, folder: Path) -> pretrain.Result:
    """With metrics, and checkpoints of the steps 3 and 6, the last."""
    places = Places(folder / f"{name}.jsonl", folder / name, checkpoint_every=3)
    return pretrain.train(run_of(name), text, places, progress=False)


def resume(name: str, text: Text, half_done: Path, folder: Path) -> pretrain.Result:
    """As if what is half done had been killed after its third step."""
    half = checkpoints(half_done / name)[0]
    assert half.step == 3
    if pretrain_ranks.is_first():
        (folder / name).mkdir(parents=True)
        shutil.copy(half.path, folder / name)
    # All ranks see the file from here on.
    if dist.is_initialized():
        dist.barrier()
    return train(name, text, folder)


def main(text_folder: Path, one: Path, two: Path) -> None:
    text = load_text(text_folder)
    with two_layers(), pretrain_ranks.joined(run_of("plain")):
        rows = pretrain_ranks.share(torch.arange(4)).tolist()
        assert rows == [[0, 1], [2, 3]][dist.get_rank()]
        with in_fp32():
            for name in ("plain", "mxfp8"):
                train(name, text, two / "whole")
            resume("mxfp8", text, one, two / "of_one")
        train("random", text, two / "whole")
        resume("random", text, two / "whole", two / "of_two")
        command_line(text_folder)


def command_line(text_folder: Path) -> None:
    """In the group that is there: torchrun's store serves one."""
    arguments = ["--text", str(text_folder), "--norm", "rmsnorm", "--recipe", "bf16"]
    arguments += ["--inner", "eager", "--device", "cpu", "--steps", "1", "--sequence", "32"]
    arguments += ["--batch", "2", "--held-out-rows", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_ranks, "joined", lambda run: nullcontext())
        assert pretrain.main(arguments) == 0


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
