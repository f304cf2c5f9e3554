"""Every reason for a skip has a cause and a cure, in the docstring and on the command line."""

from __future__ import annotations

import re

import pytest

from mxnorm_pass import SkipReason
from mxnorm_pass.cli import main


def printed(capsys: pytest.CaptureFixture[str], *names: str) -> list[str]:
    """What the command prints of each reason, line breaks undone."""
    assert main(["reasons", *names]) == 0
    paragraphs = capsys.readouterr().out.strip().split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs]


def test_the_command_prints_every_reason(capsys) -> None:
    assert printed(capsys) == [
        f"{r.name}: {r.value} cause: {r.cause} cure: {r.cure}" for r in SkipReason
    ]


def test_the_command_prints_those_that_are_asked_for(capsys) -> None:
    names = [text.partition(":")[0] for text in printed(capsys, "WIDTH", "DTYPE")]
    assert names == ["WIDTH", "DTYPE"]
    assert main(["reasons", "HEIGHT"]) == 2
    error = capsys.readouterr().err
    assert "'HEIGHT' is no reason" in error and all(r.name in error for r in SkipReason)


@pytest.mark.parametrize("reason", SkipReason)
def test_cause_and_cure_are_sentences(reason: SkipReason) -> None:
    for text in (reason.cause, reason.cure):
        assert re.fullmatch(r"\S[^|\n]*\S\.", text), text
        assert text.count("`") % 2 == 0
    assert f"{reason.name}: {reason.cause} {reason.cure}" in (SkipReason.__doc__ or "")


def test_a_reason_without_a_cure_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="cure"):
        SkipReason.__new_member__(SkipReason, "a sentence", "a cause")
