"""Stochastic rounding: up or down at random, so that the mean of many is the number itself.

Source: Tseng et al. 2025, "Training LLMs with MXFP4", arXiv 2502.20586, section 3.1 (algorithm 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxnorm_pass.numerics.formats import BlockFormat
from mxnorm_pass.numerics.philox import BITS


def round_stochastically(x: Tensor, numbers: Tensor) -> Tensor:
    """To the integer below or above; above with the probability of the fraction, within 2**-17.

    Args:
        x: float32, non-negative.
        numbers: of its shape, integers in [0, 2**16).

    Returns:
        float32; integers stay what they are.
    """
    below = torch.floor(x)
    # The middle of each of 2**16 strata. Compared, not added: a sum is rounded itself, and may move
    # an integer.
    uniform = (numbers.to(torch.float32) + 0.5) * 2.0**-BITS
    return below + (x - below >= uniform).to(torch.float32)


def headroom(fmt: BlockFormat) -> float:
    """What a block is multiplied by so that rounding, up or down, saturates none of its elements.

    A shared exponent of floor(log2 absmax) leaves elements of up to twice the largest power of two
    of the format, more than its largest element: of MXFP4 8 where 6 is the largest, hence 3/4 (of
    "even" scales less than 8). Other scales are rounded up, or, in NVFP4, to the nearest e4m3
    number: there the largest element of every second block saturates, as in TransformerEngine, and
    the mean of many falls short by what it loses.
    """
    if fmt.scale_mode not in ("floor", "even"):
        return 1.0
    return fmt.element.max / 2.0 ** (fmt.element.max_exponent + 1)
