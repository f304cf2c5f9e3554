"""The mean speed-ups of the kernel benchmark: of made-up shapes, and as recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bench_kernels
import pytest
from bench_report import OPPONENTS, TITLES, speed_up, speed_up_table
from benchlib import RESULTS
from measurements import measured
from paths import EXAMPLES
from rich.table import Table


def rows(table: Table) -> list[tuple[Any, ...]]:
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_they_are_means_over_the_shapes_at_which_both_ran() -> None:
    cases = [
        measured(inductor=4, nested=3, mxnorm=2),
        measured(tokens=16, inductor=9, mxnorm=2),
        measured(tokens=1, nested=100),
        measured("residual", inductor=3, mxnorm=2),
        replace(measured(inductor=5, nested=4, mxnorm=2), format="nvfp4"),
    ]
    assert rows(speed_up_table(cases)) == [
        ("mxfp8", TITLES["norm"], "3.000 of 2", "1.500 of 1"),
        ("mxfp8", TITLES["residual"], "1.500 of 1", ""),
        ("nvfp4", TITLES["norm"], "2.500 of 1", "2.000 of 1"),
    ]


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("variant", ["norm", "residual"])
def test_the_readme_has_those_of_the_recorded_run(format: str, variant: str) -> None:
    cases = bench_kernels.load(RESULTS / "bench_kernels_h200.json")["cases"]
    own = [c for c in cases if (c.format, c.variant) == (format, variant)]
    means = [mean for name in OPPONENTS if (mean := speed_up(own, name))]
    assert [mean.shapes for mean in means] == [len(own)] * len(OPPONENTS)
    label = format.upper() + (", residual add" if variant == "residual" else "")
    cells = (label, len(own), *(f"{mean.mean:.2f}x" for mean in means))
    assert f"| {' | '.join(map(str, cells))} |" in (EXAMPLES / "README.md").read_text()
