"""A norm with its linear, and what tests of use share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from numerics import U
from reference import token_ids
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mxnorm_pass import Report, functional

IDS = token_ids()
AOT: dict[str, Any] = {"inner": "aot_eager"}


def infer(model: Callable[..., Any], ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def assert_every_graph_fuses(report: Report, fused: int = 4, graphs: int | None = None) -> None:
    assert report.graphs
    for graph in report.graphs:
        assert sum(site.status == "fused" for site in graph.sites) == fused, str(report)
        assert len(graph.sites) == fused + 1
    if graphs is not None:
        assert len(report.graphs) == graphs


class Block(nn.Module):
    """A norm and the linear that it feeds."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.RMSNorm(64, eps=eps), nn.Linear(64, 32)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def block_reference(block: Block, x: Tensor) -> Tensor:
    """The gain folded into the weight."""
    eps = block.norm.eps
    y = functional.mxnorm(x, block.norm.weight, eps=eps)
    values, scales, _ = functional.mxnorm_cast(x, eps=eps)
    linear = block.linear
    quantized = (values, scales)
    return functional.mx_linear(
        y, linear.weight, linear.bias, gain=block.norm.weight, quantized=quantized
    )


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_as_good_as_eager(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Inductor's error against float64 is that of eager mode: which elements round to another
    fp8 value decides it. Where none does, sums of up to 128 terms in any order are off by 128 U.
    """
    assert relative_error(got, truth) <= max(1.5 * relative_error(eager, truth), 128 * U)


def generate(model: LlamaForCausalLM, **kwargs: Any) -> Tensor:
    model.generation_config.eos_token_id = None
    kwargs = {"max_new_tokens": 4, **kwargs}
    return model.generate(do_sample=False, pad_token_id=0, **kwargs)


def eager_and_truth(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    return block_reference(block, x), block_reference(copy.deepcopy(block).double(), x.double())


# Tensor subclasses


class Tagged(torch.Tensor):
    """A traceable wrapper around one tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tagged:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return "Tagged"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors: Any, context: None, size: Any, stride: Any) -> Tagged:
        return cls(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        return torch.utils._pytree.tree_map_only(Tensor, cls, out)
