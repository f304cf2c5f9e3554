"""The ops that transform and cast operands of matmuls, as recipes say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.kernels.coverage import uncovered_operand
from mxnorm_pass.numerics.matmul import Operand, cast_operand, transform_operand
from mxnorm_pass.numerics.nvfp4 import nvfp4_tensor_scale
from mxnorm_pass.numerics.philox import Draw, Matmul, Use
from mxnorm_pass.numerics.recipe_text import operand_of_text, operand_text
from mxnorm_pass.ops.casts import cast, dequantize, empty_cast, tensor_scale
from mxnorm_pass.ops.checks import check_blocks
from mxnorm_pass.ops.define import Op, define


def draw_of(
    device: torch.device, seed: Tensor | None, key: int, right_key: int, matmul: Matmul
) -> Draw | None:
    """The draw of a graph's seed and a linear's keys; None where there is no seed."""
    if seed is None:
        return None
    # One seed serves a graph, whose linears may be on several devices.
    seed = seed.to(device)
    return Draw(seed + key, matmul, seed + right_key)


def read_operand(
    seed: Tensor | None,
    key: int,
    right_key: int,
    x: Tensor,
    operand: Operand,
    _: Draw | None,
    dtype: torch.dtype,
) -> Tensor:
    """A ``ReadOperand`` that calls ops."""
    fmt = operand.cast.format
    assert fmt is not None
    scale: tuple[Tensor, ...] = ()
    if operand.is_plain:
        if not fmt.has_e8m0_scales:
            scale = (tensor_scale(x),)
        options = (*(scale or (None,)), True) if operand.cast.square_blocks else scale
        values, scales = cast(x, fmt.name, *options)
    else:
        if not fmt.has_e8m0_scales:
            scale = (_tensor_scale_of(operand, seed, key, right_key, x),)
        drawn = _drawn(operand, seed, key, right_key)
        values, scales = operand_cast(x, *drawn, *(scale or (None,)))
    wide: Tensor = dequantize(values, scales, fmt.name, dtype, *scale)
    return wide


def _tensor_scale_of(
    operand: Operand, seed: Tensor | None, key: int, right_key: int, x: Tensor
) -> Tensor:
    if operand.hadamard is None:
        scale: Tensor = tensor_scale(x)
        return scale
    # Before it is rounded.
    operand = replace(operand, cast=replace(operand.cast, rounding="nearest"))
    scale = operand_tensor_scale(x, *_drawn(operand, seed, key, right_key))
    return scale


def _drawn(
    operand: Operand, seed: Tensor | None, key: int, right_key: int
) -> tuple[Tensor | None, int, int, str]:
    """The arguments of randomness, of which equal ones are equal casts."""
    if not operand.is_random:
        seed, key, right_key = None, 0, 0
    elif operand.use is Use.RIGHT or not operand.cast.is_stochastic:
        key = right_key
    elif not operand.has_random_signs:
        right_key = key
    return seed, key, right_key, operand_text(operand)


def _operand_cast(
    x: Tensor,
    seed: Tensor | None,
    key: int,
    right_key: int,
    operand: str,
    tensor_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    of, draw = _checked(x, seed, key, right_key, operand)
    hadamard, use = of.hadamard, of.use
    quantized = cast_operand(
        x.contiguous(), of.cast, hadamard=hadamard, draw=draw, use=use, tensor_scale=tensor_scale
    )
    return quantized.values, quantized.scales


def _fake_operand_cast(
    x: Tensor,
    seed: Tensor | None,
    key: int,
    right_key: int,
    operand: str,
    tensor_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    of, _ = _checked(x, seed, key, right_key, operand)
    assert of.cast.format is not None
    return empty_cast(x, of.cast.format)


def _operand_tensor_scale(
    x: Tensor, seed: Tensor | None, key: int, right_key: int, operand: str
) -> Tensor:
    of, draw = _checked(x, seed, key, right_key, operand)
    return nvfp4_tensor_scale(transform_operand(x, of.hadamard, draw))


def _fake_operand_tensor_scale(
    x: Tensor, seed: Tensor | None, key: int, right_key: int, operand: str
) -> Tensor:
    _checked(x, seed, key, right_key, operand)
    return x.new_empty((), dtype=torch.float32)


def _checked(
    x: Tensor, seed: Tensor | None, key: int, right_key: int, operand: str
) -> tuple[Operand, Draw | None]:
    of = operand_of_text(operand)
    fmt = of.cast.format
    if fmt is None or x.ndim != 2:
        raise ValueError(
            f"operand_cast: x has shape {tuple(x.shape)} and {operand} the format {fmt}; x must be "
            "[R, C], and there must be a format"
        )
    check_blocks("x", x, fmt.block_size)
    if of.is_random and seed is None:
        raise ValueError(f"operand_cast: {operand} is random and needs a seed")
    return of, draw_of(x.device, seed, key, right_key, of.matmul)


def _stays_whole(args: Sequence[Any]) -> bool:
    """Random numbers are a thousand nodes, and Inductor's C++ for casts along T not always valid.

    There (torch 2.13) it declares one variable twice, for two reads of a bfloat16 maximum.
    """
    x, _, _, _, operand, *_ = args
    return x.device.type == "cpu" or operand_of_text(operand).is_random


def operand_of_arguments(
    x: Tensor, seed: Tensor | None = None, key: int = 0, right_key: int = 0, operand: str = ""
) -> tuple[Operand | None, Draw | None]:
    """Of an op that casts x along another dimension, too; None where "" says as along this one."""
    if not operand:
        return None, None
    of = operand_of_text(operand)
    if of.cast.format is None or not of.cast.format.has_e8m0_scales:
        raise ValueError(f"along_t is {operand}; it must have a format with E8M0 scales")
    if of.is_random and seed is None:
        raise ValueError(f"along_t is {operand}, which is random and needs a seed")
    return of, draw_of(x.device, seed, key, right_key, of.matmul)


@dataclass(frozen=True)
class _OperandCall:
    """A call of ``operand_cast``."""

    x: Tensor
    seed: Tensor | None
    key: int
    right_key: int
    operand: str
    tensor_scale: Tensor | None

    @classmethod
    def of(cls, _: Any, args: Sequence[Any]) -> _OperandCall:
        return cls(*args)

    @property
    def device(self) -> torch.device:
        return self.x.device

    def why_no_kernel(self) -> str | None:
        return uncovered_operand(
            self.x, operand_of_text(self.operand), self.seed, self.tensor_scale
        )

    def run_kernel(self, dequantize: torch.dtype | None = None) -> tuple[Tensor, ...]:
        from mxnorm_pass.kernels.operand_casts import operand_casts
        from mxnorm_pass.kernels.operand_read import OperandRead

        of, _ = _checked(self.x, self.seed, self.key, self.right_key, self.operand)
        keys = (self.seed, self.key, self.right_key, self.tensor_scale)
        read = OperandRead(of, *keys, dequantize)
        if self.x.stride(0) == 1 and self.x.shape[0] > 1:
            return operand_casts(self.x.t(), None, read)
        return operand_casts(self.x, read, None)


_DRAWN = "Tensor? seed, int key, int right_key, str operand"

operand_cast = define(
    Op(
        f"operand_cast(Tensor x, {_DRAWN}, Tensor? tensor_scale) -> (Tensor values, Tensor scales)",
        _operand_cast,
        _fake_operand_cast,
        call=_OperandCall.of,
        traffic="library",
        stays_whole=_stays_whole,
    )
)
operand_tensor_scale = define(
    Op(
        f"operand_tensor_scale(Tensor x, {_DRAWN}) -> Tensor",
        _operand_tensor_scale,
        _fake_operand_tensor_scale,
        traffic="library",
        stays_whole=_stays_whole,
    )
)
