"""The three READMEs: short where they must be, and whatever they point at is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from paths import EXAMPLES, PACKAGE, README, ROOT

READMES = [README, EXAMPLES / "README.md", PACKAGE / "README.md"]
readmes = pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)


def text_of(path: Path) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 160


@readmes
def test_lines_are_readable(path: Path) -> None:
    for line in text_of(path).splitlines():
        assert len(line) <= 120 or line.startswith("|"), line


@readmes
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]*)\)", text_of(path)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@readmes
def test_named_files_are_there(path: Path) -> None:
    # Of the package's own README paths begin in the package.
    roots = (ROOT, path.parent)
    names = re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text_of(path))
    names += re.findall(r"\b(?:examples|tests)/[\w/]+\.py\b", path.read_text())
    for name in names:
        if not name.startswith("torch."):
            assert any((root / name).exists() for root in roots), name


@readmes
def test_python_is_python(path: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
        ast.parse(code)
