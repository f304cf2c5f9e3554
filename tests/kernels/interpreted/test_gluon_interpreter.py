"""What runs Gluon on a CPU sees copies that are read too early, and what they overwrite too early.

A GPU may well compute the right sums here, by chance.
"""

from __future__ import annotations

import pytest
import torch
from gluon_interpreter import Interpreted
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mxnorm_pass.kernels.mx_linear_rows import copy_to_shared


@gluon.jit
def _copy(x_ptr, y_ptr, N: gl.constexpr, OUTSTANDING: gl.constexpr, EARLY: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    at = gl.arange(0, N, layout)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = gl.allocate_shared_memory(gl.int32, [1, N], shared)
    copy_to_shared(memory.index(0), x_ptr + at)
    async_copy.commit_group()
    async_copy.wait_group(OUTSTANDING)
    if EARLY:
        copy_to_shared(memory.index(0), x_ptr + at)
    gl.store(y_ptr + at, memory.index(0).load(layout), at >= 0)


def copied(outstanding: int = 0, early: bool = False, count: int = 32) -> bool:
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    Interpreted(_copy)[(1,)](x, y, N=count, OUTSTANDING=outstanding, EARLY=early, num_warps=1)
    assert y.equal(x) or (y == -1).all()
    return y.equal(x)


def test_copies_land_when_they_are_waited_for() -> None:
    assert copied()
    assert not copied(outstanding=1)
    assert not copied(early=True)


def test_memory_outside_of_a_tensor_is_out_of_reach() -> None:
    with pytest.raises(AssertionError, match="outside of the tensor"):
        copied(count=64)
