"""The report page of a small Llama, and a picture of it.

    python examples/report.py --out report.html
    python examples/report.py --model Qwen3 --training --out report.html
    python examples/report.py --screenshot examples/results/report.png

The model is only traced, on 4096 tokens. One norm is left exact and one block is off, so that each
kind of site is there. `--screenshot` opens the page in a headless Chromium, which has to be
installed with its driver (Debian: chromium, chromium-driver; and `pip install selenium`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from models import ARCHITECTURES, build, example_inputs
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mxnorm_pass
from mxnorm_pass import Report

TOKENS = 4096
OPTIONS = {
    "modules": {
        "model.layers.0.input_layernorm": {"estimator": "exact"},
        "model.layers.1.mlp.*": False,
    }
}
DEADLINE_SECONDS = 30


def llama() -> nn.Module:
    """Two layers of a Llama that is wide enough for its bytes to mean something."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=1024,
        max_position_embeddings=TOKENS,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.bfloat16().eval()


def trace(name: str, training: bool) -> Report:
    """What the backend would do to the model; no kernel runs."""
    inputs: dict[str, Any]
    if name == "Llama":
        model, ids = llama(), torch.zeros(1, TOKENS, dtype=torch.long)
        inputs = {"input_ids": ids, "use_cache": False}
    else:
        model = build(name, torch.bfloat16)
        inputs = example_inputs(model)
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore", mxnorm_pass.MXNormWarning)
        return mxnorm_pass.explain(model, options=OPTIONS, **inputs)


def require_browser() -> None:
    """Say all that a screenshot lacks, before anything is traced."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if find_spec("selenium") is None:
        missing.append("selenium")
    if missing:
        raise SystemExit(
            f"--screenshot needs {', '.join(missing)} "
            "(Debian: apt install chromium-driver; and pip install selenium)"
        )


def take_screenshot(page: Path, picture: Path, site: int, width: int, height: int) -> None:
    """Open the page and one of its sites, and save what a window of this size shows."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(page.resolve().as_uri())
        driver.find_elements("css selector", "tr.site button")[site].click()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not driver.find_elements("css selector", ".sides[data-ready]"):
            if time.monotonic() > deadline:
                raise SystemExit("the page did not draw its diagrams")
            time.sleep(0.05)
        picture.parent.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(picture))
    finally:
        driver.quit()


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The report page of a small model.")
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="Llama", metavar="MODEL")
    parser.add_argument("--training", action="store_true", help="trace the backward too")
    parser.add_argument("--out", type=Path, metavar="HTML", help="where the page goes")
    parser.add_argument("--screenshot", type=Path, metavar="PNG", help="take a picture of it")
    parser.add_argument("--site", type=int, default=2, help="the site that the picture shows open")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 1340), metavar=("W", "H"))
    args = parser.parse_args(argv)
    if args.out is None and args.screenshot is None:
        parser.error("give --out, --screenshot or both")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.screenshot:
        require_browser()
    report = trace(args.model, args.training)
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        page = args.out or Path(folder) / "report.html"
        report.save_html(page)
        if args.screenshot:
            take_screenshot(page, args.screenshot, args.site, *args.size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
