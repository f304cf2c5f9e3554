"""torchao's NVFP4 training without a Blackwell: stand-ins for its three kernels and its matmul.

torchao defines the ops only where it finds Triton and a GPU. These have its schemas
(prototype/moe_training/nvfp4_training) and compute about the same on a CPU: they round to nearest
where torchao rounds stochastically, and scale weights in rows of 16 instead of 16 x 16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from sm100 import believed_sm100
from torch import Tensor, nn
from torchao.prototype.moe_training.nvfp4_training import nvfp4_linear
from torchao.prototype.moe_training.nvfp4_training.hadamard_utils import get_rht_matrix
from torchao.prototype.moe_training.nvfp4_training.nvfp4_training import NVFP4TrainingConfig
from torchao.prototype.mx_formats.nvfp4_tensor import per_tensor_amax_to_scale
from torchao.quantization import quantize_

from mxnorm_pass import functional
from mxnorm_pass.numerics.layout import blocked_scales

SIGNS = (1, -1, 1, 1, -1, -1, 1, -1, 1, 1, 1, -1, -1, 1, -1, -1)
AMAX = "triton_rht_amax"
QUANTIZE = "triton_rht_quantize_row_col"
WEIGHT = "triton_weight_quantize_2d"
SCHEMAS = {
    AMAX: "(Tensor A, SymInt[] sign_vector, SymInt hadamard_dimension=16, SymInt scaling_type=0) "
    "-> (Tensor, Tensor)",
    QUANTIZE: "(Tensor A, Tensor col_global_amax, Tensor row_global_amax, SymInt[] sign_vector, "
    "bool stochastic_rounding=False, SymInt hadamard_dimension=16, SymInt scaling_type=0, "
    "Tensor? col_seed_base=None, Tensor? col_offset_base=None, Tensor? row_offset_base=None, "
    "Tensor? row_seed_base=None) -> (Tensor, Tensor, Tensor, Tensor)",
    WEIGHT: "(Tensor A, Tensor global_amax) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _turned(x: Tensor, signs: Collection[int]) -> Tensor:
    """The transpose, its rows turned 16 by 16 by the signed Hadamard matrix."""
    matrix = get_rht_matrix(tuple(signs), str(x.device), x.dtype, 16)
    return (x.t().reshape(-1, 16) @ matrix).view(x.shape[1], x.shape[0])


def _amax(x: Tensor, signs: Collection[int], *_: Any) -> tuple[Tensor, Tensor]:
    return _turned(x, signs).abs().max().float(), x.abs().max().float()


def _quantize(
    x: Tensor, columns: Tensor, rows: Tensor, signs: Collection[int], *_: Any
) -> tuple[Tensor, ...]:
    return (*_cast(_turned(x, signs), columns), *_cast(x, rows))


def _quantize_weight(x: Tensor, amax: Tensor) -> tuple[Tensor, ...]:
    return (*_cast(x, amax), *_cast(x.t().contiguous(), amax))


def _cast(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    scale = per_tensor_amax_to_scale(amax)
    values, scales = functional.mx_cast(x, "nvfp4", tensor_scale=scale)
    rows, columns = x.shape
    return values, blocked_scales(scales).view(rows // 128, columns // 64, 32, 16)


def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    values = x.new_empty((rows, columns // 2), dtype=torch.uint8)
    scales = (rows // 128, columns // 64, 32, 16)
    return values, x.new_empty(scales, dtype=torch.float8_e4m3fn)


_KERNELS: dict[str, Callable[..., Any]] = {
    AMAX: _amax,
    QUANTIZE: _quantize,
    WEIGHT: _quantize_weight,
}
_FAKES: dict[str, Callable[..., Any]] = {
    AMAX: lambda x, *_: tuple(x.new_empty((), dtype=torch.float32) for _ in range(2)),
    QUANTIZE: lambda x, *_, **__: (*_like(x.t()), *_like(x)),
    WEIGHT: lambda x, _: (*_like(x), *_like(x.t())),
}


@contextmanager
def nvfp4_training() -> Iterator[None]:
    """torchao's ops exist, and its matmuls run on a CPU."""
    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("torchao", "FRAGMENT"))
        for name, schema in SCHEMAS.items():
            library.define(name + schema)
            library.impl(name, _KERNELS[name], "CPU")
            torch.library.register_fake(f"torchao::{name}", _FAKES[name], lib=library)
            op = getattr(torch.ops.torchao, name)
            stack.enter_context(mock.patch.object(nvfp4_linear, name, op))
        stack.enter_context(believed_sm100())
        yield


def convert_to_nvfp4_training(model: nn.Module, names: Collection[str]) -> nn.Module:
    """torchao's NVFP4 linears in the place of those whose last name component is given."""

    def is_converted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.rpartition(".")[2] in names

    quantize_(model, NVFP4TrainingConfig(rht_sign_vector=SIGNS), filter_fn=is_converted)
    return model
