"""A compile needs torch alone; all else is imported where it is used, and missed by name."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest
from paths import ROOT

OPTIONAL = (
    "transformers",
    "torchao",
    "safetensors",
    "scipy",
    "tqdm",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "rich",
    "numpy",
    "huggingface_hub",
)
# None in sys.modules is a ModuleNotFoundError for those that import it.
BLOCK = f"""
import sys, torch, torch._inductor.compile_fx
for name in {OPTIONAL!r}:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[loaded]
    sys.modules[name] = None
import mxnorm_pass
"""
COMPILE = """
from torch import nn
block = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64))
x = torch.randn(4, 64)
for gradient in (False, True):
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="mxnorm", options={"inner": "aot_eager"})
    with torch.set_grad_enabled(gradient), mxnorm_pass.record() as report:
        out = compiled(x)
    print(report)
out.sum().backward()
print(mxnorm_pass.explain(block, x))
with mxnorm_pass.record() as report:
    mxnorm_pass.apply(torch.export.export(block, (x,)))
print(report)
"""
MISSED = {
    "mxnorm_pass.calibrate(block, [])": ("mxnorm_pass.calibrate needs scipy", "hf"),
    "mxnorm_pass.convert(block)": ("mxnorm_pass.convert needs torchao", "hf"),
    "mxnorm_pass.Calibration.load(sys.executable)": (
        "a calibration's file needs safetensors",
        "hf",
    ),
    "mxnorm_pass.Comparison(0, 0, 0, 0, None, None, (), ()).plot('x')": (
        "Comparison.plot needs matplotlib",
        "report",
    ),
    "report.save_html('page.html')": ("the page of a report needs jinja2", "report"),
    "report._repr_html_()": ("the table of a report needs jinja2", "report"),
}
CALL = """
try:
    {call}
except ImportError as error:
    print(error)
"""
COMMAND = """
from mxnorm_pass.cli import main
sys.stderr = sys.stdout
print(main(["explain", "--model", "config.json"]))
"""


def run(script: str) -> list[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def printed_without_packages() -> list[str]:
    """What one process prints that has none of the optional packages."""
    calls = (CALL.format(call=call) for call in MISSED)
    return run("".join([BLOCK, COMPILE, *calls, COMMAND]))


@pytest.mark.full
def test_a_compile_needs_torch_alone(printed_without_packages) -> None:
    heads = [line for line in printed_without_packages if " 1 norms, 1 fused" in line]
    kinds = ["inference_0", "training_0", "training_0", "inference_0"]
    assert [head.split(": ")[1] for head in heads] == kinds


@pytest.mark.full
@pytest.mark.parametrize("message, extra", MISSED.values())
def test_what_is_missing_is_named_with_its_extra(
    message: str, extra: str, printed_without_packages
) -> None:
    said = f"{message}, which is not installed: pip install 'mxnorm_pass[{extra}]'"
    assert said in printed_without_packages


@pytest.mark.full
def test_the_command_line_says_so_in_one_line(printed_without_packages) -> None:
    assert printed_without_packages[-2:] == [
        "python -m mxnorm_pass explain: error: a model's config needs transformers, which is not "
        "installed: pip install 'mxnorm_pass[hf]'",
        "2",
    ]


def test_the_package_loads_no_other_module() -> None:
    """It costs nothing to import beside torch."""
    script = """
import sys, torch
loaded = set(sys.modules)
import mxnorm_pass
dir(mxnorm_pass)
print(*sorted(set(sys.modules) - loaded))
"""
    assert run(script) == ["mxnorm_pass"]


def test_every_extra_that_a_message_names_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {extra for _, extra in MISSED.values()} <= project["optional-dependencies"].keys()
    core = [requirement.partition(">")[0] for requirement in project["dependencies"]]
    # mpmath is what torch's sympy is built on.
    assert core == ["torch", "mpmath"]
