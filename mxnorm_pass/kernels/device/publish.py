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
def wait_for(ptr, mask):
    """What :func:`publish` stored at ``ptr``, as soon as all of it is there; 0 outside ``mask``."""
    there = tl.min((tl.load(ptr, mask, 1, volatile=True) != 0).to(tl.int32))
    while there == 0:
        there = tl.min((tl.load(ptr, mask, 1, volatile=True) != 0).to(tl.int32))
    # Threads may share a word: each has looked for itself, and the minimum counts one of them.
    words = tl.load(ptr, mask, 1, volatile=True)
    return tl.where(mask, words ^ SIGN, 0).to(tl.float32, bitcast=True)
