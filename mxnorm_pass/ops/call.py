"""Which kernel runs an op of this package, if one can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mxnorm_pass.kernels.coverage import uncovered, uncovered_both
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.numerics.norm_cast import NormCastSpec
from mxnorm_pass.numerics.recipe_text import operand_of_text
from mxnorm_pass.ops.checks import check_norm_cast


@dataclass(frozen=True)
class NormCastCall:
    """A call of ``norm_cast`` or its kin, by the names of its arguments.

    Attributes:
        gain_in_rows: None for the ops that cast along D alone.
        along_t: the cast along T, where it is not that along D.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    block_weights: Tensor | None
    tensor_scale: Tensor | None
    spec: NormCastSpec
    gain_in_rows: bool | None
    along_t: OperandRead | None

    @classmethod
    def of(cls, op: Any, args: Sequence[Any]) -> NormCastCall:
        arguments = op._schema.arguments
        given = {argument.name: argument.default_value for argument in arguments}
        given |= zip([argument.name for argument in arguments], args, strict=False)
        return cls(
            x=given["x"],
            residual=given.get("residual"),
            weight=given["weight"],
            block_weights=given["block_weights"],
            tensor_scale=given["tensor_scale"],
            spec=NormCastSpec.of_arguments(*(given[f.name] for f in fields(NormCastSpec))),
            gain_in_rows=given.get("gain_in_rows"),
            along_t=_along_t(given),
        )

    @property
    def device(self) -> torch.device:
        return self.x.device

    def why_no_kernel(self) -> str | None:
        """Why no kernel can run it; None if one can."""
        others = (self.residual, self.weight, self.block_weights, self.tensor_scale)
        if self.gain_in_rows is None:
            return uncovered(self.x, self.spec, *others)
        return uncovered_both(self.x, self.spec, self.along_t, *others)

    def run_kernel(self, dequantize: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The op's results, from one kernel.

        Args:
            dequantize: in the place of values and scales along D return what they make
                dequantised to this dtype.
        """
        check_norm_cast(
            self.x, self.weight, self.block_weights, self.tensor_scale, self.spec, self.residual
        )
        inputs = (self.x, self.weight, self.block_weights, self.spec)
        options: dict[str, Any] = {
            "tensor_scale": self.tensor_scale,
            "residual": self.residual,
            "dequantize": dequantize,
        }
        if self.gain_in_rows is None:
            from mxnorm_pass.kernels.norm_cast import norm_cast

            return norm_cast(*inputs, **options)
        from mxnorm_pass.kernels.norm_cast_both import norm_cast_both

        return norm_cast_both(*inputs, self.gain_in_rows, along_t=self.along_t, **options)


def _along_t(given: Mapping[str, Any]) -> OperandRead | None:
    text = given.get("along_t", "")
    if not text:
        return None
    return OperandRead(operand_of_text(text), given["seed"], given["key"], given["right_key"])
