"""Device functions: float32 rounded to elements, to nearest even or at random, and in bytes.

What ``numerics.elements`` computes. The hardware converts to float8, and to 6 and 4 bits from
Blackwell on; elsewhere, and in Triton's interpreter, which loses the carry of float8, float32's
own rounding does it: of a sum whose last place is the element's. At random the sum is that of the
element, noise of up to a step, and rounding toward zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxnorm_pass.kernels.device.rounding import INTERPRETED, add_toward_zero, widen


@triton.jit
def to_float8(
    x, dtype: tl.constexpr, mantissa_bits: tl.constexpr, largest: tl.constexpr, noise=None
):
    """``x``, float32, as float8: saturated at ``largest``, NaN stays NaN."""
    if INTERPRETED or noise is not None:
        size = size_codes(x, 8, mantissa_bits, largest, noise) & 0x7F
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (tl.where(x == x, size, 0x7F) | sign).to(tl.uint8).to(dtype, bitcast=True)
    # The hardware's conversion saturates.
    return x.to(dtype)


@triton.jit
def to_elements(
    y,
    factor,
    mode: tl.constexpr,
    dtype: tl.constexpr,
    bits: tl.constexpr,
    mantissa_bits: tl.constexpr,
    largest: tl.constexpr,
    CONVERTS: tl.constexpr,
    noise=None,
):
    """Elements of blocks ``y`` [M, K, B] times ``factor`` [M, K], which ``mode`` has made.

    Args:
        factor: float32, finite or NaN; 0 or NaN where there is NaN in the block.
        CONVERTS: does the hardware convert to less than 8 bits?
        noise: [M, K, B], see ``noise.noise_of``, to round at random; None: to nearest even.

    Returns:
        ``dtype`` [M, K, B]; elements of 4 bits as uint32 [M, K, B / 8]. NaN stays NaN in float8;
        in fewer bits it becomes 0.
    """
    if noise is not None:
        x = widen(y) * tl.expand_dims(factor, 2)
        if bits == 8:
            return to_float8(x, dtype, mantissa_bits, largest, noise)
        else:
            # Triton (3.9) compiles what follows such a return, too.
            return to_narrow(x, factor, dtype, bits, mantissa_bits, largest, False, noise)
    elif bits == 8:
        return to_float8(scaled(y, factor, mode), dtype, mantissa_bits, largest)
    elif bits == 6 or CONVERTS or INTERPRETED:
        x = scaled(y, factor, mode)
        return to_narrow(x, factor, dtype, bits, mantissa_bits, largest, CONVERTS)
    elif mode == "rceil" or mode == "nearest":
        return add_to_e2m1(widen(y), factor)
    else:
        # These have factors of 0, by which infinity becomes NaN, but what is finite keeps a sign.
        return add_to_e2m1(scaled(y, factor, mode), tl.full(factor.shape, 1.0, tl.float32))


@triton.jit
def scaled(y, factor, mode: tl.constexpr):
    """Blocks ``y`` [M, K, B] times ``factor`` [M, K], float32."""
    of_blocks = tl.expand_dims(factor, 2)
    if y.dtype == tl.bfloat16 and mode != "nearest" and not INTERPRETED:
        # Two at once. The factor is a power of two, 0 or NaN: a product is exact, or subnormal,
        # which no element is near.
        return widen(y * of_blocks.to(tl.bfloat16))
    return widen(y) * of_blocks


@triton.jit
def to_narrow(
    x,
    factor,
    dtype: tl.constexpr,
    bits: tl.constexpr,
    mantissa_bits: tl.constexpr,
    largest: tl.constexpr,
    CONVERTS: tl.constexpr,
    noise=None,
):
    """:func:`to_elements` for 6 and 4 bits, of a product."""
    if INTERPRETED:
        # On a GPU NaN that is computed has no sign.
        x = tl.where(x == x, x, float("nan"))
    # NaN has become the largest element, beside nothing but zeros: signs are all that is kept.
    signs: tl.constexpr = 0x88888888 if bits == 4 else 0x20202020
    kept = tl.where(tl.abs(factor) > 0, 0xFFFFFFFF, signs).to(tl.uint32)
    if bits == 4:
        parts = eighths(x)
        if CONVERTS:
            words = convert_to_e2m1(parts)
        elif noise is None:
            words = pack(parts, largest, (None, None, None, None, None, None, None, None))
        else:
            words = pack(parts, largest, eighths(noise))
        return words & of_words(kept, x)
    elif CONVERTS:
        return convert_to_fp6(x, tl.expand_dims(kept, 2), mantissa_bits)
    else:
        size = size_codes(x, bits, mantissa_bits, largest, noise)
        sign = x.to(tl.uint32, bitcast=True) >> (32 - bits)
        return (((size & 0x1F) | (sign & 0x20)) & tl.expand_dims(kept, 2)).to(dtype)


@triton.jit
def round_to_element(
    x, bits: tl.constexpr, mantissa_bits: tl.constexpr, largest: tl.constexpr, noise=None
):
    """The value in float32 of the element that ``x`` becomes; of NaN any."""
    total, start, _ = add_steps(x, bits, mantissa_bits, largest, noise)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return ((total - start).to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def size_codes(
    x, bits: tl.constexpr, mantissa_bits: tl.constexpr, largest: tl.constexpr, noise=None
):
    """uint32 whose last ``bits - 1`` bits are the element of |x|; of NaN any. The rest is noise."""
    total, _, exponent = add_steps(x, bits, mantissa_bits, largest, noise)
    return total.to(tl.uint32, bitcast=True) + (exponent >> (23 - mantissa_bits))


@triton.jit
def add_steps(x, bits: tl.constexpr, mantissa_bits: tl.constexpr, largest: tl.constexpr, noise):
    """Round |x| by adding a number whose last place is the step between elements near |x|.

    With noise a sum below the next element is rounded down to this one, whatever it is rounded to
    before, since elements are float32: two sums toward zero are one.

    Returns:
        the sum, whose last bits count steps; the number; and uint32 with nothing but the exponent
        of |x|, at least that of the smallest normal element. The count begins at ``zero`` so that
        the element is the sum's bits plus that exponent, shifted to where the element has it.
    """
    smallest: tl.constexpr = 2 - (1 << (bits - 2 - mantissa_bits))
    zero: tl.constexpr = (-(smallest + 127) * (1 << mantissa_bits)) % (1 << (bits - 1))
    factor: tl.constexpr = 2.0 ** (23 - mantissa_bits) + zero * 2.0**-mantissa_bits
    size = tl.minimum(tl.abs(x), largest)
    exponent = tl.maximum(size, 2.0**smallest).to(tl.uint32, bitcast=True) & 0x7F800000
    power = exponent.to(tl.float32, bitcast=True)
    start = power * factor
    if noise is None:
        total = start + size
    else:
        size = add_toward_zero(size, noise * power)
        total = add_toward_zero(start, size)
    return total, start, exponent


@triton.jit
def eighths(x):
    """[M, K, B] as eight of [M, K, B / 8]: what goes into the nibbles of words."""
    x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 8, 2, 2, 2])
    even, odd = tl.split(x)
    x02, x13 = tl.split(even), tl.split(odd)
    x04, x26 = tl.split(x02[0]), tl.split(x02[1])
    x15, x37 = tl.split(x13[0]), tl.split(x13[1])
    return x04[0], x15[0], x26[0], x37[0], x04[1], x15[1], x26[1], x37[1]


@triton.jit
def pack(parts, largest: tl.constexpr, noises):
    """Eight float32 as words of e2m1."""
    words = tl.zeros_like(parts[0]).to(tl.uint32)
    for i in tl.static_range(8):
        sign = (parts[i].to(tl.uint32, bitcast=True) >> 28) & 8
        words |= ((size_codes(parts[i], 4, 1, largest, noises[i]) & 7) | sign) << 4 * i
    return words


def _e2m1_by_adding() -> str:
    """PTX of a word $0 of e2m1: of $1 to $8 times 8 * $9, with signs where $10 has ones.

    In 7.5 instructions for an element, of which 4 are of the pipe that has half the rate. The
    size is the product saturated at 1, an eighth of what is to be rounded, so that NaN is 0.
    Added to it is 2^22 + 6 times its power of two: the sum's last place is the step between
    elements there, and its mantissa counts steps, from twelve on. Two shifts in one product bring
    that count and the sum's exponent together in the four highest bits, where they add up to
    sixteen and the element's code; 8, which saturation leaves, becomes 7 in all eight at once.
    """
    lines = ["{", ".reg .f32 size, step; .reg .b32 bits, sizes, signs;"]
    lines += ["mov.b32 sizes, 0; mov.b32 signs, 0;"]
    for i in range(8, 0, -1):
        lines += [
            f"abs.f32 size, ${i}; mul.sat.f32 size, size, $9;",
            "max.f32 step, size, 0f3E000000;",
            "mov.b32 bits, step; and.b32 bits, bits, 0x7F800000; mov.b32 step, bits;",
            "fma.rn.f32 step, step, 0f4A80000C, size;",
            "mov.b32 bits, step; mul.lo.u32 bits, bits, 0x10000040;",
            "shf.l.wrap.b32 sizes, bits, sizes, 4;",
            f"mov.b32 bits, ${i}; shf.l.wrap.b32 signs, bits, signs, 4;",
        ]
    lines += [
        "shr.u32 bits, sizes, 3; and.b32 bits, bits, 0x11111111; sub.u32 sizes, sizes, bits;",
        "lop3.b32 $0, signs, $10, sizes, 0xEA;",
        "}",
    ]
    # On one line: Inductor quotes what a kernel reads, and not its line breaks.
    return " ".join(lines)


_E2M1_BY_ADDING = tl.constexpr(_e2m1_by_adding())


@triton.jit
def add_to_e2m1(y, factor):
    """Words of e2m1 of ``y`` [M, K, B] times ``factor`` [M, K], positive or NaN.

    Exact where an eighth of the factor is: from 2^-123 on, or a power of two. What is below belongs
    to rows of more than 2^120.
    """
    signs = tl.where(factor == factor, 0x88888888, 0).to(tl.uint32)
    return tl.inline_asm_elementwise(
        _E2M1_BY_ADDING,
        "=r,f,f,f,f,f,f,f,f,f,r",
        eighths(y) + (of_words(factor * 0.125, y), of_words(signs, y)),
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def of_words(of_blocks, y):
    """[M, K] as [M, K, B / 8], laid out over the threads as the eighths of ``y`` [M, K, B]."""
    return eighths(tl.broadcast_to(tl.expand_dims(of_blocks, 2), y.shape))[0]


@triton.jit
def convert_to_e2m1(parts):
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b8 a, b, c, d;
            cvt.rn.satfinite.e2m1x2.f32 a, $2, $1;
            cvt.rn.satfinite.e2m1x2.f32 b, $4, $3;
            cvt.rn.satfinite.e2m1x2.f32 c, $6, $5;
            cvt.rn.satfinite.e2m1x2.f32 d, $8, $7;
            mov.b32 $0, {a, b, c, d};
        }
        """,
        "=r,f,f,f,f,f,f,f,f",
        parts,
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def convert_to_fp6(x, kept, mantissa_bits: tl.constexpr):
    PAIR: tl.constexpr = "e2m3x2" if mantissa_bits == 3 else "e3m2x2"
    return tl.inline_asm_elementwise(
        """
        {
            .reg .b16 a, b;
            .reg .b32 four;
            cvt.rn.satfinite."""
        + PAIR
        + """.f32 a, $2, $1;
            cvt.rn.satfinite."""
        + PAIR
        + """.f32 b, $4, $3;
            mov.b32 four, {a, b};
            and.b32 $0, four, $5;
        }
        """,
        "=r,f,f,f,f,r,r,r,r",
        [x, kept],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def lay_out_as_bytes(ptr, offsets, never):
    """Store nothing, so that the compiler lays out what has this shape as if it were stored so.

    A thread then has 16 elements next to each other, as where they are bytes, and blocks are
    within two lanes. With the 8 that one load brings twice as many scales would be computed.

    Args:
        never: false, which the compiler must not see.
    """
    if not INTERPRETED:
        tl.store(ptr + offsets, tl.zeros(offsets.shape, tl.uint8), mask=never)


@triton.jit
def words_of(ELEMENTS: tl.constexpr):
    """Indices of the words that elements of 4 bits fill, to be stored two at once.

    No more are next to each other in a thread; the compiler would exchange them between threads.
    """
    return tl.max_contiguous(tl.arange(0, ELEMENTS // 8), 2)
