# mypy: ignore-errors
"""Coded words as float16 operands of matrix products, level * factor; kernel.py describes TILES and
BANDS.

What a GPU does in inline PTX has a second form in plain Triton, for the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = tl.constexpr(2.0**-24)  # unit that a slice without spread is given


@triton.constexpr_function
def unpack_asm(bands, index_of_band, packed=False):
    """PTX: word of every digit, factor, and what to add -> low and high lane, level * factor; as
    one 32-bit register if `packed`."""
    outputs = 1 if packed else 2
    band = bands[index_of_band]
    place = band[0]
    digits = 2 if band[9] else 1
    lines = []
    for index in range(digits):
        shift, bits = band[4 + 4 * index], band[5 + 4 * index]
        target = place + band[6 + 4 * index]
        mask = (((1 << bits) - 1) << target) * 0x10001
        source = f"${index + outputs}"
        if shift != target:
            move = "shr.b32" if shift > target else "shl.b32"
            lines.append(f"{move} u, {source}, {abs(shift - target)};")
            source = "u"
        lines.append(f"and.b32 u, {source}, {mask};")
        lines.append("or.b32 t, t, u;" if index else "mov.b32 t, u;")
    factor, second = f"${digits + outputs}", f"${digits + outputs + 1}"
    if band[11]:
        lines.append(f"fma.rn.f16x2 t, t, {factor}, {second};")
    else:
        one = float16_bits(2.0**15) * 0x10001
        lines.append(f"mov.b32 u, {one}; fma.rn.f16x2 t, t, u, {second};")
        lines.append(f"mul.rn.f16x2 t, t, {factor};")
    target = "$0" if packed else "{$0, $1}"
    return "{ .reg .b32 t, u; " + " ".join(lines) + f" mov.b32 {target}, t; }}"


@triton.constexpr_function
def float16_bits(number):
    """The bits of an exact float16 number."""
    import struct

    return int.from_bytes(struct.pack("<e", number), "little")


@triton.jit
def load_words(
    base, t, j, TILES: tl.constexpr, WORDS: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """The words [P, W] of every tile of the slice at `base` (int32 pointer)."""
    found = ()
    for i in tl.static_range(len(TILES)):
        at = base + TILES[i][0]
        if TILES[i][2] == 0:
            at += t[:, None] * TILES[i][1] + j[None, :]
            words = tl.load(at) if WORDS == W else tl.load(at, mask=j[None, :] < WORDS, other=0)
        elif TILES[i][3] == 4:  # as a vector: a tile of equal columns would lie token by token
            words = tl.broadcast_to(tl.load(at + t)[:, None], [t.shape[0], W])
            words = words >> (j * TILES[i][2])[None, :]
        elif TILES[i][3] % 4 == 0:
            at += t[:, None] * TILES[i][1] + (j % TILES[i][1])[None, :]
            words = tl.load(at) if WORDS == W else tl.load(at, mask=j[None, :] < WORDS, other=0)
            words = words >> (j // TILES[i][1] * TILES[i][2])[None, :]
        else:  # the runs' rows are no whole words
            words = tl.zeros([t.shape[0], W], tl.int32)
            row = at.to(tl.pointer_type(tl.uint8), bitcast=True) + t[:, None] * TILES[i][3]
            for c in tl.static_range(4):
                channel = 4 * j + c
                byte = tl.load(
                    row + (channel % TILES[i][3])[None, :], mask=j[None, :] < WORDS, other=0
                ).to(tl.int32)
                run = channel // TILES[i][3] * TILES[i][2]
                words |= (byte >> run[None, :] & ((1 << TILES[i][2]) - 1)) << (8 * c)
        found = found + (words,)
    return found


@triton.jit
def unpack_lanes(
    words, factor, less, HALF: tl.constexpr, BANDS: tl.constexpr, B: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Bytes HALF and HALF + 2 of the words: level * factor of band B, float16 [P, W] each.

    factor  int32 [P, 1], a float16 in both halves: times what undoes the operand's place and
            2**-24, or 2**-9 where the level is taken first
    less    like factor, what the lanes of code 0 become before the second step, if any
    """
    if PTX:
        asm: tl.constexpr = unpack_asm(BANDS, B)
        first = words[BANDS[B][3]]
        factor = tl.broadcast_to(factor, first.shape)
        less = tl.broadcast_to(less, first.shape)
        if HALF == 1:
            first = first >> 8
        if BANDS[B][9] == 0:
            low, high = tl.inline_asm_elementwise(
                asm, "=h,=h,r,r,r", [first, factor, less], (tl.float16, tl.float16), True, 1
            )
        else:
            second = words[BANDS[B][7]]
            if HALF == 1:
                second = second >> 8
            low, high = tl.inline_asm_elementwise(
                asm, "=h,=h,r,r,r,r", [first, second, factor, less], (tl.float16, tl.float16),
                True, 1,
            )  # fmt: skip
    else:
        low = lane(words, factor, less, HALF, BANDS, B)
        high = lane(words, factor, less, HALF + 2, BANDS, B)
    return low, high


@triton.jit
def lane(words, factor, less, BYTE: tl.constexpr, BANDS: tl.constexpr, B: tl.constexpr):
    """Byte BYTE of the words without PTX, by the same steps."""
    code = words[BANDS[B][3]] >> (8 * BYTE + BANDS[B][4]) & ((1 << BANDS[B][5]) - 1)
    code = code << BANDS[B][6]
    if BANDS[B][9]:
        digit = words[BANDS[B][7]] >> (8 * BYTE + BANDS[B][8]) & ((1 << BANDS[B][9]) - 1)
        code |= digit << BANDS[B][10]
    operand = code.to(tl.float32) * 2.0 ** (BANDS[B][0] - 24)
    factor = (factor & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    less = (less & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if BANDS[B][11]:
        return (operand * factor.to(tl.float32) + less).to(tl.float16)
    return (operand * 2.0**15 + less).to(tl.float16) * factor


@triton.jit
def float16_pair(number, PTX: tl.constexpr):
    """float32 >= 0 [P] -> int32 [P, 1], the number in float16 in both halves."""
    if PTX:
        asm: tl.constexpr = "cvt.rn.f16x2.f32 $0, $1, $1;"
        pair = tl.inline_asm_elementwise(asm, "=r,r", [number], tl.int32, True, 1)
    else:
        bits = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        pair = bits | bits << 16
    return pair[:, None]


@triton.jit
def factors_of(radii, BANDS: tl.constexpr, CALIBRATED: tl.constexpr, PTX: tl.constexpr):
    """What multiplies the lanes of every band, and what is added, as `float16_pair`.

    radii  int32 [P]: 4 bits per band; or the bits of a float16
    """
    factors, less = (), ()
    for b in tl.static_range(len(BANDS)):
        if CALIBRATED:
            bits = (radii << (21 - 4 * b)) & (15 << 21)
            radius = bits.to(tl.float32, bitcast=True) * 2.0**126
            factor = radius * BANDS[b][2]
            least = radius * (-BANDS[b][1] * BANDS[b][2] * 2.0 ** (BANDS[b][0] - 24))
        else:
            factor = radii.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * BANDS[b][2]
            factor = tl.where(factor > 60000.0, 60000.0, factor)  # NaN stays
            least = tl.full(radii.shape, -BANDS[b][1] * 2.0 ** (BANDS[b][0] - 9), tl.float32)
        factors = factors + (float16_pair(factor, PTX),)
        less = less + (float16_pair(least, PTX),)
    return factors, less


@triton.jit
def unpack_rows(
    words, factors, less, BANDS: tl.constexpr, W: tl.constexpr, DC: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Levels in the words of every tile, times the factors of every band: float16 [rows, DC]."""
    rows: tl.constexpr = factors[0].shape[0]
    parts = ()
    for b in tl.static_range(len(BANDS)):
        for half in tl.static_range(2):
            if BANDS[b][5]:
                low, high = unpack_lanes(words, factors[b], less[b], half, BANDS, b, PTX)
            else:
                low = tl.zeros([rows, W], tl.float16)
                high = low
            parts = parts + (low, high)
    return joined_columns(parts, DC)


@triton.jit
def joined_columns(parts, DC: tl.constexpr):
    """Lanes [rows, W] by band, half, lane -> [rows, DC].

    They are integers in between: something must come between the reshape and the product, or
    Triton 3.6 may try to reshape a transposed operand in shared memory, and ends the process.
    """
    rows: tl.constexpr = parts[0].shape[0]
    bits = ()
    for i in tl.static_range(len(parts)):
        bits = bits + (parts[i].to(tl.int16, bitcast=True),)
    parts = bits
    for level in tl.static_range(4 if len(parts) == 16 else 2):  # outermost bit first
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = joined
    return tl.reshape(parts[0], [rows, DC]).to(tl.float16, bitcast=True)


@triton.jit
def load_radii(base, t, FIRST: tl.constexpr):
    """The 16-bit words of the tokens [P] of the slice at `base` (int32 pointer), as int32 with
    something above them: loads of less than 32 bits are not pipelined."""
    return tl.load(base + FIRST + t // 2) >> (t % 2 * 16)


@triton.jit
def load_centroids(
    Arena, addresses, inside, j, SCALES: tl.constexpr, BANDS: tl.constexpr, D: tl.constexpr,
    WORDS: tl.constexpr, W: tl.constexpr, DC: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Of calibrated slices at addresses [BLOCK]: codes around zero times SCALES by band, as float16
    [BLOCK, DC] and what that leaves: one error here is every token's of the page."""
    words = ()
    mask = inside[:, None] & (j < WORDS)[None, :]
    for b in tl.static_range(len(BANDS)):
        at = Arena + ((addresses >> 2) + b * (D // 16))[:, None] + j[None, :]
        words = words + (tl.load(at, mask=mask, other=0),)
    pair = float16_pair(tl.where(inside, 2.0**9, 0.0), PTX)
    least = float16_pair(tl.where(inside, -127.5 * 2.0**-9, 0.0), PTX)
    wholes, rests = (), ()
    for b in tl.static_range(len(BANDS)):
        for half in tl.static_range(2):
            lanes = unpack_lanes(words, pair, least, half, BANDS, b, PTX)
            for i in tl.static_range(2):
                scaled = lanes[i].to(tl.float32) * SCALES[b]
                whole = scaled.to(tl.float16)
                wholes = wholes + (whole,)
                rests = rests + ((scaled - whole.to(tl.float32)).to(tl.float16),)
    return joined_columns(wholes, DC), joined_columns(rests, DC)


@triton.jit
def load_scale(Arena, addresses, inside, D: tl.constexpr):
    """Radii of the centroids of slices at addresses [BLOCK]: float32 [BLOCK]."""
    scales = Arena.to(tl.pointer_type(tl.float16), bitcast=True) + (addresses + D) // 2
    return tl.load(scales + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_unit(base, D: tl.constexpr):
    """The unit of the radii of the calibrated slice at `base` (int32 pointer)."""
    bits = tl.load(base + D // 4)
    unit = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(unit == 0.0, SMALLEST, unit)
