"""Device functions: hand float32 on to another program, through memory that starts as zeros.

A word that is not zero is there, which needs neither counters nor fences.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIGN = tl.constexpr(-(2**31))


@triton.jit
def publish(ptr, x, mask):
    """Store float32 as words that are not zero: the sign is flipped, and there is no -0."""
    tl.store(ptr, tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True) ^ SIGN, mask)


@triton.jit
def wait_for(ptr, mask, AGAIN: tl.constexpr):
    """What :func:`publish` stored at ``ptr``, as soon as all of it is there; 0 outside ``mask``.

    Args:
        AGAIN: there are more threads than words, so that several threads read a word, and only
            one of them is asked whether it is there: all read it again.
    """
    words = tl.load(ptr, mask, 1, volatile=True)
    while tl.min((words != 0).to(tl.int32)) == 0:
        words = tl.load(ptr, mask, 1, volatile=True)
    if AGAIN:
        words = tl.load(ptr, mask, 1, volatile=True)
    return tl.where(mask, words ^ SIGN, 0).to(tl.float32, bitcast=True)
