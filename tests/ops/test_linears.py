"""The ops of linears under a recipe."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mxnorm_pass import ops
from mxnorm_pass.numerics.recipe import RECIPES
from mxnorm_pass.numerics.recipe_text import PLAIN, recipe_of_text, recipe_text


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_as_text(name: str) -> None:
    for matmul in ("forward", "dgrad", "wgrad"):
        recipe = RECIPES[name].matmul(matmul)  # type: ignore[arg-type]
        assert recipe_of_text(recipe_text(recipe)) == recipe


@pytest.mark.parametrize("text", ["{}", "[]", "mxfp8", '{"left": ["mxfp5"], "right": null}'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no recipe of a matmul"):
        recipe_of_text(text)


def test_what_a_compiled_graph_calls_whole() -> None:
    """What is random, what is on a CPU, and what is padded by a size that is not known yet."""
    stays_whole = ops.OPS[ops.recipe_matmul].stays_whole
    assert stays_whole is not None
    shapes = ShapeEnv()
    size = shapes.create_unbacked_symint()
    with FakeTensorMode(shape_env=shapes):
        known, unknown = torch.empty(4, 64, device="meta"), torch.empty(4, size, device="meta")
    plain, random = (recipe_text(RECIPES[name].wgrad) for name in ("mxfp8", "mxfp4-sr"))
    asked = [(known, plain), (known, PLAIN), (known, random), (unknown, plain)]
    asked += [(torch.empty(4, 64), plain)]
    answers = [stays_whole((left, known, None, 0, "wgrad", text)) for left, text in asked]
    assert answers == [False, False, True, True, True]
