"""What a kernel is asked to make of an operand. Needs no Triton, so that graphs can say it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.numerics.matmul import Operand


@dataclass(frozen=True, eq=False)
class OperandRead:
    """A matrix, or its transpose, as an operand of a matmul.

    Attributes:
        operand: what becomes of it.
        seed: [] int64, of the graph; None where nothing is random.
        key, right_key: see ``ops.operands``.
        tensor_scale: [] float32, of NVFP4.
        dequantize: return what values and scales make in this dtype in their place.
    """

    operand: Operand
    seed: Tensor | None = None
    key: int = 0
    right_key: int = 0
    tensor_scale: Tensor | None = None
    dequantize: torch.dtype | None = None

    @property
    def format(self) -> BlockFormat:
        fmt = self.operand.cast.format
        assert fmt is not None, "an operand of high precision has no cast"
        return fmt

    @property
    def hadamard_size(self) -> int:
        """0 for no transform."""
        return 0 if self.operand.hadamard is None else self.operand.hadamard.size
