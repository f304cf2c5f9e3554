"""Printed reports fold equal layers into a line, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxnorm_pass import Graph, NearMiss, Report, Site, SkipReason
from mxnorm_pass.report.fold import folded_lines

HOW = {"status": "fused", "estimator": "mxnorm", "gain": "fold", "format": "mxfp8"}


def attention(layer: int, **changes: object) -> Site:
    consumers = tuple(f"model.layers.{layer}.self_attn.{n}_proj" for n in "qkv")
    site = Site(f"model.layers.{layer}.input_layernorm", consumers, **HOW)  # type: ignore[arg-type]
    return replace(site, **changes)  # type: ignore[arg-type]


def skipped(layer: int) -> Site:
    name = f"model.layers.{layer}.self_attn"
    miss = NearMiss(f"permute_{layer + 1}", "a linear", f"aten.permute in {name}", "m.py:1: q")
    return Site(f"{name}.q_norm", reason=SkipReason.NO_MX_CAST, near_miss=miss)


def test_equal_layers_are_one_line() -> None:
    sites = [site for i in range(32) for site in (attention(i), skipped(i))]
    sites.append(Site("model.norm", reason=SkipReason.DISABLED))
    fused, miss, norm = folded_lines(sites)
    assert fused == (
        "fused    model.layers.{0..31}.input_layernorm -> q_proj, k_proj, v_proj "
        "(mxnorm, fold, mxfp8)"
    )
    first, second = miss.splitlines()
    assert first.startswith("skipped  model.layers.{0..31}.self_attn.q_norm: NO_MX_CAST")
    assert second.strip() == f"{skipped(0).near_miss}"
    assert norm == str(sites[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": "exact"},
        {"residual": True},
        {"consumers": ("model.layers.5.self_attn.q_proj",)},
        {"consumers": ("model.layers.6.self_attn.q_proj",) * 3},
        {"status": "skipped", "reason": SkipReason.DISABLED},
    ],
)
def test_another_layer_has_its_own_line(changes: dict[str, object]) -> None:
    lines = folded_lines([attention(i, **(changes if i == 5 else {})) for i in range(8)])
    assert len(lines) == 2
    assert "layers.{0..4, 6, 7}.input" in lines[0] and lines[1] == str(attention(5, **changes))


def test_names_that_only_look_alike() -> None:
    """Layers of two stacks, and numbers that are no layer's."""
    sites = [attention(1), replace(attention(1), norm="model.layers.11.input_layernorm")]
    sites += [replace(attention(2), norm="encoder.layers.2.input_layernorm")]
    assert folded_lines(sites) == list(map(str, sites))


def test_two_calls_of_a_norm_are_two_lines() -> None:
    (lines,) = folded_lines([attention(3), attention(3)])
    assert lines.splitlines() == [str(attention(3))] * 2


def test_consumers_of_one_name_keep_their_whole_names() -> None:
    names = ("model.layers.{}.a.proj", "model.layers.{}.b.proj")
    sites = [attention(i, consumers=tuple(n.format(i) for n in names)) for i in range(3)]
    (line,) = folded_lines(sites)
    assert "-> model.layers.{0..2}.a.proj, model.layers.{0..2}.b.proj (" in line


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=40))
def test_every_site_is_in_one_line(drawn: list[tuple[int, bool]]) -> None:
    """What the lines say of each layer, read back, is what went in."""
    sites = [attention(i, residual=flag) for i, flag in drawn]
    found: list[tuple[int, bool]] = []
    for line in "\n".join(folded_lines(sites)).splitlines():
        numbers = line.split("layers.")[1].split(".input")[0].strip("{}")
        for part in numbers.split(", "):
            first, _, last = part.partition("..")
            layers = range(int(first), int(last or first) + 1)
            found += [(layer, "residual add" in line) for layer in layers]
    assert sorted(found) == sorted(drawn)


def test_a_printed_report_fits_a_screen_and_its_table_has_all() -> None:
    sites = tuple(site for i in range(32) for site in (attention(i), skipped(i)))
    ops = {"aten.mul.Tensor": 9}, {"mxnorm_pass.norm_cast.default": 2, "aten.mul.Tensor": 3}
    report = Report([Graph("training_0", "", "", *ops, sites=sites)])
    lines = str(report).splitlines()
    assert lines[0] == "mxnorm: training_0: 64 norms, 32 fused, 32 skipped" and len(lines) == 5
    assert lines[-1].strip() == "ops: 2 norm casts, 4 fewer in all"
    assert len(report.table().splitlines()) == 1 + 32 + 2 * 32 + 1
    assert all(str(site).splitlines()[0] in report.table() for site in sites)
