"""Cache keys know every source file, wherever the function that hashes them stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import PACKAGE

from mxnorm_pass.compilation import inductor_passes
from mxnorm_pass.compilation.inductor_passes import source_digest, source_files

# What a compile's result depends on most: a cache that outlives a change here gives wrong results.
NUMERICS = [
    "numerics/norm_cast.py",
    "ops/__init__.py",
    "passes/rewrite/fusion.py",
    "kernels/rows.py",
    "passes/match/norms/find.py",
]


def test_all_files_are_hashed() -> None:
    names = {path.resolve().relative_to(PACKAGE).as_posix() for path in source_files()}
    assert names == {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert names.issuperset(NUMERICS)


@pytest.mark.parametrize("name", NUMERICS)
def test_a_change_of_a_file_is_another_digest(name: str, tmp_path: Path, monkeypatch) -> None:
    before = source_digest()
    changed = tmp_path / Path(name).name
    changed.write_text((PACKAGE / name).read_text() + "# changed\n")
    files = [changed if path.resolve() == PACKAGE / name else path for path in source_files()]
    monkeypatch.setattr(inductor_passes, "source_files", lambda: files)
    assert source_digest.__wrapped__() != before
