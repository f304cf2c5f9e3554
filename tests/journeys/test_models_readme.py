"""The table of models in examples/README.md, and the script that makes it."""

from __future__ import annotations

import pytest
from architectures import ROOT, every_model, expected_warnings, models

pytestmark = expected_warnings

README = ROOT / "examples" / "README.md"


@pytest.mark.full
@every_model
def test_readme_has_the_row(name) -> None:
    rows = models.table_in(README.read_text()).splitlines()
    assert models.markdown([models.measure(name)]).splitlines()[-1] in rows


def test_readme_has_a_row_for_each_architecture_in_order() -> None:
    rows = models.table_in(README.read_text()).splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == list(models.ARCHITECTURES)


@pytest.mark.full
def test_script_checks_and_writes_a_file(tmp_path, capsys) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{models.BEGIN}\n\n{models.END}\nafter\n")
    name = "torchtitan, nn.RMSNorm"
    assert models.main([name, "--check", str(path)]) == 1
    assert "out of date" in capsys.readouterr().out
    assert models.main([name, "--write", str(path)]) == 0
    assert models.main([name, "--check", str(path)]) == 0
    before, *table, after = path.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert table[3] == f"| {name} | 5 | 4 | NO_MX_CAST: norm | 1 |"


@pytest.mark.parametrize("arguments", [["no such model"], ["--check", "no_such_file.md"]])
def test_script_refuses(arguments, capsys) -> None:
    with pytest.raises(SystemExit):
        models.main(arguments)
    assert "no such" in capsys.readouterr().err.lower()
