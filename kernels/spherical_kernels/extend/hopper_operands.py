# mypy: ignore-errors
"""Coded pages as float16 operands in shared memory: the producing warps of hopper.py.

Four warps unpack one side (keys or values) of every page for all rows of a tile. A thread has one
token of the 64 and half of its words, so that it needs the radii of one token only, and eight
threads that store at once have eight different rows: the swizzle then keeps their banks apart.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .operands import unpack_asm

SMALLEST = gl.constexpr(2.0**-24)  # unit that a slice without spread is given
UNITS = gl.constexpr(4096.0)
BOOST = gl.constexpr(16.0)


@gluon.constexpr_function
def words_layout(tokens, words):
    """Of words int32 [tokens, words] in 128 threads: of 64 tokens, or of 16 centroids."""
    if tokens == 64:
        registers = [[0, 1 << i] for i in range((words // 2).bit_length() - 1)]
        lanes = [[1, 0], [2, 0], [4, 0], [0, words // 2], [8, 0]]
        return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, words])
    lanes = [[1, 0], [0, 1], [0, 2], [2, 0], [4, 0]]
    warps = [[8, 0], [0, 4 if words == 8 else 0]]
    return gl.DistributedLinearLayout([], lanes, warps, [], [16, words])


@gluon.constexpr_function
def pairs_layout():
    """Of float16 operands (hopper.operand_layout) seen as pairs, int32: the same bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The buffer after `stage` of a ring, and the parity of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def load_words(base, TILES: gl.constexpr, W: gl.constexpr):
    """The words [64, W] of every tile of the slice at `base` (int32 pointer)."""
    layout: gl.constexpr = words_layout(64, W)
    t = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    j = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    found = ()
    for i in gl.static_range(len(TILES)):
        if TILES[i][2] == 0:
            at = t[:, None] * TILES[i][1] + j[None, :]
        else:  # runs: rows are whole words at these head dimensions
            at = t[:, None] * TILES[i][1] + (j % TILES[i][1])[None, :]
        found = found + (gl.load(base + TILES[i][0] + at),)
    return found


@gluon.jit
def shifted_runs(words, TILES: gl.constexpr, W: gl.constexpr):
    """Brings the runs of tiles that have them to bit 0."""
    layout: gl.constexpr = words_layout(64, W)
    j = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    found = ()
    for i in gl.static_range(len(TILES)):
        word = words[i]
        if TILES[i][2]:
            word = word >> (j // TILES[i][1] * TILES[i][2])[None, :]
        found = found + (word,)
    return found


@gluon.jit
def load_radii(base, FIRST: gl.constexpr, W: gl.constexpr):
    """The 16-bit words of the tokens, int32 [64] with something above them."""
    t = gl.arange(0, 64, layout=gl.SliceLayout(1, words_layout(64, W)))
    return gl.load(base + FIRST + t // 2) >> (t % 2 * 16)


@gluon.jit
def float16_pair(number):
    """float32 >= 0 [P] -> int32 [P, 1], the number in float16 in both halves."""
    asm: gl.constexpr = "cvt.rn.f16x2.f32 $0, $1, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r", [number], gl.int32, True, 1)[:, None]


@gluon.jit
def factors_of(radii, BANDS: gl.constexpr, CALIBRATED: gl.constexpr):
    """What multiplies the lanes of every band, and what is added, as `float16_pair`.

    radii  int32 [P]: 4 bits per band; or the bits of a float16
    """
    factors, less = (), ()
    for b in gl.static_range(len(BANDS)):
        if CALIBRATED:
            bits = (radii << (21 - 4 * b)) & (15 << 21)
            radius = bits.to(gl.float32, bitcast=True) * 2.0**126
            factor = radius * BANDS[b][2]
            least = radius * (-BANDS[b][1] * BANDS[b][2] * 2.0 ** (BANDS[b][0] - 24))
        else:
            factor = radii.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32) * BANDS[b][2]
            factor = gl.where(factor > 60000.0, 60000.0, factor)  # NaN stays
            least = gl.full_like(factor, -BANDS[b][1] * 2.0 ** (BANDS[b][0] - 9))
        factors = factors + (float16_pair(factor),)
        less = less + (float16_pair(least),)
    return factors, less


@gluon.jit
def unpack_lanes(
    words, factor, less, HALF: gl.constexpr, BANDS: gl.constexpr, B: gl.constexpr
):  # fmt: skip
    """Bytes HALF and HALF + 2 of the words: pairs of float16 level * factor of band B, int32 like
    the words."""
    asm: gl.constexpr = unpack_asm(BANDS, B, True)
    first = words[BANDS[B][3]]
    factor = gl.broadcast(factor, first)[0]
    less = gl.broadcast(less, first)[0]
    if HALF == 1:
        first = first >> 8
    if BANDS[B][9] == 0:
        pair = gl.inline_asm_elementwise(asm, "=r,r,r,r", [first, factor, less], gl.int32, True, 1)
    else:
        second = words[BANDS[B][7]]
        if HALF == 1:
            second = second >> 8
        pair = gl.inline_asm_elementwise(
            asm, "=r,r,r,r,r", [first, second, factor, less], gl.int32, True, 1
        )
    return pair


@gluon.jit
def joined_pairs(parts, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Pairs [ROWS, W] by band and half -> [ROWS, COLUMNS / 2]."""
    for level in gl.static_range(3 if len(parts) == 8 else 1):  # outermost bit first
        joined = ()
        for i in gl.static_range(len(parts) // 2):
            joined = joined + (gl.join(parts[i], parts[i + len(parts) // 2]),)
        parts = joined
    return gl.reshape(parts[0], [ROWS, COLUMNS // 2])


@gluon.jit
def unpack_rows(words, factors, less, BANDS: gl.constexpr, D: gl.constexpr):
    """Levels in the words of every tile, times the factors of every band: int32 [64, D / 2]."""
    parts = ()
    for b in gl.static_range(len(BANDS)):
        for half in gl.static_range(2):
            if BANDS[b][5]:
                pair = unpack_lanes(words, factors[b], less[b], half, BANDS, b)
            else:
                pair = gl.zeros_like(words[0])
            parts = parts + (pair,)
    return joined_pairs(parts, 64, D)


@gluon.jit
def scale_pair(pair, SCALE: gl.constexpr):
    """Pairs of float16 times SCALE, as pairs of float16 and of what that leaves; int32."""
    asm: gl.constexpr = """{
        .reg .b16 a, b, c, d; .reg .f32 x, y, z, w;
        mov.b32 {a, b}, $2; cvt.f32.f16 x, a; cvt.f32.f16 y, b;
        mul.rn.f32 x, x, $3; mul.rn.f32 y, y, $3;
        cvt.rn.f16.f32 a, x; cvt.rn.f16.f32 b, y; mov.b32 $0, {a, b};
        cvt.f32.f16 z, a; cvt.f32.f16 w, b;
        sub.rn.f32 x, x, z; sub.rn.f32 y, y, w;
        cvt.rn.f16.f32 c, x; cvt.rn.f16.f32 d, y; mov.b32 $1, {c, d};
    }"""
    scale = gl.full_like(pair, SCALE, dtype=gl.float32)
    return gl.inline_asm_elementwise(
        asm, "=&r,=&r,r,f", [pair, scale], (gl.int32, gl.int32), True, 1
    )


@gluon.jit
def load_centroids(
    Arena, entries, block, end,
    D: gl.constexpr, W: gl.constexpr, BLOCK: gl.constexpr, BANDS: gl.constexpr,
):  # fmt: skip
    """Of the centroids of pages block .. of one side: the words [BLOCK, W] of every band, and
    their radii float32 [BLOCK], zero after `end`."""
    layout: gl.constexpr = words_layout(BLOCK, W)
    n = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    j = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    inside = block + n < end
    at = gl.load(entries + 2 * (block + n), mask=inside, other=0)
    scales = Arena.to(gl.pointer_type(gl.float16), bitcast=True) + ((at + D) >> 1)
    radius = gl.load(scales + 1, mask=inside, other=0.0).to(gl.float32)
    words = ()
    for b in gl.static_range(len(BANDS)):
        place = ((at >> 2) + b * (D // 16))[:, None] + j[None, :]
        words = words + (gl.load(Arena + place, mask=inside[:, None], other=0),)
    return words, radius


@gluon.jit
def store_centroids(
    words, radius, count, centroids, phase,
    SCALES: gl.constexpr, BANDS: gl.constexpr, W: gl.constexpr, D: gl.constexpr,
    BLOCK: gl.constexpr,
):  # fmt: skip
    """Codes of `count` centroids around zero times SCALES by band, in shared memory as float16
    [BLOCK, D] and what that leaves, and their radii float32 [BLOCK]."""
    wholes, rests, radii, full, empty = centroids
    layout: gl.constexpr = words_layout(BLOCK, W)
    pairs: gl.constexpr = pairs_layout()
    inside = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout)) < count
    factor = float16_pair(gl.where(inside, 2.0**9, 0.0))
    least = float16_pair(gl.where(inside, -127.5 * 2.0**-9, 0.0))
    whole, rest = (), ()
    for b in gl.static_range(len(BANDS)):
        for half in gl.static_range(2):
            scaled, left = scale_pair(unpack_lanes(words, factor, least, half, BANDS, b), SCALES[b])
            whole = whole + (scaled,)
            rest = rest + (left,)
    mbarrier.wait(empty, phase ^ 1)
    wholes._reinterpret(gl.int32, [BLOCK, D // 2], pairs).store(joined_pairs(whole, BLOCK, D))
    rests._reinterpret(gl.int32, [BLOCK, D // 2], pairs).store(joined_pairs(rest, BLOCK, D))
    radii.store(radius)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(full, count=1)


@gluon.jit
def load_unit(base, D: gl.constexpr):
    """The unit of the radii of the calibrated slice at `base` (int32 pointer)."""
    unit = gl.load(base + D // 4).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return gl.where(unit == 0.0, SMALLEST, unit)


@gluon.jit
def load_page(
    at, TILES: gl.constexpr, RADII: gl.constexpr, D: gl.constexpr, W: gl.constexpr,
    CALIBRATED: gl.constexpr,
):  # fmt: skip
    """Words, radii and unit of the slice at `at`."""
    words = load_words(at, TILES, W)
    radius = load_radii(at, RADII, W)
    unit = load_unit(at, D) if CALIBRATED else 1.0
    return words, radius, unit


@gluon.jit
def slice_at(Arena, entry):
    """The slice of an entry's address, as int32 pointer."""
    return Arena + gl.multiple_of(entry >> 2, 4)


@gluon.jit
def produce(
    Arena, entries, first, end, run_end, last_valid, pages, key_centroids, value_centroids,
    D: gl.constexpr, W: gl.constexpr, CALIBRATED: gl.constexpr, RADII: gl.constexpr,
    BLOCK: gl.constexpr, SPAN: gl.constexpr,
    KT: gl.constexpr, KB: gl.constexpr, KC: gl.constexpr,
    VT: gl.constexpr, VB: gl.constexpr, VC: gl.constexpr, CB: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Unpacks pages first .. end into rings, and centroids by BLOCK pages: of keys before the
    block's first page, of values after its last.

    entries    int64 [pages, 2] of the head
    run_end, last_valid  the page run_end - 1 has that many tokens, if it is hot
    pages      rings in shared memory, and the barriers of each of their STAGES:
        keys, values    float16 [STAGES, 64, D], operands over SHRUNK or UNITS
        units, weighs   float32 [STAGES, 1], of calibrated pages: what a unit of the keys' operands
                        is, log2 of what the weights of values are to be times
        full, empty     full once the producer has written it, empty once both consumers have read
    *_centroids  one block's in shared memory: float16 [BLOCK, D], what that leaves, radii float32
               [BLOCK], full and empty
    """
    keys, values, units, weighs, full, empty = pages
    words_of: gl.constexpr = words_layout(64, W)
    pairs: gl.constexpr = pairs_layout()
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    t = gl.arange(0, 64, layout=gl.SliceLayout(1, words_of))
    last = end - 1
    stage, phase, block_phase = 0, 0, 0
    key_at = slice_at(Arena, gl.load(entries + 2 * first))
    value_at = slice_at(Arena, gl.load(entries + 2 * first + 1))
    after = gl.minimum(first + 1, last)
    key_next = slice_at(Arena, gl.load(entries + 2 * after))
    value_next = slice_at(Arena, gl.load(entries + 2 * after + 1))
    key_words, key_radius, key_unit = load_page(key_at, KT, RADII, D, W, CALIBRATED)
    value_words, value_radius, value_unit = load_page(value_at, VT, RADII, D, W, CALIBRATED)
    if CALIBRATED:
        key_codes, key_scale = load_centroids(Arena, entries, first, end, D, W, BLOCK, CB)
    for block in range(first, end, SPAN):
        count = gl.minimum(end - block, SPAN)
        if CALIBRATED:
            store_centroids(
                key_codes, key_scale, count, key_centroids, block_phase, KC, CB, W, D, BLOCK
            )
            value_codes, value_scale = load_centroids(
                Arena, entries + 1, block, end, D, W, BLOCK, CB
            )
            key_codes, key_scale = load_centroids(
                Arena, entries, block + SPAN, end, D, W, BLOCK, CB
            )
        for e in range(block, block + count):
            # what the next page needs is asked for before this one is unpacked, its address
            # earlier: the fence below may wait for what was asked for
            next_key_words, next_key_radius, next_key_unit = load_page(
                key_next, KT, RADII, D, W, CALIBRATED
            )
            next_value_words, next_value_radius, next_value_unit = load_page(
                value_next, VT, RADII, D, W, CALIBRATED
            )
            after = gl.minimum(e + 2, last)
            key_next = slice_at(Arena, gl.load(entries + 2 * after))
            value_next = slice_at(Arena, gl.load(entries + 2 * after + 1))
            if not CALIBRATED:  # what nobody wrote may be NaN
                valid = t < gl.where(e == run_end - 1, last_valid, 64)
                key_radius = gl.where(valid, key_radius, 0)
                value_radius = gl.where(valid, value_radius, 0)
            factors, less = factors_of(key_radius, KB, CALIBRATED)
            page = unpack_rows(shifted_runs(key_words, KT, W), factors, less, KB, D)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            keys.index(stage)._reinterpret(gl.int32, [64, D // 2], pairs).store(page)
            factors, less = factors_of(value_radius, VB, CALIBRATED)
            page = unpack_rows(shifted_runs(value_words, VT, W), factors, less, VB, D)
            values.index(stage)._reinterpret(gl.int32, [64, D // 2], pairs).store(page)
            if CALIBRATED:
                unit, weigh = key_unit * UNITS, gl.log2(value_unit * BOOST)
                units.index(stage).store(gl.full([1], unit, gl.float32, one))
                weighs.index(stage).store(gl.full([1], weigh, gl.float32, one))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(full.index(stage), count=1)
            key_words, key_radius, key_unit = next_key_words, next_key_radius, next_key_unit
            value_words, value_radius = next_value_words, next_value_radius
            value_unit = next_value_unit
            stage, phase = next_stage(stage, phase, STAGES)
        if CALIBRATED:
            store_centroids(
                value_codes, value_scale, count, value_centroids, block_phase, VC, CB, W, D, BLOCK
            )
            block_phase = block_phase ^ 1
