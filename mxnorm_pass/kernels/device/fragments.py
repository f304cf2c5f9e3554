"""Device functions in Gluon: MXFP8 in the layouts that tensor cores' registers have.

A lane of ``mma.m16n8k16`` holds elements 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16 along K, t being
its place among four. A sum does not ask for the order of what it adds: here they are bytes 4t to
4t + 3 of both operands, one word of memory, and ``ldmatrix`` hands a lane just these.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def words_of_lanes(rows, warps):
    """Layout of [rows, 32 warps] words: of 128 bytes for a warp, a word of each 16 for a lane."""
    registers = [[0, 4], [0, 8], [0, 16]]
    registers += [[1 << i, 0] for i in range(3, rows.bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    across = [[0, 32 << i] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, across, [], [rows, 32 * warps])


@gluon.jit
def blocks_of(words, W: gl.constexpr):
    """[R, 32 W] words as four [W, R, 2, 4]: the blocks of 32 elements of each warp."""
    R: gl.constexpr = words.shape[0]
    by_block = gl.permute(words.reshape([R, W, 2, 2, 2, 4]), (1, 0, 4, 5, 2, 3))
    even, odd = gl.split(by_block)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def e4m3_as_float16(words):
    """[W, R, 2, 4] words of four E4M3 elements as float16 [W, R, 32], in a fragment's order."""
    W: gl.constexpr = words.shape[0]
    R: gl.constexpr = words.shape[1]
    a, b, c, d = e4m3_bytes_as_float16(words)
    return gl.permute(gl.join(gl.join(a, b), gl.join(c, d)), (0, 1, 2, 5, 3, 4)).reshape([W, R, 32])


@gluon.jit
def e4m3_bytes_as_float16(words):
    """The four elements of each word, from the lowest byte on."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 first, second;
        mov.b32 {low, high}, $4;
        cvt.rn.f16x2.e4m3x2 first, low;
        cvt.rn.f16x2.e4m3x2 second, high;
        mov.b32 {$0, $1}, first;
        mov.b32 {$2, $3}, second;
        }""",
        "=h,=h,=h,=h,r",
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def e8m0_value(words, byte: gl.constexpr):
    """A byte of each word as the float32 that it stands for; 255, which is NaN, as infinity."""
    if byte == 3:
        bits = words >> 1
    else:
        bits = words << (23 - 8 * byte)
    # 2^-127 is subnormal.
    return gl.maximum(bits & 0x7F800000, 0x00400000).to(gl.float32, bitcast=True)


@gluon.jit
def nan_bytes(words):
    """Other than 0 where one of a word's four E8M0 bytes is NaN."""
    return ((words & 0x7F7F7F7F) + 0x01010101) & words & -0x7F7F7F80
