# mypy: ignore-errors
"""Codes, radii, probabilities and queries as operands of matrix products (kernel.py says which).

Every function has two forms: PTX for a GPU, plain Triton for the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIGNS = 0x80808080 - (1 << 32)
"""The sign bits of four bytes, as an int32."""


@triton.constexpr_function
def byte_asm(shift, bits, place):
    """PTX that takes a digit out of four bytes at once; the top one as a signed number.

    AND and XOR are one instruction where one constant comes in a register: the kernel's first
    argument, which is SIGNS. (As an operand of this assembly it would be a tensor, whose layout the
    compiler changes through shared memory.)"""
    mask = (((1 << bits) - 1) << place) * 0x01010101
    move = "mov.b32" if shift == place else "shr.u32" if shift > place else "shl.b32"
    by = f", {abs(shift - place)}" if shift != place else ""
    take = f"and.b32 $0, t, {mask};"
    if place + bits == 8:
        take = f"ld.param.b32 s, [decode_pages_param_0]; lop3.b32 $0, t, {mask}, s, 0x6A;"
    return f"{{ .reg .b32 t, s; {move} t, $1{by}; {take} }}"


@triton.jit
def take_bytes(
    words, SHIFT: tl.constexpr, BITS: tl.constexpr, PLACE: tl.constexpr, PTX: tl.constexpr
):
    """int8 bytes -> their digit at bit SHIFT, moved to PLACE; less 128 where it fills bit 7."""
    if PTX:
        asm: tl.constexpr = byte_asm(SHIFT, BITS, PLACE)
        return tl.inline_asm_elementwise(asm, "=r,r", [words], tl.int8, True, 4)
    digit = ((words.to(tl.int32) & 0xFF) >> SHIFT & ((1 << BITS) - 1)) << PLACE
    if PLACE + BITS == 8:
        digit -= 128
    return digit.to(tl.int8)


@triton.jit
def take_runs(words, shift, BITS: tl.constexpr, PTX: tl.constexpr):
    """int8 bytes and the bit at which the digit of each lies, equal in four -> digits."""
    if PTX:
        asm: tl.constexpr = run_asm(BITS)
        shift = tl.broadcast_to(shift, words.shape)
        return tl.inline_asm_elementwise(asm, "=r,r,r,r,r,r", [words, shift], tl.int8, True, 4)
    return ((words.to(tl.int32) & 0xFF) >> shift & ((1 << BITS) - 1)).to(tl.int8)


@triton.constexpr_function
def run_asm(bits):
    mask = ((1 << bits) - 1) * 0x01010101
    return f"{{ .reg .b32 t; shr.u32 t, $1, $2; and.b32 $0, t, {mask}; }}"


@triton.constexpr_function
def digit_asm(shift, bits, place):
    """PTX that takes a digit out of two 16-bit words at once."""
    mask = (((1 << bits) - 1) << place) * 0x10001
    if shift == place:
        return f"and.b32 $0, $1, {mask};"
    if shift != place + 8:
        op = "shr.u32" if shift > place else "shl.b32"
        return f"{{ .reg .b32 t; {op} t, $1, {abs(shift - place)}; and.b32 $0, t, {mask}; }}"
    upper = "prmt.b32 t, $1, 0, 0x4341;"  # the upper byte of both words
    if bits == 8:
        return f"{{ .reg .b32 t; {upper} mov.b32 $0, t; }}"
    return f"{{ .reg .b32 t; {upper} and.b32 $0, t, {mask}; }}"


@triton.jit
def take_digit(
    words, SHIFT: tl.constexpr, BITS: tl.constexpr, PLACE: tl.constexpr, PTX: tl.constexpr
):
    """int16 words -> the digit at bit SHIFT, as float16 digit * 2**(PLACE - 24)."""
    if PTX:
        asm: tl.constexpr = digit_asm(SHIFT, BITS, PLACE)
        return tl.inline_asm_elementwise(asm, "=r,r", [words], tl.float16, True, 2)
    digit = (((words.to(tl.int32) & 0xFFFF) >> SHIFT) & ((1 << BITS) - 1)) << PLACE
    return digit.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def keep(x, PTX: tl.constexpr):
    """int8 x itself, of which the compiler does not know: keeps it from laying out anew in a loop
    what it need lay out but once."""
    if PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int8, True, 4)
    return x


@triton.jit
def hidden_zero(positive, PTX: tl.constexpr):
    """Zero, which the compiler takes for a number that may differ from lane to lane."""
    if PTX:
        asm: tl.constexpr = (
            "{ .reg .b32 t; .reg .pred p; mov.b32 t, %laneid; setp.lt.s32 p, $1, 0; "
            "selp.b32 $0, t, 0, p; }"
        )
        return tl.inline_asm_elementwise(asm, "=r,r", [positive], tl.int32, True, 1)
    return 0


@triton.jit
def token_of(row):
    """The token of each row of the keys' products, or its pair of tokens. After `turn_weights`
    every lane then has four of them in a row, as the values' product wants them."""
    return row // 16 * 16 + row // 2 % 4 * 4 + row // 8 % 2 * 2 + row % 2


@triton.jit
def by_part(p):
    """[2 rows, heads], in the order of `join_parts` -> [rows // 8, 8, heads] of either token."""
    parts = tl.reshape(p, [p.shape[0] // 16, 2, 8, p.shape[1]])
    return tl.split(tl.permute(parts, (0, 2, 3, 1)))


@triton.jit
def masses_of(p, FOLD: tl.constexpr):
    """p [P, heads] -> sums over every eighth row, [8, heads], for the even and the odd columns."""
    if FOLD == 2:
        first, second = by_part(p)
        even, odd = tl.sum(first, 0), tl.sum(second, 0)
    else:
        even = tl.sum(tl.reshape(p, [p.shape[0] // 8, 8, p.shape[1]]), 0)
        odd = even
    return even, odd


@triton.jit
def turn_weights(p, FOLD: tl.constexpr, PTX: tl.constexpr):
    """p float32 [P, heads] -> float16 pairs, int32 [P // FOLD // 8, heads // 4, 8, 4].

    Element (i, n, g, c) holds rows 8 i + 2 c and 8 i + 2 c + 1 of head 4 n + g // 2, of the token
    g % 2 of a row that has two. In registers this takes a lane's logits to where the values'
    product wants its weights.
    """
    ROWS: tl.constexpr = p.shape[0] // FOLD
    HEADS: tl.constexpr = p.shape[1]
    N: tl.constexpr = HEADS // 4
    if FOLD == 2:
        even, odd = by_part(p)
        even, odd = tl.reshape(even, [ROWS, HEADS]), tl.reshape(odd, [ROWS, HEADS])
    else:
        even, odd = p, p
    if PTX:
        asm: tl.constexpr = (
            "{ .reg .b32 t; cvt.rn.f16x2.f32 t, $2, $1; "
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, t; }"
        )
        turned = tl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], tl.int32, False, 1)
        return tl.permute(tl.reshape(turned, [ROWS // 8, 8, N, 4]), (0, 2, 1, 3))
    columns = tl.reshape(tl.join(even, odd), [ROWS // 8, 4, 2, N, 8]).to(tl.float16)
    bits = columns.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    low, high = tl.split(tl.permute(bits, (0, 3, 4, 1, 2)))
    return low | high << 16


@triton.jit
def radii_of_columns(words, FOLD: tl.constexpr, PTX: tl.constexpr):
    """Radii of the values, int32 [P // 2] of two tokens each -> those that words of `turn_weights`
    meet, int32 [P // FOLD // 8, 1, 8 or 1, 4]."""
    M: tl.constexpr = words.shape[0] // (4 * FOLD)
    if FOLD == 1:
        radii = tl.permute(tl.reshape(words, [M // 2, 4, 2]), (0, 2, 1))
        radii = tl.reshape(radii, [M, 1, 1, 4])
    else:
        rows = tl.permute(tl.reshape(words, [M // 2, 4, 2, 2]), (0, 2, 1, 3))
        first, second = tl.split(tl.reshape(rows, [M, 1, 1, 4, 2]))
        odd = (tl.arange(0, 8) % 2)[None, None, :, None]
        if PTX:
            first = tl.broadcast_to(first, [M, 1, 8, 4])
            second = tl.broadcast_to(second, [M, 1, 8, 4])
            pick = tl.broadcast_to(tl.where(odd == 1, 0x7632, 0x5410), [M, 1, 8, 4])
            asm: tl.constexpr = "prmt.b32 $0, $1, $2, $3;"
            radii = tl.inline_asm_elementwise(
                asm, "=r,r,r,r", [first, second, pick], tl.int32, True, 1
            )
        else:
            upper = (first >> 16 & 0xFFFF) | (second & -65536)
            radii = tl.where(odd == 1, upper, (first & 0xFFFF) | second << 16)
    return radii


@triton.jit
def turn_of(BAND: tl.constexpr, EACH: tl.constexpr):
    """By how many bits words of radii are to be turned for bands from BAND on, one or one for the
    even and one for the odd columns: int32 [1, 1, 8, 1]."""
    band = BAND + (tl.arange(0, 8) % EACH)[None, None, :, None]
    return (8 - 4 * band) & 31


@triton.jit
def pair_of(words):
    """int32 words of two float16 -> both."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def weights_of(pairs, radii, turn, CALIBRATED: tl.constexpr, PTX: tl.constexpr):
    """Pairs of `turn_weights` times radii -> float16 [P, 2 heads], an operand in order of
    tokens (`token_of`).

    radii  int32, of two tokens: 4-bit radii, of which a rotation by `turn` brings the wanted one to
           bit 8, where it reads as a float16 times 2**-14; or float16 ones, times `turn`
    """
    radii = tl.broadcast_to(radii, pairs.shape)
    turn = tl.broadcast_to(turn, pairs.shape)
    if PTX:
        asm: tl.constexpr = (
            (
                "{ .reg .b32 t; shf.l.wrap.b32 t, $3, $3, $4; and.b32 t, t, 0x0F000F00; "
                "mul.rn.f16x2 t, t, $2; mov.b32 {$0, $1}, t; }"
            )
            if CALIBRATED
            else (
                "{ .reg .b32 t; mul.rn.f16x2 t, $3, $4; mul.rn.f16x2 t, t, $2; "
                "mov.b32 {$0, $1}, t; }"
            )
        )
        low, high = tl.inline_asm_elementwise(
            asm, "=h,=h,r,r,r", [pairs, radii, turn], (tl.float16, tl.float16), True, 1
        )
    else:
        if CALIBRATED:
            wide = radii.to(tl.uint32, bitcast=True).to(tl.uint64)
            turned = (wide << turn.to(tl.uint64)) | (wide >> (32 - turn).to(tl.uint64))
            radii = turned.to(tl.uint32).to(tl.int32, bitcast=True) & 0x0F000F00
        low, high = pair_of(radii)
        if not CALIBRATED:
            by, _ = pair_of(turn)
            low, high = low * by, high * by
        p_low, p_high = pair_of(pairs)
        low, high = low * p_low, high * p_high
    return in_order_of_tokens(low, high)


@triton.jit
def in_order_of_tokens(low, high):
    """Weights of two tokens each, float16 [M, N, 8, 4] both -> an operand [8 M, 8 N]
    (`token_of`)."""
    M: tl.constexpr = low.shape[0]
    N: tl.constexpr = low.shape[1]
    weights = tl.reshape(tl.join(low, high), [M // 2, 2, N, 8, 4, 2])
    return tl.reshape(tl.permute(weights, (0, 4, 1, 5, 2, 3)), [8 * M, 8 * N])


@triton.jit
def share_words(even, odd, PTX: tl.constexpr):
    """Shares of every eighth row, float32 [8, heads], for the even and the odd columns -> int32
    [2, heads // 4, 8, 4], laid out as `turn_weights` does it.

    Both halves of every word are the sum of two rows as float16; the words of a column hold all.
    """
    N: tl.constexpr = even.shape[1] // 4
    if PTX:
        asm: tl.constexpr = (
            "{ .reg .b32 t, u; cvt.rn.f16x2.f32 t, $2, $1; "
            "movmatrix.sync.aligned.m8n8.trans.b16 t, t; "
            "prmt.b32 u, t, t, 0x1032; add.rn.f16x2 $0, t, u; }"
        )
        words = tl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], tl.int32, False, 1)
        words = tl.permute(tl.reshape(words, [1, 8, N, 4]), (0, 2, 1, 3))
    else:
        columns = tl.reshape(tl.join(even, odd), [1, 4, 2, N, 8]).to(tl.float16)
        first, second = tl.split(tl.permute(columns, (0, 3, 4, 1, 2)))
        bits = (first + second).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words = bits | bits << 16
    return tl.broadcast_to(words, [2, N, 8, 4])


@triton.jit
def word_mask(ROW: tl.constexpr):
    """int32 [2, 1, 1, 1], for words of `share_words`: leaves every fourth row from ROW on."""
    i = tl.arange(0, 2)[:, None, None, None]
    return tl.where(2 * i == ROW, 0xFFFF, 0) | tl.where(2 * i + 1 == ROW, -65536, 0)


@triton.jit
def words_to_operand(words, PTX: tl.constexpr):
    """Words of two float16, int32 [2, N, 8, 4] -> an operand [16, 8 N]."""
    if PTX:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], (tl.float16, tl.float16), True, 1
        )
    else:
        low, high = pair_of(words)
    return in_order_of_tokens(low, high)


@triton.jit
def key_radii(words, B: tl.constexpr, FOLD: tl.constexpr, CALIBRATED: tl.constexpr):
    """Radii of the rows' tokens -> float32 [FOLD * rows] in the order of `join_parts`, calibrated
    ones times 2**-126. words: int16 of one token each, or int32 of two."""
    if not CALIBRATED:
        return words.to(tl.float16, bitcast=True).to(tl.float32)
    bits = words.to(tl.int32)
    radii = (bits << (21 - 4 * B)) & 0x01E00000
    if FOLD == 2:
        UP: tl.constexpr = 21 - 16 - 4 * B
        second = (bits << UP if UP >= 0 else bits >> -UP) & 0x01E00000
        both = tl.reshape(tl.join(radii, second), [words.shape[0] // 8, 8, 2])
        radii = tl.reshape(tl.permute(both, (0, 2, 1)), [2 * words.shape[0]])
    return radii.to(tl.float32, bitcast=True)


@triton.jit
def join_parts(products, FOLD: tl.constexpr):
    """int32 [n, FOLD * 2 heads], of both parts of the query -> float32 [n * FOLD, heads]."""
    rows: tl.constexpr = products.shape[0]
    heads: tl.constexpr = products.shape[1] // (2 * FOLD)
    high, low = tl.split(tl.reshape(products, [rows, FOLD * heads, 2]))
    whole = ((high << 8) + low).to(tl.float32)
    if FOLD == 2:
        whole = tl.permute(tl.reshape(whole, [rows // 8, 8, 2, heads]), (0, 2, 1, 3))
    return tl.reshape(whole, [FOLD * rows, heads])


@triton.jit
def twice(x):
    """[heads] -> [2 heads], in both columns of a head."""
    wide = tl.broadcast_to(x[:, None], [x.shape[0], 2])
    return tl.reshape(wide, [2 * x.shape[0]])


@triton.jit
def add_rows_of_tokens(sums, WORDS: tl.constexpr):
    """[W, 2 heads], WORDS rows of either token, which count in its column -> [WORDS, heads]."""
    parts = tl.reshape(sums, [sums.shape[0] // WORDS, WORDS, sums.shape[1] // 2, 2])
    row = tl.arange(0, sums.shape[0] // WORDS)[:, None, None, None]
    own = row == tl.arange(0, 2)[None, None, None, :]
    return tl.sum(tl.sum(tl.where(own, parts, 0.0), 3), 0)
