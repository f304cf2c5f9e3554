"""Where tests and their helpers are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import LIB, TESTS

RECORDED = LIB / "golden" / "graphs"
FILES = [path for path in sorted(TESTS.rglob("*.py")) if RECORDED not in path.parents]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_from_a_test(path: Path) -> None:
    """What several tests need is in tests/lib."""
    for name in imports(path):
        assert not any(part.startswith("test_") for part in name.split(".")), name


def test_helpers_are_no_tests() -> None:
    assert not [path for path in LIB.rglob("test_*.py") if RECORDED not in path.parents]
