"""Every reason for a skip has a cause and a cure, in the docstring and from the command line."""

from __future__ import annotations

import re

import pytest

from mxnorm_pass import SkipReason
from mxnorm_pass.cli import main


def test_the_command_line_prints_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reasons"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for reason in SkipReason:
        text = f"{reason.name}: {reason.value} cause: {reason.cause} cure: {reason.cure}"
        assert " ".join(text.split()) in printed


@pytest.mark.parametrize("reason", SkipReason)
def test_cause_and_cure_are_sentences(reason: SkipReason) -> None:
    for text in (reason.cause, reason.cure):
        assert re.fullmatch(r"\S[^|\n]*\S\.", text), text
        assert text.count("`") % 2 == 0
    assert f"{reason.name}: {reason.cause} {reason.cure}" in (SkipReason.__doc__ or "")


def test_a_reason_without_a_cure_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="cure"):
        SkipReason.__new_member__(SkipReason, "a sentence", "a cause")
