"""What a pre-training run is told: its backend, its rates, its rows."""

from __future__ import annotations

from typing import Any

import pretrain
import pytest
import torch
from checkpointlib import BadInput
from pretrain_norms import measured
from pretrain_settings import backend_of, new_run
from pretraining import RANDOM_RECIPE

from mxnorm_pass import functional


def test_arms_differ_in_backend_options_alone() -> None:
    exact, ours = (
        backend_of(new_run("nano", norm, "mxfp8", device="cpu")) for norm in ("rmsnorm", "mxnorm")
    )
    assert exact.backend is ours.backend
    assert exact.options["modules"] == {"lm_head": False}
    assert exact.options["quantize"] == "all"
    assert {**exact.options, "estimator": "mxnorm"} == ours.options
    with_forward = backend_of(new_run("nano", **RANDOM_RECIPE))
    assert with_forward.options["recipe"] == {"base": "mxfp4-rht-sr", "forward": "mxfp8"}
    assert backend_of(new_run("nano", "rmsnorm", "bf16", inner="inductor")).backend == "inductor"
    assert "recipe" not in backend_of(new_run("nano", "mxnorm", "none")).options


@pytest.mark.parametrize(
    "given, said",
    [
        ({"recipe": "mxfp4-sr"}, "no maxima to take: add forward mxfp8"),
        ({"recipe": "bf16"}, "use norm rmsnorm"),
        ({"recipe": "mxfp5"}, "Allowed: 'mxfp8'"),
        ({"recipe": '{"forward": "mxfp8"'}, "Expecting"),
        ({"lr": float("nan")}, "lr nan: give a number above 0"),
        ({"steps": 5, "warmup": 5}, "warmup 5: give 0 to 4"),
        ({"size": "huge"}, "choose nano"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        new_run(**{"size": "nano", "norm": "mxnorm", "recipe": "mxfp8", **given})


def test_the_learning_rate_rises_and_falls_to_a_tenth() -> None:
    run = new_run("nano", "mxnorm", "mxfp8", tokens=1024 * 1000 - 5, lr=1.0)
    assert (run.steps, run.warmup, run.tokens_per_step) == (1000, 100, 1024)
    rates = [run.learning_rate(step) for step in range(run.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[99] == rates[100] == 1.0
    assert rates[550] == pytest.approx(0.55)
    assert 0.1 <= rates[-1] < 0.1001
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_each_epoch_reads_every_row_once() -> None:
    order = pretrain.Order(rows=6, batch=4, seed=0)
    read = torch.cat([order(step) for step in range(6)]).tolist()
    epochs = [read[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    # The position alone decides.
    assert pretrain.Order(6, 4, 0)(4).tolist() == read[16:20]
    assert torch.cat([pretrain.Order(6, 4, 1)(step) for step in range(6)]).tolist() != read


def test_statistics_of_what_norms_read() -> None:
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    ratio, spread, kurtosis = measured(x, 2.0).tolist()
    assert ratio == pytest.approx(1, abs=0.01) and spread < 0.02
    assert kurtosis == pytest.approx(3, abs=0.1)
    x[:, 0] = 1e4
    ratio, _, kurtosis = measured(x, 2.0).tolist()
    # One of a block's 32 elements holds the energy that the estimate expects in all of them.
    assert ratio == pytest.approx(functional.rms_constant(2.0, 32) / 32**0.5, rel=0.01)
    assert kurtosis == pytest.approx(4096, rel=0.01)
