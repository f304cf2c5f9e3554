"""The random Hadamard transform, which spreads an outlier over its block.

Sources: Tseng et al. 2025, "Training LLMs with MXFP4", arXiv 2502.20586, section 3;
NVIDIA 2025, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, section 4.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from mxnorm_pass.numerics.checks import check_choice
from mxnorm_pass.numerics.philox import BITS, Draw, Use

Signs = Literal["random", "fixed", "none"]

# Bit i is set where sign i is negative. TransformerEngine's (get_wgrad_sign_vector in
# pytorch/tensor/nvfp4_tensor.py), so that its runs can be repeated.
FIXED_SIGNS: Final = 0xD7E8
FIXED_COUNT: Final = 16


@dataclass(frozen=True)
class Hadamard:
    """The transform that both operands of a matmul go through, and that cancels in their product.

    Attributes:
        size: g, of the pieces that the contraction is cut into; a power of two, at least 2.
        signs: "random", drawn anew for every matmul of every step (arXiv 2502.20586); "fixed",
            NVIDIA's 16, repeated (arXiv 2509.25149); "none", all positive (arXiv 2605.09825).
    """

    size: int
    signs: Signs = "random"

    def __post_init__(self) -> None:
        size = self.size
        if not isinstance(size, int) or isinstance(size, bool) or size < 2 or size & (size - 1):
            raise ValueError(
                f"hadamard is {size!r}; it must be a power of two of at least 2, such as 64, or 0 "
                "for none"
            )
        check_choice("signs", self.signs, get_args(Signs))

    def transform(self, x: Tensor, draw: Draw | None) -> Tensor:
        """:func:`hadamard_transform` of [..., C], C a multiple of the size, by its own signs.

        Raises:
            ValueError: the signs are random and there is no ``draw``.
        """
        return hadamard_transform(x, self.size, self._signs(x.device, draw))

    def _signs(self, device: torch.device, draw: Draw | None) -> Tensor | None:
        if self.signs == "none":
            return None
        if self.signs == "fixed":
            bits = FIXED_SIGNS >> (torch.arange(self.size, device=device) % FIXED_COUNT)
            return 1.0 - 2.0 * (bits & 1)
        if draw is None:
            raise ValueError("random signs need a seed")
        return 1.0 - 2.0 * (draw.numbers(1, self.size, Use.SIGNS)[0] >> (BITS - 1))


def hadamard_transform(x: Tensor, size: int, signs: Tensor | None = None) -> Tensor:
    """x diag(signs) H / sqrt(g) of every piece of g elements, H Sylvester's Hadamard matrix.

    In float32, by log2 g rounds of sums and differences, neighbours first, then one product with
    1 / sqrt(g) rounded to float32: an order that any backend repeats bit for bit.

    Args:
        x: [..., C], floating point; C a multiple of ``size``.
        size: g, a power of two.
        signs: [g], 1 or -1; None for all 1.

    Returns:
        [..., C] float32.

    Raises:
        ValueError: C is no multiple of ``size``.
    """
    if x.shape[-1] % size != 0:
        raise ValueError(
            f"the last dimension of shape {tuple(x.shape)} is no multiple of {size}; pad it"
        )
    pieces = x.to(torch.float32).unflatten(-1, (x.shape[-1] // size, size))
    if signs is not None:
        pieces = pieces * signs
    for stage in range(size.bit_length() - 1):
        pairs = pieces.unflatten(-1, (-1, 2, 1 << stage))
        first, second = pairs.unbind(-2)
        pieces = torch.stack((first + second, first - second), -2).flatten(-3)
    transformed: Tensor = (pieces * (1 / math.sqrt(size))).flatten(-2)
    return transformed
