"""Printed reports fold what is equal but for a layer's number, and say nothing untrue by it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

from mxnorm_pass import Graph, NearMiss, Report, Site, SkipReason
from mxnorm_pass.report.fold import fold
from mxnorm_pass.report.numbers import number_set
from mxnorm_pass.report.subgraph import Subgraph, SubgraphNode, Traffic

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def fused(norm: str, *consumers: str, **fields) -> Site:
    how = {"estimator": "mxnorm", "gain": "fold", "format": "mxfp8"}
    return Site(norm, consumers, "fused", **how, **fields)


def llama(layers: int) -> list[Site]:
    sites = []
    for i in range(layers):
        at = f"model.layers.{i}"
        consumers = (f"{at}.{name}" for name in QKV)
        sites.append(fused(f"{at}.input_layernorm", *consumers, residual=i > 0))
        sites.append(fused(f"{at}.post_attention_layernorm", f"{at}.mlp.up_proj", residual=True))
    miss = NearMiss("mm_9", "a cast", "lm_head, a linear", "llama.py:7: lm_head(x)")
    return [*sites, Site("model.norm", reason=SkipReason.NO_MX_CAST, near_miss=miss)]


def printed(*sites: Site, **counts: dict[str, int]) -> str:
    report = Report()
    report.add(Graph("inference", "", "", sites=tuple(sites), **counts))
    return str(report)


def test_a_deep_model_fits_a_screen() -> None:
    counts = {
        "ops_before": {"aten.mm.default": 9, "aten.rsqrt.default": 64},
        "ops_after": {"aten.mm.default": 9, "mxnorm_pass.add_norm_cast.default": 63}
        | {"mxnorm_pass.norm_cast.default": 1, "mxnorm_pass.cast.default": 2},
    }
    assert_expected_inline(
        printed(*llama(32), **counts),
        """\
mxnorm: inference_0: 65 norms, 64 fused, 1 skipped
  fused    model.layers.0.input_layernorm -> model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj (mxnorm, fold, mxfp8)
  fused    model.layers.{0..31}.post_attention_layernorm -> .mlp.up_proj (mxnorm, fold, mxfp8, residual add)
  fused    model.layers.{1..31}.input_layernorm -> .self_attn.{q_proj, k_proj, v_proj} (mxnorm, fold, mxfp8, residual add)
  skipped  model.norm: NO_MX_CAST: no linear that reads this norm has an MX cast
           at mm_9: expected a cast; found lm_head, a linear (llama.py:7: lm_head(x))
  ops: 64 fused norm casts, 2 more calls""",  # noqa: E501
    )


def test_the_table_has_every_norm() -> None:
    sites = llama(3)
    report = Report()
    report.add(Graph("inference", "", "", sites=tuple(sites)))
    head, *lines = report.table().splitlines()
    assert head == str(report).splitlines()[0]
    assert lines == [f"  {line}" for site in sites for line in str(site).splitlines()]


@pytest.mark.parametrize(
    "numbers, text",
    [([3], "3"), ([1, 0], "0, 1"), ([0, 1, 2], "0..2"), ([9, 7, 8, 5, 0, 1], "0, 1, 5, 7..9")],
)
def test_number_sets(numbers: list[int], text: str) -> None:
    assert number_set(numbers) == text


def attention_norm(i: int, found: str) -> Site:
    node = f"permute_{3 * i}" if i else "permute"
    miss = NearMiss(node, "a linear", found.format(node=node, i=i))
    return Site(f"layers.{i}.q_norm", reason=SkipReason.NO_MX_CAST, near_miss=miss)


def test_texts_name_all_layers_and_one_node() -> None:
    found = "{node}, a view in layers.{i}.attn, f32[1, 2]"
    (entry,) = fold([attention_norm(i, found) for i in range(3)])
    assert str(entry).splitlines()[1].strip() == (
        "at permute and 2 alike: expected a linear; "
        "found permute, a view in layers.{0..2}.attn, f32[1, 2]"
    )


def test_longer_numbers_and_sizes_are_no_layers() -> None:
    for found in ("in layers.{i}1.attn", "f32[{i}, 2]", "in other.layers.{i}", "layers_{i}"):
        assert len(fold([attention_norm(i, found) for i in range(3)])) == 3, found


def test_nodes_of_the_part_of_the_graph_may_be_named() -> None:
    def skipped(node: str) -> Site:
        traffic = Traffic(None, None)
        part = Subgraph((SubgraphNode(f"{node}_3", "aten.mul"), SubgraphNode("w_1", "")), traffic)
        miss = NearMiss("mm", "a cast", f"{node}_3 ({node})")
        return Site("norm", reason=SkipReason.CAST_ESCAPES, before=part, near_miss=miss)

    one, two = skipped("mul"), skipped("mul")
    other = replace(one.near_miss, node="mm_8", found="mul_3 (mul)")
    layers = [replace(one, norm="l.0.n"), replace(two, norm="l.1.n", near_miss=other)]
    assert [entry.count for entry in fold(layers)] == [2]
    other = replace(other, found="mul_4 (mul)")  # not a node of this site: another text
    layers[1] = replace(layers[1], near_miss=other)
    assert [entry.count for entry in fold(layers)] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"residual": True},
        {"gain": "activation"},
        {"consumers": ("l.0.q",)},
        {"consumers": ("l.1.k",)},
        {"calibration": "exact"},
        {"status": "skipped", "reason": SkipReason.DISABLED},
        {"norm": "l.x.n"},
        {"norm": "l.01.n"},
    ],
)
def test_any_difference_keeps_sites_apart(change: dict[str, object]) -> None:
    sites = [fused("l.0.n", "l.0.q"), fused("l.1.n", "l.1.q")]
    assert [str(entry) for entry in fold(sites)] == [
        "fused    l.{0, 1}.n -> .q (mxnorm, fold, mxfp8)"
    ]
    sites[1] = replace(sites[1], **change)
    assert [str(entry) for entry in fold(sites)] == list(map(str, sites))


def test_inner_numbers_fold_first_and_calls_stay_apart() -> None:
    blocks = [(0, 2), (1, 2), (2, 4)]
    names = [f"stages.{s}.blocks.{b}" for s, count in blocks for b in range(count)]
    sites = [fused(f"{name}.norm", f"{name}.up", f"{name}.gate") for name in names]
    lines = [str(entry) for entry in fold([*sites, *sites[:2]])]
    assert_expected_inline(
        "\n".join(lines),
        """\
fused    stages.{0, 1}.blocks.{0, 1}.norm -> .{up, gate} (mxnorm, fold, mxfp8)
fused    stages.2.blocks.{0..3}.norm -> .{up, gate} (mxnorm, fold, mxfp8)
fused    stages.0.blocks.{0, 1}.norm -> .{up, gate} (mxnorm, fold, mxfp8)""",
    )


def test_a_list_of_layers_compiled_alone() -> None:
    """The number is the first part of the names; other numbers in texts mean something else."""
    sites = [
        Site(f"{i}.norm", reason=SkipReason.WIDTH, detail=f"{i}.norm has f32[0, 1] and {i}.5")
        for i in range(2)
    ]
    assert [entry.count for entry in fold(sites)] == [1, 1]
    sites = [replace(site, detail=f"{site.norm} has f32[0, 1]") for site in sites]
    blocks = [fused(f"{i}.0", f"{i}.1") for i in range(3)]
    assert [str(entry) for entry in fold(blocks)] == [
        "fused    {0..2}.0 -> .1 (mxnorm, fold, mxfp8)"
    ]
    off = [Site(f"{i}", reason=SkipReason.DISABLED, detail=f"turns '{i}' off") for i in (1, 3)]
    assert str(fold(off)[0]).endswith("(turns '{1, 3}' off)")
    (entry,) = fold(sites)
    assert str(entry).endswith("({0, 1}.norm has f32[0, 1])")


def test_consumers_elsewhere_keep_their_full_names() -> None:
    (entry,) = fold([fused(f"l.{i}.n", f"l.{i}.q", "head", "tail", f"l.{i}.a.b") for i in range(3)])
    assert str(entry) == "fused    l.{0..2}.n -> .q, head, tail, .a.b (mxnorm, fold, mxfp8)"


# Properties: what is printed, unfolded by a reader, is what was there.

PARTS = st.sampled_from(["layers", "a", "0", "1", "2", "3", "norm"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@st.composite
def random_sites(draw: st.DrawFn) -> list[Site]:
    sites = []
    for name in draw(st.lists(NAMES, max_size=12)):
        inside = name.rpartition(".")[0]
        consumers = draw(st.sampled_from([("head",), (f"{inside}.q", f"{inside}.k"), ("a.1.q",)]))
        sites.append(fused(name, *consumers, residual=draw(st.booleans())))
    return sites


def expand(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The names, the norm's first, that folded ones stand for."""
    brace = re.search(r"\{[^}]*\}", names[0])
    if brace is None:
        yield names
        return
    folded, prefix = names[0][: brace.end()], names[0][: brace.start()]
    for number in numbers_of(brace[0]):
        yield from expand(tuple(name.replace(folded, f"{prefix}{number}") for name in names))


def numbers_of(brace: str) -> list[int]:
    runs = [part.partition("..") for part in brace.strip("{}").split(", ")]
    return [n for first, _, last in runs for n in range(int(first), int(last or first) + 1)]


@settings(max_examples=300, deadline=None)
@given(random_sites())
def test_folded_lines_stand_for_the_sites(sites: list[Site]) -> None:
    found: Counter[object] = Counter()
    for entry in fold(sites):
        names = list(expand((entry.site.norm, *entry.site.consumers)))
        assert len(names) == entry.count
        found.update((*each, entry.site.residual) for each in names)
    assert found == Counter((site.norm, *site.consumers, site.residual) for site in sites)


@given(random_sites())
def test_what_is_not_folded_stays_as_it_is(sites: list[Site]) -> None:
    single = [str(entry) for entry in fold(sites) if entry.count == 1]
    assert Counter(single) <= Counter(map(str, sites))


@pytest.mark.parametrize(
    "before, after, line",
    [
        ({"mm": 1}, {"mm": 1}, None),
        ({"mm": 1}, {"mxnorm_pass.norm_cast_both.default": 1}, "1 fused norm cast, as many calls"),
        ({"mm": 5}, {"mm": 2}, "0 fused norm casts, 3 fewer calls"),
        (
            {"mxnorm_pass.norm_cast.default": 1},
            {"mxnorm_pass.norm_cast.default": 3, "mxnorm_pass.cast.default": 1},
            "2 fused norm casts, 3 more calls",
        ),
    ],
)
def test_op_counts_in_a_few_words(before, after, line: str | None) -> None:
    lines = printed(ops_before=before, ops_after=after).splitlines()
    assert lines[1:] == ([f"  ops: {line}"] if line else [])
