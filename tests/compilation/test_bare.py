"""A compile needs torch alone; what needs more says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT

EXTRAS = ("transformers", "torchao", "scipy", "tqdm", "safetensors", "matplotlib", "rich")
BARE = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
import torch
from torch import nn
"""
COMPILE = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64), nn.Linear(64, 64)
    def forward(self, x):
        return self.linear(self.norm(x))

import mxnorm_pass
with mxnorm_pass.record() as report:
    compiled = torch.compile(Block(), backend="mxnorm", options={"inner": "aot_eager"})
    compiled(torch.randn(8, 64)).sum().backward()
print(report)
for use in (lambda: mxnorm_pass.calibrate, lambda: mxnorm_pass.compare):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
"""
IMPORT = """
import sys, torch
before = set(sys.modules)
import mxnorm_pass
print(sorted(m for m in set(sys.modules) - before if not m.startswith("__")))
"""


def printed_by(program: str) -> str:
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_compile_without_the_extras() -> None:
    printed = printed_by(BARE + COMPILE)
    assert "1 norms, 1 fused, 0 skipped" in printed
    assert printed.count("pip install 'mxnorm_pass[checkpoints]'") == 2


def test_importing_the_package_imports_hardly_anything() -> None:
    assert printed_by(IMPORT).strip() == "['mxnorm_pass', 'mxnorm_pass.extras']"


@pytest.mark.parametrize("command", ["explain", "calibrate", "compare"])
def test_a_command_without_the_extras(command: str) -> None:
    arguments = {"explain": ["--model", "x"]}.get(command, ["--model", "x", "--text", "y"])
    arguments += ["--out", "z"] if command == "calibrate" else []
    program = f"from mxnorm_pass.cli import main; print(main({[command, *arguments]!r}))"
    result = subprocess.run(
        [sys.executable, "-c", BARE + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "2", result.stderr
    assert "pip install 'mxnorm_pass[checkpoints]'" in result.stderr
