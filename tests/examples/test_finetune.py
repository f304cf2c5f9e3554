"""examples/finetune.py on a small model."""

from __future__ import annotations

import finetune
import pytest
import torch
from reference import build_llama


@pytest.mark.full
def test_both_arms_train_from_the_calibrated_model() -> None:
    model = build_llama(layers=1)
    ids = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(1))
    rows = finetune.Rows(ids[:2], ids[2:4].repeat(4, 1), ids[2:4])
    args = finetune.parse_args(["--inner", "aot_eager", "--learning-rate", "0.01"])
    calibration = finetune.calibrated(model, rows.calibration, budget=1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = finetune.fine_tune("exact", model, rows, args, estimator="exact")
    ours = finetune.fine_tune("calibrated", model, rows, args, calibration=calibration)
    assert (exact.estimated, ours.estimated) == (0, 2)
    assert len(exact.train) == len(ours.train) == 8
    for arm in (exact, ours):
        assert arm.after < arm.before - 0.1
    assert exact.before != ours.before
    # Each arm trains a copy.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "calibrated" in finetune.show([exact, ours])
