"""The benchmark of decoding without a GPU: what it plans, its bytes, steps and tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_decode
import bench_decode_kernels as kernels
import bench_decode_steps as steps
import pytest
import torch
from benchlib import Timing, save_json
from run_examples import run_example_here

from mxnorm_pass import functional

TINY = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip


def test_bytes_are_those_of_the_tensors() -> None:
    case = kernels.Case("k, v", (64, 32), 128, 3)
    casts = [functional.mx_cast(torch.ones(n, 128)) for n in (3, 64, 32)]
    results = [torch.empty(3, n, dtype=torch.bfloat16) for n in (64, 32)]
    assert case.bytes == sum(t.nbytes for t in (*(t for cast in casts for t in cast), *results))


def test_parts_are_chosen() -> None:
    def planned(*argv: str) -> list[str]:
        args = bench_decode.parse_args([*argv])
        return [f"{p.part} {p.name}" for p in bench_decode.plan(args)]

    assert planned("--part", "steps", "--batches", "1", "4") == ["steps batch 1", "steps batch 4"]
    of_kernels = planned("--part", "kernels", "--rows", "1", "16")
    assert len(of_kernels) == 10 and of_kernels[1] == "kernels q, k, v 6144x4096, 16 rows"
    assert len(planned()) == 5 * len(kernels.ROWS) + len(steps.BATCHES)


@pytest.mark.full
def test_a_token_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"mxnorm": {"quantize": "all", "inner": "aot_eager"}}
    arms = {name: steps.Arm(True, options) for name, options in ours.items()}
    monkeypatch.setattr(steps, "ARMS", {"bf16": steps.Arm(False, {"inner": "eager"}), **arms})
    model = steps.Steps(steps.Sizes(TINY, context=8, device="cpu"))
    token = model.token("bf16", 2)
    token.rewind()
    first = token()
    assert [int(layer.cumulative_length) for layer in token.cache.layers] == [9]
    token.rewind()
    assert token().equal(first)
    bf16, converted = model.measure(["mxnorm"], 2, 2)
    assert (bf16.arm, converted.arm, converted.batch) == ("bf16", "mxnorm", 2)
    assert converted.fused == 2 and converted.error < 0.2
    layer = sum(p.numel() for n, p in model.plain.named_parameters() if "proj" in n)
    assert bf16.weight_bytes - converted.weight_bytes == 2 * layer - layer * 33 // 32


def timing(us: float) -> Timing:
    return Timing(us, us, us)


def test_tables_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = kernels.Case("o_proj", (4096,), 4096, 1)
    times = {"copy": timing(5), "kernel": timing(8), "bf16": timing(12)}
    measured = kernels.Measured(case, times, 0, 0.001, 0.001)
    step = steps.Measured(
        "mxnorm", 1, 32, timing(5e3), timing(9e3), 2**33, compile_seconds=60, error=0.05, fused=64
    )
    content: dict[str, Any] = {"kernels": [asdict(measured)], "steps": [asdict(step)]}
    save_json(tmp_path / "one.json", content | {"failures": ["steps batch 4 failed: why"]})
    assert bench_decode.main(["--tables-of", str(tmp_path / "one.json")]) == 0
    of_kernels, of_steps, failures = capsys.readouterr().out.strip().split("\n\n")
    assert of_kernels.splitlines()[2:] == [
        "| o_proj | 4096 x 4096 | 1 | 5.0 | 8.0 | 12.0 | 0.62 | 1.50x |"
    ]
    assert of_steps.splitlines()[2:] == [
        "| mxnorm | 32 | 1 | 5.000 | 1.80x | 8.00 | 5.0e-02 | 60 |"
    ]
    assert failures == "steps batch 4 failed: why"


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_example_here("bench_decode.py")
    assert done.returncode == 2 and "no CUDA GPU here" in done.stderr
