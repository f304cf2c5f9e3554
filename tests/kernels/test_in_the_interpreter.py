"""Runs the tests of the Triton kernels in Triton's interpreter, in processes of their own.

Triton decides at its import whether it interprets, so this cannot happen in one process with tests
that compile. Where there is a GPU that the kernels support, pytest also collects tests/kernels
itself and runs them compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import PACKAGE, ROOT, TESTS

INTERPRETED = TESTS / "kernels" / "interpreted"
FILES = sorted(INTERPRETED.glob("test_*.py"))


def test_in_the_interpreter() -> None:
    interpret(INTERPRETED, "not full")


@pytest.mark.full
def test_in_the_interpreter_what_only_the_full_run_takes() -> None:
    interpret(INTERPRETED, "full")


def interpret(path: Path, marked: str) -> None:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-m", marked, str(path)],
        env=environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    output = (result.stdout + result.stderr)[-8000:]
    assert result.returncode == 0, output
    assert re.search(r"\b[1-9]\d* passed", result.stdout), output
    assert "skipped" not in result.stdout, output


def test_every_kernel_has_tests() -> None:
    kernels = PACKAGE / "kernels"
    with_kernels = {p.stem for p in kernels.glob("*.py") if "_kernel(" in p.read_text()}
    assert with_kernels <= {path.stem.removeprefix("test_") for path in FILES}
