"""Checkpoints of a pre-training run that appear whole or not at all, and say when they are damaged.

A checkpoint is one file, ``step-00000100-<hash>.pt``: the hash, the first half of its SHA-256, is
checked before it is loaded. The last two are kept.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_KEPT = 2
_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{32})\.pt")


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A file that was written whole."""

    path: Path
    step: int
    digest: str


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Those of a folder, the newest last."""
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("step-*.pt"))
    named = [Checkpoint(path, int(m[1]), m[2]) for path, m in found if m]
    return sorted(named, key=lambda checkpoint: checkpoint.step)


def save(folder: Path, step: int, state: dict[str, Any]) -> Checkpoint:
    """Write a checkpoint, then remove all but the last two.

    Raises:
        CheckpointError: it cannot be written, on a full disk for example; the older ones stay.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draft.", dir=folder) as drafts:
            draft = Path(drafts) / "draft.pt"
            with draft.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            digest = digest_of(draft)
            saved = Checkpoint(folder / f"step-{step:08d}-{digest}.pt", step, digest)
            os.replace(draft, saved.path)
    # torch's writer turns an OSError into a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(_cannot_write(folder, step, error)) from error
    for old in checkpoints(folder)[:-_KEPT]:
        old.path.unlink()
    return saved


def _cannot_write(folder: Path, step: int, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    kept = checkpoints(folder)
    last = (
        f"the last good one, of step {kept[-1].step}, is kept" if kept else "there is no older one"
    )
    free = shutil.disk_usage(folder).free / 2**20 if folder.is_dir() else 0.0
    return (
        f"cannot write the checkpoint of step {step} to {str(folder)!r} ({reason}; "
        f"{free:.0f} MiB free): {last}. Make room, then run the same command again to resume."
    )


def load_newest(folder: Path, device: str) -> dict[str, Any] | None:
    """The state of the newest checkpoint; None: there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        if digest_of(newest.path) != newest.digest:
            raise CheckpointError(_damaged(found, "its SHA-256 is not that of its name"))
        state: dict[str, Any] = torch.load(newest.path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(_damaged(found, str(error).splitlines()[0])) from error
    return state


def _damaged(found: list[Checkpoint], reason: str) -> str:
    newest = found[-1]
    other = f"resume from step {found[-2].step}" if len(found) > 1 else "start anew"
    return f"the checkpoint {str(newest.path)!r} is damaged ({reason}): delete it to {other}"


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
