"""The JSONL file of a pre-training run: one line of settings, one for each logged step, one end.

Every line has a "kind": "run" is the first, then "step", "held_out" and "norms", "resumed" where a
killed run went on, and last "end", or "diverged" where the loss was not finite. A file without one
of the last two is of a run that did not finish.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from checkpointlib import BadInput

from mxnorm_pass.files import write_text

LAST_KINDS = ("end", "diverged")
Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a file; a last one that was cut off is left out. No file: no lines."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return list(_parsed(text.splitlines()))


def _parsed(lines: list[str]) -> Iterator[Line]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def is_finished(lines: list[Line]) -> bool:
    return bool(lines) and lines[-1].get("kind") in LAST_KINDS


class Metrics:
    """Lines that are kept in memory and, if there is a file, appended to it as they come."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._file: IO[str] | None = None

    def start(self, header: Line, resume_at: int) -> None:
        """Begin with the header or, resuming, with the file's own lines up to that step.

        Raises:
            BadInput: the file holds a finished run.
            OSError: it cannot be written.
        """
        old = read_lines(self.path) if self.path else []
        if is_finished(old):
            raise BadInput(
                f"{str(self.path)!r} holds a finished run: name another file, or delete it"
            )
        if resume_at and old:
            self.lines = [old[0], *(line for line in old[1:] if line["step"] <= resume_at)]
            self.lines.append({**header, "kind": "resumed", "step": resume_at})
        else:
            self.lines = [header]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
            self._file = self.path.open("a")

    def add(self, kind: str, step: int, **values: Any) -> None:
        line = {"kind": kind, "step": step, **values}
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def of(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line["kind"] == kind]
