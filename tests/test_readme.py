"""The READMEs are short where they must be, and name nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import EXAMPLES, PACKAGE, README, ROOT

ALL = (README, EXAMPLES / "README.md", PACKAGE / "README.md")
# What a README calls a file of the repository.
FILE = re.compile(r"`?((?:examples|mxnorm_pass|tests)/[\w./-]+\.(?:py|json|png|md))")


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text())
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 160


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    for name in FILE.findall(path.read_text()):
        assert (ROOT / name).exists(), name
