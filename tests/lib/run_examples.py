"""Run the scripts of ``examples``."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from paths import EXAMPLES


def run_example(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    # Two threads and no network, whatever the machine has.
    env = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    command = [sys.executable, str(EXAMPLES / script), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def run_example_here(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The same within this process, which has imported torch already."""
    command, code = [str(EXAMPLES / script), *args], 0
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}),
        mock.patch.object(sys, "argv", command),
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as exit:
            code = exit.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
