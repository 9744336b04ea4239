# mypy: ignore-errors
"""Rotations of frames as products with signs, which are made where they are needed: an element of
Hadamard's matrix is the parity of its indices' common bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signs_of(i, j, low, WHOLE: tl.constexpr):
    """Elements (i, j), below 256, of `codec.frames.hadamard` in blocks of low + 1: bfloat16.

    WHOLE  whether there is but one block
    """
    odd = i & j & low
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    bits = (odd & 1) << 15 | 0x3F80  # of 1.0 or -1.0
    if not WHOLE:
        bits = tl.where((i ^ j) > low, 0, bits)  # of two blocks
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def add_signed(x, signs, out, PTX: tl.constexpr):
    """out + x @ signs, to 2**-16 of x: in two pieces of bfloat16, which Triton's interpreter does
    not multiply."""
    if not PTX:
        return tl.dot(x, signs.to(tl.float32), out, input_precision="ieee")
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(high, signs, tl.dot(low, signs, out))
