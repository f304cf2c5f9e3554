"""The depth of a model by the names of its modules, and the linears that a recipe leaves there."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.depth import find_stacks

NVFP4 = {"base": "nvfp4", "high_precision_first": 0.25, "high_precision_last": 0.25}


def kinds(*norms: str, others: tuple[str, ...] = ()) -> dict[str, str]:
    """A model with those norms; ``{4}`` stands for the numbers 0 to 3."""
    named = [(name, "RMSNorm") for name in norms] + [(name, "Linear") for name in others]
    return {name: kind for text, kind in named for name in numbered(text)}


def numbered(text: str) -> Iterator[str]:
    before, _, rest = text.partition("{")
    if not rest:
        yield text
        return
    count, _, after = rest.partition("}")
    for i in range(int(count)):
        yield from numbered(f"{before}{i}{after}")


@pytest.mark.parametrize(
    "norms, others, stacks",
    [
        (["model.layers.{3}.norm", "model.norm"], ["lm_head"], {"model.layers": 3}),
        (["encoder.layers.{2}.ln", "decoder.layers.{5}.ln"], [],
         {"encoder.layers": 2, "decoder.layers": 5}),
        (["{4}.norm"], [], {"": 4}),
        (["h.{2}.norm"], ["h.{2}.experts.{8}.up"], {"h": 2}),
        # A layer without what the others have may be anything.
        (["h.{2}.norm"], ["h.2.linear"], {}),
        # Only some of the layers: of a stage of a pipeline, say.
        (["h.2.norm", "h.3.norm"], [], {}),
        # The parts of a sequence.
        (["0.layers.{2}.norm", "1.norm"], [], {"0.layers": 2}),
        (["stages.{2}.blocks.{3}.norm"], [],
         {"stages": 2, "stages.0.blocks": 3, "stages.1.blocks": 3}),
        ([], ["heads.{4}"], {}),
    ],
)  # fmt: skip
def test_stacks(norms: list[str], others: list[str], stacks: dict[str, int]) -> None:
    assert find_stacks(kinds(*norms, others=tuple(others))) == stacks


def test_in_a_layer_on_its_own_nothing_is_found() -> None:
    inside = kinds("model.layers.0.norm", "model.layers.0.blocks.{2}.norm")
    assert find_stacks(inside, "model.layers.0") == {}
    assert find_stacks(kinds("model.layers.{2}.norm"), "model") == {"model.layers": 2}


def kept(config: MXNormConfig, name: str, count: int = 4) -> list[int]:
    """In which layers the linear stays in high precision."""
    names = [f"h.{i}.{name}" for i in range(count)]
    return [i for i in range(count) if config.resolve(names[i]).kept_by_depth]


def config(**options: Any) -> MXNormConfig:
    return MXNormConfig(**{"recipe": NVFP4, **options}).with_layers_of(kinds("h.{4}.norm"))


def test_shares_choose_layers_of_each_stack() -> None:
    of = config()
    assert of.num_layers == {"h": 4} and kept(of, "q") == [0, 3]
    assert of.resolve("h.0.q").kept_by_depth == (
        "in the first of the 4 layers of h, which its recipe leaves in high precision"
    )
    outside = of.resolve("lm_head")
    assert not outside.kept_by_depth and not outside.depth_unknown
    given = config(num_layers={"h": 8})
    assert given.num_layers == {"h": 8} and kept(given, "q", 8) == [0, 1, 6, 7]
    assert config(num_layers={"layers": 8}).num_layers == {"h": 4, "layers": 8}
    assert "first 2 of the 8 layers" in given.resolve("h.1.q").kept_by_depth


@pytest.mark.parametrize(
    "rules, want",
    [
        # A recipe for some layers.
        ({"h.0.*": {"recipe": "nvfp4"}}, [3]),
        ({"h.0.q": {"recipe": NVFP4}}, [3]),
        ({"re:h\\.[03]\\..*": {"format": "mxfp4"}}, []),
        # A recipe for all layers has shares of its own.
        ({"*.q": {"recipe": NVFP4}}, [0, 3]),
        ({"*.q": {"recipe": {**NVFP4, "high_precision_last": 0}}}, [0]),
        ({"*.q": {"recipe": "mxfp8"}}, []),
        # No recipe.
        ({"h.0.*": {"p": 1}}, [0, 3]),
        ({"h.0.*": True}, [0, 3]),
    ],
)
def test_rules_and_shares(rules: dict[str, Any], want: list[int]) -> None:
    assert kept(config(modules=rules), "q") == want


def test_a_rule_alone_may_bring_the_shares() -> None:
    of = config(recipe=None, modules={"h.*": {"recipe": NVFP4}})
    assert kept(of, "q") == [0, 3]


def test_unknown_depth() -> None:
    assert MXNormConfig(recipe=NVFP4).resolve("q").depth_unknown
    other = MXNormConfig(recipe=NVFP4, prefix="h.3", num_layers={"model.layers": 32})
    assert other.resolve("h.3.q").depth_unknown
    assert not MXNormConfig(recipe="mxfp8").resolve("q").depth_unknown


def test_layers_are_counted_only_where_a_recipe_asks() -> None:
    of = config(recipe="mxfp8")
    assert of.num_layers == {} and of == MXNormConfig(recipe="mxfp8")


def test_layers_alike_share_what_is_compiled() -> None:
    def key(layer: int) -> str:
        return config(prefix=f"h.{layer}", num_layers={"h": 4}).fingerprint_for([f"h.{layer}.q"])

    assert key(1) == key(2) and key(0) == key(3) and key(0) != key(1)


def test_a_copy_keeps_the_number_of_layers() -> None:
    of = config()
    assert pickle.loads(pickle.dumps(of)) == of


@pytest.mark.parametrize(
    "value, words",
    [
        (32, r"num_layers=32 .* mapping from the name of what holds layers"),
        ({3: 32}, "{'model.layers': 32}"),
        ({"h": 0}, r"num_layers\['h'\]=0 .* an int from 1 on"),
        ({"h": True}, r"num_layers\['h'\]=True"),
        ({"h": 2.0}, r"num_layers\['h'\]=2.0"),
    ],
)
def test_bad_numbers_of_layers(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MXNormConfig(num_layers=value)
