"""Every architecture of ``examples/models.py``, against an uncompiled model of ``functional``."""

from __future__ import annotations

import pytest
import torch
from architectures import (
    BF16,
    F32,
    NOTHING_TO_FUSE,
    ROOT,
    assert_sites_are_the_norms_that_ran,
    build,
    compiled,
    every_model,
    expected_warnings,
    models,
    outputs_of,
    same_bits,
)
from functional_mode import FunctionalMode, NormRule, rms_norms

import mxnorm_pass
from mxnorm_pass import SkipReason

pytestmark = expected_warnings

README = ROOT / "README.md"
ONE_PLUS = {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"}
# Those that round to the input's dtype after the gain alone; all others do so before it, too.
LATE_CAST = {*ONE_PLUS, "Olmo2RMSNorm", "GptOssRMSNorm", "RMSNorm"}


@pytest.mark.parametrize(
    "dtype, estimator", [(F32, "mxnorm"), (BF16, "mxnorm"), (BF16, "exact")], ids=str
)
@every_model
@torch.no_grad()
def test_outputs_are_those_of_functional(name, dtype, estimator) -> None:
    """With the exact RMS: those of the uncompiled model with the same casts."""
    model = build(name, dtype)
    inputs = models.example_inputs(model)
    with FunctionalMode(model, estimator) as mode:
        want = outputs_of(model, inputs)
    with mxnorm_pass.record() as report:
        got = outputs_of(compiled(model, estimator=estimator), inputs)
    assert same_bits(got, want)
    assert_sites_are_the_norms_that_ran(report, mode)
    assert bool(mode.linears) == (name not in NOTHING_TO_FUSE)
    assert same_bits(outputs_of(model, inputs), want) == (name in NOTHING_TO_FUSE)


@every_model
def test_rules_of_the_norm_classes(name) -> None:
    """The reference's norm is each class's own, bit for bit; `NormRule.of` fails otherwise."""
    model = build(name, BF16)
    for norm in rms_norms(model).values():
        kind = type(norm).__name__
        assert NormRule.of(norm) == NormRule(kind in ONE_PLUS, kind not in LATE_CAST)


@torch.no_grad()
def test_graph_breaks_in_the_experts() -> None:
    """The loop over experts depends on data: each graph reports the norms that it holds."""
    model = build("Mixtral", F32)
    model.set_experts_implementation("eager")
    inputs = models.example_inputs(model)
    with FunctionalMode(model, "mxnorm"):
        want = outputs_of(model, inputs)
    with mxnorm_pass.record() as report:
        got = outputs_of(compiled(model), inputs)
    assert same_bits(got, want)
    assert len(report.graphs) > 1
    # Both layers run one graph, and the final norm is in another.
    (layer, final) = (graph for graph in report.graphs if graph.sites)
    assert [site.status for site in layer.sites] == ["fused", "skipped"]
    assert [site.reason for site in final.sites] == [SkipReason.NO_MX_CAST]


@every_model
def test_readme_has_the_row(name) -> None:
    rows = models.table_in(README.read_text()).splitlines()
    assert models.markdown([models.measure(name)]).splitlines()[-1] in rows


def test_readme_has_a_row_for_each_architecture_in_order() -> None:
    rows = models.table_in(README.read_text()).splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == list(models.ARCHITECTURES)


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
