"""Which kernels take the place of operands' casts in a graph, on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor, fx
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from mxnorm_pass import ops
from mxnorm_pass.functional import RECIPES, MatmulRecipe
from mxnorm_pass.kernels import coverage
from mxnorm_pass.numerics.hadamard import Hadamard
from mxnorm_pass.numerics.recipe_text import recipe_text
from mxnorm_pass.ops.linears import written_matmul
from mxnorm_pass.passes import lower

BF16 = torch.bfloat16
T, N, K = 256, 128, 64
KEY, INPUT_KEY = 2**40 + 5, 2**33 + 9


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(coverage, "capability", lambda device: (9, 0))
    driver = mock.MagicMock(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    before = triton.runtime.driver._active if hasattr(triton.runtime.driver, "_active") else None
    triton.runtime.driver.set_active(driver)
    yield
    triton.runtime.driver._active = before


class Lowered:
    """A function's graph; its results have the metadata they had before."""

    def __init__(self, function: Callable[..., Any], *args: Tensor) -> None:
        self.graph = make_fx(function)(*args).graph
        before = self.results()
        lower.lower(self.graph, select_decomp_table())
        self.graph.eliminate_dead_code()
        self.graph.lint()
        assert self.results() == before
        assert "mxnorm_pass" not in str(self.graph)

    def results(self) -> list[Any]:
        values = [node.meta["val"] for node in self.graph.output_node().args[0]]  # type: ignore
        return [(v.dtype, str(v.device), v.shape, v.stride()) for v in values]

    @property
    def kernels(self) -> list[fx.Node]:
        target = triton_kernel_wrapper_functional
        return list(self.graph.find_nodes(op="call_function", target=target))

    def arguments(self, kernel: fx.Node) -> dict[str, Any]:
        hidden = kernel_side_table.get_constant_args(kernel.kwargs["constant_args_idx"])  # type: ignore
        return {**kernel.kwargs["kwargs"], **hidden}  # type: ignore[dict-item]


def tensors() -> tuple[Tensor, ...]:
    """A gradient, a weight, an input and a seed."""
    with FakeTensorMode():
        shapes = ((T, N), (N, K), (T, K))
        floats = (torch.empty(shape, dtype=BF16, device="cuda") for shape in shapes)
        return *floats, torch.empty((), dtype=torch.int64, device="cuda")


def backward(recipe: str) -> Callable[..., tuple[Tensor, Tensor]]:
    of = RECIPES[recipe]

    def both(grad: Tensor, weight: Tensor, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        dgrad, wgrad = recipe_text(of.dgrad), recipe_text(of.wgrad)
        return (
            written_matmul(grad, weight.t(), seed, KEY, KEY, "dgrad", dgrad),
            written_matmul(grad.t(), x.t(), seed, KEY, INPUT_KEY, "wgrad", wgrad),
        )

    return both


def key(arguments: dict[str, Any], name: str) -> int:
    return int((arguments[f"{name}_high"] << 32) + arguments[f"{name}_low"] % 2**32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_casts_of_a_gradient_are_one_kernel(recipe: str) -> None:
    lowered = Lowered(backward(recipe), *tensors())
    written = sorted(kernel.kwargs["tensors_to_clone"] for kernel in lowered.kernels)  # type: ignore
    # Of the gradient, the weight and the input. Of what NVFP4's transform makes of the gradient
    # and the input the largest is found before.
    absmaxes = [["absmax_ptr"]] * 2 if recipe == "nvfp4" else []
    both, one = ["dequantized_ptr", "dequantized_t_ptr"], ["dequantized_t_ptr"]
    assert written == [*absmaxes, both, one, one]


def test_each_side_has_its_own_keys() -> None:
    lowered = Lowered(backward("mxfp4-rht-sr"), *tensors())
    by_source = {
        lowered.arguments(kernel)["x_ptr"].name: lowered.arguments(kernel)
        for kernel in lowered.kernels
    }
    gradient, weight, x = by_source.values()
    assert [key(gradient, name) for name in ("key", "signs")] == [KEY, KEY]
    assert [key(gradient, name) for name in ("key_t", "signs_t")] == [KEY, INPUT_KEY]
    assert [key(weight, name) for name in ("key_t", "signs_t")] == [KEY, KEY]
    assert [key(x, name) for name in ("key_t", "signs_t")] == [INPUT_KEY, INPUT_KEY]
    matmuls = [gradient["MATMUL"], gradient["MATMUL_T"], weight["MATMUL_T"], x["MATMUL_T"]]
    assert matmuls == [1, 2, 1, 2]
    assert [gradient["USE_T"], weight["USE_T"], x["USE_T"]] == [1, 2, 2]


def test_values_that_others_read_are_written() -> None:
    def function(grad: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        text = '{"matmul": "wgrad", "use": 1, "cast": ["mxfp4", "stochastic", false]}'
        return ops.operand_cast(grad.t(), seed, KEY, KEY, text, None)

    grad, _, _, seed = tensors()
    (kernel,) = Lowered(function, grad, seed).kernels
    assert kernel.kwargs["tensors_to_clone"] == ["values_t_ptr", "scales_t_ptr"]


def test_what_no_kernel_covers_is_called_whole_or_decomposed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grad, weight, _, seed = tensors()
    large = MatmulRecipe(RECIPES["mxfp4"].dgrad.left, RECIPES["mxfp4"].dgrad.right, Hadamard(256))

    def function(grad: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
        padded = torch.cat([grad, grad], 1), torch.cat([weight, weight]).t()
        return written_matmul(*padded, seed, KEY, KEY, "dgrad", recipe_text(large))

    graph = make_fx(function)(grad, weight, seed).graph
    with caplog.at_level("DEBUG", logger="mxnorm_pass"):
        assert lower.lower(graph, select_decomp_table()) > 0
    assert "a Hadamard transform of 256; a kernel takes at most 128" in caplog.text
    assert len(graph.find_nodes(op="call_function", target=ops.operand_cast)) == 2
