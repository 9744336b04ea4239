"""Triton bodies of re-encoding; launch.py sets up what they assume.

A program takes one slice after another of one (layer, KV head, side): tokens are rows, channels
columns. Bands are tensors of their own, because each has its own bits. A band of a width that is no
power of two is padded in quarters, so that channels stored together (runs) stay aligned.

Stored digits are described by tuples of constants:
    TILES   (offset in bytes, bytes per row)
    DIGITS  (tile, band, bits, shift in the byte, shift in the code, runs)
    BANDS   (bits, Gaussian step)
"""

from __future__ import annotations

import triton
import triton.language as tl

SHIFT = tl.constexpr(2.0**23)  # adding it rounds to an integer, which is then in the low bits
TINY = tl.constexpr(2.0**-126)  # float32's smallest normal number
SMALLEST_SCALE = tl.constexpr(2.0**-24)
RADIUS_UNIT = tl.constexpr(2.0**126)  # codec/radii.py: a radius is a piece of a float32
RADIUS_SHIFT = tl.constexpr(21)
BELOW_HALF = tl.constexpr((1 << 20) - 1)  # of the bits that a radius has not
LARGEST_CODE = tl.constexpr(15)
MOST_STEPS = tl.constexpr(2)  # radius codes tried on each side of the nearest
LEVEL_UNIT = tl.constexpr(2.0**-9)  # in which float16 operands hold hot levels
UNIT_OF_SPREAD = tl.constexpr(2.0 ** (1 / 3) / 7.0)  # codec.pages: HEADROOM / LARGEST_RADIUS


@triton.jit
def channels_of(column, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Channel of the band in a padded column, and whether there is one."""
    if WIDTH == PADDED:
        return column, column < PADDED
    place = column % (PADDED // 4)
    return column // (PADDED // 4) * (WIDTH // 4) + place, place < WIDTH // 4


@triton.jit
def slice_address(PageBlocks, Places, page, place, block_bytes, H: tl.constexpr):
    """Byte address of the slice `place` (of [slices, 2]) of a page."""
    block = tl.load(PageBlocks + page * H + tl.load(Places + place * 2)).to(tl.int64)
    return block * block_bytes + tl.multiple_of(tl.load(Places + place * 2 + 1), 16)


@triton.jit
def radius_of(code):
    """Radius codes int32 -> units."""
    return (code << RADIUS_SHIFT).to(tl.float32, bitcast=True) * RADIUS_UNIT


@triton.jit
def nearest_code(radius):
    """Radii in units -> the nearest code, the lower of two."""
    bits = (radius * 2.0**-126).to(tl.int32, bitcast=True)
    return tl.minimum((bits + BELOW_HALF) >> RADIUS_SHIFT, LARGEST_CODE)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x of normal numbers, to the last bit but one."""
    if PTX:
        asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, True, 1)
    return 1.0 / x


@triton.jit
def rounded(y, inverse, BITS: tl.constexpr, PTX: tl.constexpr):
    """The nearest code of every y, as code + SHIFT; inverse [rows] is one over the step."""
    if BITS == 1:  # the sign; a half would be rounded to the even code, the reference takes 1
        return tl.where(y >= 0.0, SHIFT + 1.0, SHIFT)
    TOP: tl.constexpr = 2**BITS - 1
    scale = (inverse * (1.0 / TOP))[:, None]
    if PTX:
        part = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;", "=f,f,f", [y, scale], tl.float32, True, 1
        )
    else:
        part = tl.minimum(tl.maximum(y * scale + 0.5, 0.0), 1.0)
    return part * TOP + SHIFT


@triton.jit
def best_radius(
    y, inside, square, spread, divisor, BITS: tl.constexpr, STEP: tl.constexpr, PTX: tl.constexpr
):
    """The radius codes [rows] of a band y [rows, width] that lose least: codec.pages.code_banded.

    square [rows] is the sum of y's squares, spread its rms; divisor the unit of the radii.
    """
    TOP: tl.constexpr = 2**BITS - 1
    nearest = nearest_code(spread / divisor)
    best = tl.zeros_like(nearest)
    per_unit = 1.0 / (divisor * STEP)
    unit_square = divisor * STEP * (divisor * STEP)
    for neighbour in tl.static_range(2 * MOST_STEPS + 1):
        code = tl.minimum(tl.maximum(nearest + (neighbour - MOST_STEPS), 1), LARGEST_CODE)
        radius = radius_of(code)
        inverse = reciprocal(radius, PTX) * per_unit
        error = y * inverse[:, None] + TOP / 2 - (rounded(y, inverse, BITS, PTX) - SHIFT)
        if inside is not None:
            error = tl.where(inside[None, :], error, 0.0)
        loss = tl.sum(error * error, 1) * (radius * radius * unit_square)
        best = tl.where(loss < square, code, best)
        square = tl.minimum(loss, square)
    return best


@triton.jit
def hot_levels(at, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr):
    """Rows of hot codes -> levels in LEVEL_UNIT, float16 [PAGE, DP / runs] by run."""
    RUNS: tl.constexpr = 8 // BITS
    column = tl.arange(0, DP // RUNS)[None, :]
    at += tl.arange(0, PAGE)[:, None] * (D // RUNS) + column
    rows = tl.load(at, mask=column < D // RUNS, other=0)
    levels = ()
    for run in tl.static_range(RUNS):
        digit = (rows >> (run * BITS)) & (2**BITS - 1)
        # the digit in the low bits of a float16 is digit * 2**-24, exactly
        level = digit.to(tl.int16).to(tl.float16, bitcast=True) * 2.0**15
        levels = levels + (level.to(tl.float16) - (2**BITS - 1) / 2 * LEVEL_UNIT,)
    return levels


@triton.jit
def load_turn(Turn, BAND: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
              RUNS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Columns of a band of the matrix into the new frame, rows of a run: [DP / RUNS, PADDED]."""
    k = tl.arange(0, DP // RUNS)
    channel, inside = channels_of(tl.arange(0, PADDED), WIDTH, PADDED)
    at = Turn + (BAND * WIDTH + channel)[None, :] * D + (RUN * (D // RUNS) + k)[:, None]
    return tl.load(at, mask=(k < D // RUNS)[:, None] & inside[None, :], other=0.0)


@triton.jit
def load_digit(at, t, channel, inside, ROW: tl.constexpr, BITS: tl.constexpr, PLACE: tl.constexpr,
               RUNS: tl.constexpr):  # fmt: skip
    """A digit of a tile [PAGE, ROW bytes] at `at`, int32 [PAGE, PADDED]."""
    rows = at + t[:, None] * ROW
    if RUNS == 1:
        found = tl.load(rows + channel[None, :], mask=inside[None, :], other=0).to(tl.int32)
        return (found >> PLACE) & (2**BITS - 1)
    found = tl.load(rows + (channel % ROW)[None, :], mask=inside[None, :], other=0).to(tl.int32)
    return (found >> (channel // ROW * BITS)[None, :]) & (2**BITS - 1)


@triton.jit
def banded_codes(at, t, channel, inside, BAND: tl.constexpr, TILES: tl.constexpr,
                 DIGITS: tl.constexpr):  # fmt: skip
    """Codes of a band of a calibrated slice, int32 [PAGE, PADDED]."""
    codes = tl.zeros([t.shape[0], channel.shape[0]], tl.int32)
    for i in tl.static_range(len(DIGITS)):
        if DIGITS[i][1] == BAND:
            digit = load_digit(
                at + TILES[DIGITS[i][0]][0], t, channel, inside, TILES[DIGITS[i][0]][1],
                DIGITS[i][2], DIGITS[i][3], DIGITS[i][5],
            )  # fmt: skip
            codes |= digit << DIGITS[i][4]
    return codes


# what changes from call to call must not make a new binary
@triton.jit(
    do_not_specialize=["first_page", "num_pages"],
    do_not_specialize_on_alignment=["Pages", "Slices"],
)
def reencode_slices(
    Arena, PageBlocks, Pages, Slices, Places, Offsets, Turns, TurnScales, Scratch, first_page,
    num_pages, slices, block_bytes, page_bytes,
    SIDE: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, H: tl.constexpr, HOT_BITS: tl.constexpr,
    OT: tl.constexpr, OD: tl.constexpr, OB: tl.constexpr,
    NT: tl.constexpr, ND: tl.constexpr, NB: tl.constexpr, OLD_SCALES: tl.constexpr,
    NEW_SCALES: tl.constexpr, SIZE: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Some slices of pages [first_page, first_page + num_pages), coded anew into scratch.

    Arena       uint8; Scratch uint8 [num_pages, page_bytes]
    Slices      int32 [programs], (layer, KV head)s of `slices` = layers * kv_heads
    Places      int32 [slices, 2 (sides), 2]: slot and byte offset, old level
    Offsets     int32 [slices, 2 (sides)]: where each goes in a page's scratch
    Turns       float16 [2, slices, D (new), D (old)] and TurnScales float32 [2, slices]: from hot
                levels into the calibrated frame; unused where HOT_BITS is 0
    O*, N*      the old and the new slice as above; HOT_BITS of a hot old slice, else 0
    """
    where = tl.load(Slices + tl.program_id(0))
    offset = tl.multiple_of(tl.load(Offsets + where * 2 + SIDE), 16)
    t = tl.arange(0, PAGE)
    column = tl.arange(0, PADDED)
    channel, inside = channels_of(column, WIDTH, PADDED)
    mask = inside if WIDTH != PADDED else None
    turns = ()
    if HOT_BITS:
        turn = (SIDE * slices + where).to(tl.int64)
        turn_scale = tl.load(TurnScales + turn) * 2.0**9
        turn_at = Turns + turn * (D * D)
        for b in tl.static_range(len(NB)):
            for run in tl.static_range(8 // HOT_BITS):
                turns = turns + (load_turn(turn_at, b, run, D, DP, 8 // HOT_BITS, WIDTH, PADDED),)
    for i in tl.range(tl.program_id(1), num_pages, tl.num_programs(1), num_stages=STAGES):
        page = tl.load(Pages + first_page + i)
        address = slice_address(PageBlocks, Places, page, where * 2 + SIDE, block_bytes, H)
        old = Arena + address
        ys, means = (), ()
        if HOT_BITS:
            RUNS: tl.constexpr = 8 // HOT_BITS
            levels = hot_levels(old + OT[0][0], D, DP, HOT_BITS, PAGE)
            radii = tl.load(old.to(tl.pointer_type(tl.float16), bitcast=True) + t)
            radii = radii.to(tl.float32) * turn_scale
            for b in tl.static_range(len(NB)):
                sums = tl.dot(levels[0], turns[b * RUNS])
                for run in tl.static_range(RUNS - 1):
                    sums = tl.dot(levels[run + 1], turns[b * RUNS + run + 1], sums)
                y = sums * radii[:, None]
                ys = ys + (y,)
                means = means + (tl.sum(y, 0) * (1.0 / PAGE),)
        else:
            scales = (old + D).to(tl.pointer_type(tl.float16), bitcast=True)
            unit = tl.load(scales).to(tl.float32)
            words = tl.load(scales + OLD_SCALES + t).to(tl.int16, bitcast=True).to(tl.int32)
            for b in tl.static_range(len(NB)):
                codes = banded_codes(old, t, channel, inside, b, OT, OD)
                radii = radius_of((words >> (4 * b)) & 15) * (unit * OB[b][1])
                y = (codes.to(tl.float32) - (2 ** OB[b][0] - 1) / 2) * radii[:, None]
                if WIDTH != PADDED:
                    y = tl.where(inside[None, :], y, 0.0)
                near = tl.load(old + b * WIDTH + channel, mask=inside, other=0).to(tl.float32)
                near = (near - 127.5) * tl.load(scales + 1).to(tl.float32)
                ys = ys + (y + near[None, :],)
                means = means + (tl.sum(y, 0) * (1.0 / PAGE) + near,)

        # the centroid: an 8-bit angle code, subtracted as it is stored
        target = Scratch + (tl.multiple_of(page_bytes, 16).to(tl.int64) * i + offset)
        peak = 0.0
        for b in tl.static_range(len(NB)):
            size = tl.abs(means[b])
            if WIDTH != PADDED:
                size = tl.where(inside, size, 0.0)
            peak = tl.maximum(peak, tl.max(size, 0))
        inverse = 1.0 / tl.maximum(peak * (2.0 / 255), TINY)
        fit, norm = 0.0, 0.0
        shifts = ()
        for b in tl.static_range(len(NB)):
            shifted = (means[b] * inverse + 127.5) + SHIFT
            level = (shifted - SHIFT) - 127.5
            if WIDTH != PADDED:
                level = tl.where(inside, level, 0.0)
            fit += tl.sum(means[b] * level, 0)
            norm += tl.sum(level * level, 0)
            shifts = shifts + (level,)
            code = shifted.to(tl.int32, bitcast=True).to(tl.uint8)
            tl.store(target + b * WIDTH + channel, code, mask=inside)
        length = (fit / norm).to(tl.float16)
        centred, squares, spreads = (), (), ()
        widest = 0.0
        for b in tl.static_range(len(NB)):
            y = ys[b] - (shifts[b] * length.to(tl.float32))[None, :]
            if WIDTH != PADDED:
                y = tl.where(inside[None, :], y, 0.0)
            square = tl.sum(y * y, 1)
            spread = tl.sqrt(square * (1.0 / WIDTH))
            centred, squares, spreads = centred + (y,), squares + (square,), spreads + (spread,)
            if NB[b][0]:
                widest = tl.maximum(widest, tl.max(spread, 0))
        # what is not finite has made the centroid's radius NaN or infinite: the unit says NaN
        unit = (widest * UNIT_OF_SPREAD + 0.0 * length.to(tl.float32)).to(tl.float16)
        divisor = tl.maximum(unit.to(tl.float32), SMALLEST_SCALE)

        words = tl.zeros([PAGE], tl.int32)
        codes = ()
        for b in tl.static_range(len(NB)):
            if NB[b][0]:
                best = best_radius(
                    centred[b], mask, squares[b], spreads[b], divisor, NB[b][0], NB[b][1], PTX
                )
                words |= best << (4 * b)
                per_radius = reciprocal(radius_of(tl.maximum(best, 1)), PTX)
                inverse = tl.where(best > 0, per_radius * (1.0 / (divisor * NB[b][1])), 0.0)
                found = rounded(centred[b], inverse, NB[b][0], PTX).to(tl.int32, bitcast=True)
                codes = codes + (found,)
            else:
                codes = codes + (words,)  # of no band that is stored
        for k in tl.static_range(len(NT)):
            rows = tl.zeros([PAGE, PADDED], tl.int32)
            for j in tl.static_range(len(ND)):
                if ND[j][0] == k:
                    digit = (codes[ND[j][1]] >> ND[j][4]) & (2 ** ND[j][2] - 1)
                    if ND[j][5] == 1:
                        rows |= digit << ND[j][3]
                    else:
                        store_runs(target + NT[k][0], digit, t, NT[k][1], ND[j][2], ND[j][5], WIDTH)
            if NT[k][1] == WIDTH:
                at = target + (NT[k][0] + t[:, None] * WIDTH + channel[None, :])
                tl.store(at, rows.to(tl.uint8), mask=inside[None, :])
        scales = (target + D).to(tl.pointer_type(tl.float16), bitcast=True)
        place = tl.arange(0, NEW_SCALES)
        header = tl.where(place == 0, unit, tl.where(place == 1, length, 0.0))
        tl.store(scales + place, header.to(tl.float16))
        halves = (target + D + 2 * NEW_SCALES).to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(halves + t, words.to(tl.int16))
        END: tl.constexpr = NT[len(NT) - 1][0] + NT[len(NT) - 1][1] * PAGE
        if END != SIZE:
            padding = tl.arange(0, 32)
            tl.store(target + END + padding, tl.zeros([32], tl.uint8), mask=padding < SIZE - END)


@triton.jit
def store_runs(
    at, digit, t, ROW_BYTES: tl.constexpr, BITS: tl.constexpr, RUNS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A left-over digit [PAGE, PADDED]: the channels of a byte lie ROW_BYTES apart."""
    PAGE: tl.constexpr = digit.shape[0]
    LEFT: tl.constexpr = digit.shape[1] // RUNS
    run = tl.arange(0, RUNS)[None, :, None]
    rows = tl.sum(tl.reshape(digit, [PAGE, RUNS, LEFT]) << (run * BITS), 1)
    column = tl.arange(0, LEFT)
    # quarters of the band are padded on their own
    place = column % (digit.shape[1] // 4)
    byte = column // (digit.shape[1] // 4) * (WIDTH // 4) + place
    tl.store(
        at + (t[:, None] * ROW_BYTES + byte[None, :]),
        rows.to(tl.uint8),
        mask=(place < WIDTH // 4)[None, :],
    )


@triton.jit(do_not_specialize=["first_page"], do_not_specialize_on_alignment=["Pages", "Which"])
def copy_slices(
    Arena, PageBlocks, Pages, Which, Places, Offsets, Scratch, first_page, block_bytes, page_bytes,
    H: tl.constexpr, BLOCK: tl.constexpr, INTO_PAGES: tl.constexpr,
):  # fmt: skip
    """One slice, named by `Which`, from scratch to its place in a page, or the other way round.

    Which  int32 [programs], 2 * (layer, KV head) + side; a word is 8 bytes
    """
    which = tl.load(Which + tl.program_id(0))
    i = tl.program_id(1)
    page = tl.load(Pages + first_page + i)
    address = slice_address(PageBlocks, Places, page, which, block_bytes, H)
    offset = tl.load(Offsets + which)
    words = (tl.load(Offsets + which + 1) - offset) // 8
    in_page = (Arena + address).to(tl.pointer_type(tl.int64), bitcast=True)
    at = Scratch + (i.to(tl.int64) * page_bytes + tl.multiple_of(offset, 16))
    in_scratch = at.to(tl.pointer_type(tl.int64), bitcast=True)
    word = tl.arange(0, BLOCK)
    if INTO_PAGES:
        tl.store(in_page + word, tl.load(in_scratch + word, word < words), mask=word < words)
    else:
        tl.store(in_scratch + word, tl.load(in_page + word, word < words), mask=word < words)
