"""Launch every kernel on shapes that do not fill its programs, for compute-sanitizer.

    options="--kernel-regex kns=cast python examples/sanitize_kernels.py"
    compute-sanitizer --tool memcheck $options
    compute-sanitizer --tool racecheck $options

And both with ``kns=mx_linear``. The regular expressions leave out the kernels of PyTorch that make
the inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxnorm_pass.kernels.mx_linear import mx_linears
from mxnorm_pass.kernels.norm_cast import norm_cast
from mxnorm_pass.kernels.norm_cast_both import norm_cast_both
from mxnorm_pass.kernels.operand_casts import operand_casts
from mxnorm_pass.kernels.operand_read import OperandRead
from mxnorm_pass.numerics.cast import mx_cast
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.numerics.matmul import Operand
from mxnorm_pass.numerics.norm_cast import NormCastSpec
from mxnorm_pass.numerics.philox import Use
from mxnorm_pass.numerics.recipe import RECIPES

ROW_MAJOR = NormCastSpec(
    1e-6, "mxnorm", 2.0, BlockFormat(), torch.bfloat16, torch.bfloat16, "row-major",
)  # fmt: skip
BLOCKED = replace(ROW_MAJOR, scale_layout="blocked")
FP4 = replace(BLOCKED, format=block_format("nvfp4"))
# Rows that stay in registers, full and not, and rows in chunks.
ROW_SHAPES = [(tokens, width) for width in (96, 5120, 40000) for tokens in (5, 130)]
# Less than a group of rows, fewer groups than the lag, more; without and with prefetched rows.
BOTH_SHAPES = [(t, width) for width in (160, 4096, 8192, 16384) for t in (96, 512, 1312)]
# One row, and tiles of 8, 16 and 32 that are not full; columns that do not fill a program.
LINEAR_SHAPES = [(rows, width) for width in (128, 4096, 11008) for rows in (1, 5, 13, 33)]
COLUMNS = 1001


def inputs(tokens: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, gain and residual."""
    make = torch.Generator(device).manual_seed(tokens + width)
    x = torch.randn(2, tokens, width, generator=make, device=device).bfloat16()
    return x[0], x[0, 0].clone(), x[1]


def along_d(tokens: int, width: int, device: str = "cuda") -> None:
    """Both estimators, a general p, both scale layouts, 8 and 4 bits, with and without the rest."""
    x, gain, residual = inputs(tokens, width, device)
    norm_cast(x, gain, None, BLOCKED)
    norm_cast(x, None, None, replace(ROW_MAJOR, estimator="exact"), residual=residual)
    norm_cast(x, gain, None, replace(ROW_MAJOR, p=1.5), dequantize=torch.bfloat16)
    norm_cast(x, None, None, FP4, tensor_scale=gain.float().abs().amax())


def along_both(tokens: int, width: int, device: str = "cuda") -> None:
    """Both scale layouts, 8 and 4 bits, with and without the residual; rows whose stride is odd.

    And operands of a recipe that is random.
    """
    x, gain, residual = inputs(tokens, width, device)
    norm_cast_both(x, gain, None, BLOCKED, True)
    norm_cast_both(x, gain, None, ROW_MAJOR, False, residual=residual)
    odd = torch.cat([x[:, :1], x], 1)[:, 1:]
    norm_cast_both(odd, gain, None, ROW_MAJOR, True)
    norm_cast_both(x, None, None, FP4, True, tensor_scale=gain.float().abs().amax())
    seed = torch.zeros((), dtype=torch.int64, device=device)
    recipe = RECIPES["mxfp4-rht-sr" if tokens % 64 == 0 else "mxfp4-sr"].wgrad
    gradient, columns = (
        OperandRead(Operand(cast, recipe.hadamard, "wgrad", use), seed)
        for cast, use in ((recipe.left, Use.LEFT), (recipe.right, Use.RIGHT))
    )
    norm_cast_both(x, gain, None, ROW_MAJOR, True, along_t=columns)
    operand_casts(x.contiguous()[:, : width // 64 * 64], gradient, gradient)


def linears(rows: int, width: int, device: str = "cuda", columns: int = COLUMNS) -> None:
    """One, and three with a bias."""
    x, bias, _ = inputs(rows, width, device)
    weight, _, _ = inputs(columns, width, device)
    x_operand, (values, scales) = mx_cast(x), mx_cast(weight)
    mx_linears(*x_operand, [values], [scales], [None], torch.bfloat16)
    bias = bias.repeat(columns // width + 1)
    counts = (columns, columns // 2, columns // 3)
    cut = [(values[:n], scales[:n], bias[:n]) for n in counts]
    mx_linears(*x_operand, *map(list, zip(*cut, strict=True)), torch.float32)


def main() -> None:
    for shape in ROW_SHAPES:
        along_d(*shape)
    for shape in BOTH_SHAPES:
        along_both(*shape)
    for shape in LINEAR_SHAPES:
        linears(*shape)
    torch.cuda.synchronize()
    count = 4 * len(ROW_SHAPES) + 6 * len(BOTH_SHAPES) + 2 * len(LINEAR_SHAPES)
    print(f"{count} launches")


if __name__ == "__main__":
    main()
