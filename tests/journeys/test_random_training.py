"""Random training programs: each output and gradient is what ``functional`` says."""

from __future__ import annotations

import pytest
from matching import expected_warnings
from random_training import run_program
from random_training_specs import random_spec

pytestmark = expected_warnings
# More of them: python tests/lib/random_training.py COUNT FIRST
PROGRAMS, CHUNK = 40, 10
FULL, EXHAUSTIVE = (pytest.mark.full,), (pytest.mark.full, pytest.mark.exhaustive)
MARKS = dict(zip(range(0, PROGRAMS, CHUNK), ((), FULL, EXHAUSTIVE, EXHAUSTIVE), strict=True))


@pytest.mark.parametrize("first", [pytest.param(n, marks=marks) for n, marks in MARKS.items()])
def test_gradients_of_random_programs(first: int) -> None:
    outcomes = {seed: run_program(random_spec(seed), seed) for seed in range(first, first + CHUNK)}
    assert not {seed: o.errors for seed, o in outcomes.items() if o.errors}
    assert not {seed: str(o.refused) for seed, o in outcomes.items() if o.refused}
    reports = [o.report for o in outcomes.values() if o.report is not None]
    assert len(reports) >= 0.7 * CHUNK
    norms = [site for report in reports for site in report.sites]
    assert sum(site.status == "fused" for site in norms) >= 0.3 * len(norms)
