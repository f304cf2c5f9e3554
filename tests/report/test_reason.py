"""Every reason for a skip has a cause and a cure, in the docstring and in the README."""

from __future__ import annotations

import re

import pytest
from paths import README

from mxnorm_pass import SkipReason

BEGIN, END = "<!-- begin skip reasons -->", "<!-- end skip reasons -->"


def table() -> str:
    """What the README must hold between its markers."""
    rows = [("reason", "cause", "cure"), ("---",) * 3]
    rows += [(f"`{r.name}`", r.cause, r.cure) for r in SkipReason]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_readme_has_every_reason() -> None:
    _, _, rest = README.read_text().partition(f"{BEGIN}\n")
    found, _, _ = rest.partition(f"\n{END}")
    assert found == table(), f"put this between the markers:\n{table()}"


@pytest.mark.parametrize("reason", SkipReason)
def test_cause_and_cure_are_sentences(reason: SkipReason) -> None:
    for text in (reason.cause, reason.cure):
        assert re.fullmatch(r"\S[^|\n]*\S\.", text), text
        assert text.count("`") % 2 == 0
    assert f"{reason.name}: {reason.cause} {reason.cure}" in (SkipReason.__doc__ or "")


def test_a_reason_without_a_cure_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="cure"):
        SkipReason.__new_member__(SkipReason, "a sentence", "a cause")
