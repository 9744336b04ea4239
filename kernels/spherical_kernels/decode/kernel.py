"""Triton body of angle-domain decoding; launch.py sets up what it assumes, framing.py and
merge.py have the rest.

A program reads an *item* of one KV head: a range of one request's pages of one kind. Tokens are the
rows of the matrix products, query heads their columns, two for each:

keys     Codes are 8-bit integers as they lie in the page: one mask per four digits, no shift. The
         query is a 16-bit integer in two, its high part in a head's even column and the low one in
         the odd column. Products are exact, and the tokens' logits need no exchange between lanes.
values   A digit in the low bits of a 16-bit word reads, as a float16, as digit * 2**(place - 24), a
         subnormal number that tensor cores take exactly. A word holds the bytes of two neighbouring
         channels, so every digit has an even and an odd half. Weights are probability * radius in
         float16; a head's two columns take two bands.

A kind is described by tuples of constants:
    KT   (first byte, bytes per row, bits of a run or 0) of every tile of the keys
    KD   (tile, band, shift in the byte, bits, place in the operand) of every digit
    KB   (place, what a level exceeds 0 by in code units, step) of every band; step 0 uncoded
    VT   (first word, words per row) of every tile of the values
    VP   (band, first channel, words, other part or -1, column of VC): channels first, first + 2,
         ... of a band; where its operand holds both codes of a byte, the sum of the other part is
         to be taken off
    VC   (words, first word, first word, ...) of every operand of the centroid: of its columns, each
         the channels of two parts with as many words
    VD   (tile, part, shift in the word, bits, place in the operand)
    VB   (what a code exceeds its level by, factor that undoes place, 2**-24 and the step)

Where rows are short (FOLD = 2, d = 64) a row holds two neighbouring tokens. In the keys' products
they lie side by side and have columns of their own, in the values' they lie one below the other and
take the two columns of a head, so that there are weights for every band.

The values' centroid is one more step of the values' product. Its operand has a column for the
channels of every two parts, up to four of them, four times: as often as there are lanes whose
tokens' masses are still to be added up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..plan.kernel import ITEM_NUMBERS
from .operands import (
    add_rows_of_tokens,
    hidden_zero,
    join_parts,
    key_radii,
    masses_of,
    pair_of,
    radii_of_columns,
    share_words,
    take_bytes,
    take_digit,
    take_runs,
    token_of,
    turn_of,
    turn_weights,
    twice,
    weights_of,
    word_mask,
    words_to_operand,
)
from .queries import load_query, load_whole_query

P_SHIFT = tl.constexpr(12)  # probabilities are held as p * 2**12: small ones stay normal in float16
HEADROOM = tl.constexpr(0x40000000)  # 2.0: how far, in powers of two, a logit may exceed `top`
SMALLEST = tl.constexpr(103 << 23)  # 2**-24, float16's smallest number, as float32 exponent bits
SMALLEST_NORMAL = tl.constexpr(113 << 23)  # 2**-14
ROOT_UNIT = tl.constexpr(2.0**63)  # its square undoes what `key_radius` leaves out
HALF_RADIUS_UNIT = tl.constexpr(2.0**14)  # undoes what `weights_of` leaves out
SHARE = tl.constexpr(2.0**10)  # undoes a code's 2**-24, leaves out the same
CODE_OFFSET = tl.constexpr(127.5 * 2.0**-24)  # what a centroid's code exceeds its level by
NONE = tl.constexpr(-1e30)  # the maximum of no logits
FETCHED = tl.constexpr(2)  # pages that are asked for before the queries are there


@triton.constexpr_function
def of_kind(kinds, kind, field):
    """A constant of a kind; Triton indexes no deeper tuples itself."""
    return kinds[kind][field]


@triton.constexpr_function
def code_offset(bands, band, rest):
    """What a centroid's code exceeds its level by, in units of what a band's do: the nearest
    float16, or what that leaves (rest), as beside codes of six bits."""
    import struct

    exact = CODE_OFFSET.value / bands[band][0]
    (nearest,) = struct.unpack("<e", struct.pack("<e", exact))
    return exact - nearest if rest else nearest


@triton.jit
def load_tile(at, inside, WORDS: tl.constexpr, PADDED: tl.constexpr):
    """A tile whose rows are padded to a width that tl.dot takes."""
    if WORDS == PADDED:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0)


@triton.jit
def fetch_pages(
    Arena, Pages, Blocks, places, count, blocks_per_page, block_bytes, LINES: tl.constexpr
):  # fmt: skip
    """Asks for the first LINES * 128 bytes of the keys and values of the first pages, at most
    `count`, to be brought into the L2 cache."""
    i = tl.minimum(tl.arange(0, FETCHED), count - 1)
    page = tl.load(Pages + i).to(tl.int64)
    line = tl.arange(0, LINES) * 128
    for side in tl.static_range(2):
        block = tl.load(Blocks + page * blocks_per_page + tl.load(places + 2 * side))
        start = block.to(tl.int64) * block_bytes + tl.load(places + 2 * side + 1)
        at = (Arena + (start[:, None] + line[None, :])).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, False, 1
        )


@triton.jit
def attend_pages(
    Arena, Pages, Blocks, places, Parts, Units, query, stride, Out, Lse, at_head,
    first, end, last_valid, blocks_per_page, block_bytes, real_heads,
    D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr,
    KINDS: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention of an item, whose first query head's result goes to `at_head`; other arguments as
    in `decode_pages`, already moved to the item's place."""
    CALIBRATED: tl.constexpr = of_kind(KINDS, KIND, 0)
    RADII: tl.constexpr = of_kind(KINDS, KIND, 1)
    K: tl.constexpr = of_kind(KINDS, KIND, 2)
    W: tl.constexpr = of_kind(KINDS, KIND, 3)
    KT: tl.constexpr = of_kind(KINDS, KIND, 4)
    KD: tl.constexpr = of_kind(KINDS, KIND, 5)
    KB: tl.constexpr = of_kind(KINDS, KIND, 6)
    VT: tl.constexpr = of_kind(KINDS, KIND, 7)
    VP: tl.constexpr = of_kind(KINDS, KIND, 8)
    VD: tl.constexpr = of_kind(KINDS, KIND, 9)
    VB: tl.constexpr = of_kind(KINDS, KIND, 10)
    STAGES: tl.constexpr = of_kind(KINDS, KIND, 11)
    FOLD: tl.constexpr = of_kind(KINDS, KIND, 12)
    VC: tl.constexpr = of_kind(KINDS, KIND, 13)
    WIDTH: tl.constexpr = D // len(KB)
    COLUMNS: tl.constexpr = 2 * HEADS
    EACH: tl.constexpr = 1 if FOLD == 2 or len(VB) == 1 else 2  # bands that weights are for
    column = tl.arange(0, COLUMNS)
    g = tl.arange(0, HEADS)
    row = token_of(tl.arange(0, P // FOLD))
    k = tl.arange(0, K)
    w = tl.arange(0, W)
    d = tl.arange(0, DP)
    pair = tl.arange(0, P // 2)
    n = tl.arange(0, 16)
    query += stride if CALIBRATED else 0
    q, units, starts = load_query(Parts, Units, query, real_heads, D, HEADS, K, FOLD, KB, PTX)
    top = tl.full([HEADS], NONE, tl.float32)
    mass = tl.zeros([8, HEADS], tl.float32)
    ones = tl.full([16, P // FOLD], 1.0, tl.float16)
    unit = tl.full([], SMALLEST if CALIBRATED else SMALLEST_NORMAL, tl.int32)
    out, weight = (), ()
    for i in tl.static_range(len(VP)):
        out = out + (tl.zeros([W, COLUMNS], tl.float32),)
    for u in tl.static_range(0, len(VB), EACH):
        weight = weight + (tl.zeros([16, COLUMNS], tl.float32),)
    if CALIBRATED:
        whole_q, c_unit, c_start = load_whole_query(
            Parts, Units, query + stride, real_heads, D, DP, HEADS, PTX
        )
        scaled, scaled_starts = (), ()
        for b in tl.static_range(len(KB)):
            scaled = scaled + (units[b] * ROOT_UNIT,)
            scaled_starts = scaled_starts + (starts[b] * ROOT_UNIT,)
        units, starts = scaled, scaled_starts
        centroid_at, code_offsets = (), ()
        for i in tl.static_range(len(VC)):
            first_word = tl.zeros([16], tl.int32)
            for j in tl.static_range(1, len(VC[i])):
                first_word += tl.where(n % 4 == j - 1, VC[i][j], 0)
            word = w % VC[i][0] if FOLD == 2 else w  # rows beyond a tile's are not stored
            centroid_at = centroid_at + (word[:, None] + first_word[None, :],)
        rest = (n % 2 == 1)[None, :]
        for u in tl.static_range(0, len(VB), EACH):
            upper = tl.where(rest, code_offset(VB, u, 1), code_offset(VB, u, 0))
            lower = code_offset(VB, u + EACH - 1, 0)
            lower = tl.where(rest, code_offset(VB, u + EACH - 1, 1), lower)
            their = tl.where((n < 8)[:, None], upper, lower)
            code_offsets = code_offsets + (their.to(tl.float16),)

    # numbers that are alike in all lanes the compiler puts into uniform registers, and waits at the
    # end of an iteration for what only the next one needs: it must not know that they are alike
    zero = hidden_zero(real_heads, PTX)
    Pages, Blocks = Pages + zero, Blocks + zero
    key_block, key_offset = tl.load(places), tl.load(places + 1).to(tl.int64)
    value_block, value_offset = tl.load(places + 2), tl.load(places + 3).to(tl.int64)
    page = tl.load(Pages + first).to(tl.int64)
    block_k = tl.load(Blocks + page * blocks_per_page + key_block)
    block_v = tl.load(Blocks + page * blocks_per_page + value_block)
    page = tl.load(Pages + tl.minimum(first + 1, end - 1)).to(tl.int64)
    for e in tl.range(first, end, num_stages=STAGES):
        at_k = tl.multiple_of(block_k.to(tl.int64) * block_bytes + key_offset, 16)
        at_v = tl.multiple_of(block_v.to(tl.int64) * block_bytes + value_offset, 16)
        block_k = tl.load(Blocks + page * blocks_per_page + key_block)
        block_v = tl.load(Blocks + page * blocks_per_page + value_block)
        page = tl.load(Pages + tl.minimum(e + 2, end - 1)).to(tl.int64)
        keys, values = Arena + at_k, Arena + at_v
        value_words = values.to(tl.pointer_type(tl.int16), bitcast=True)
        k_tiles, v_tiles = (), ()
        for i in tl.static_range(len(KT)):
            byte = k % WIDTH % KT[i][1] if KT[i][2] else k % WIDTH
            place = KT[i][0] + k // WIDTH * KT[i][1] + byte
            at = keys + (row[:, None] * (FOLD * KT[i][1]) + place[None, :])
            k_tiles = k_tiles + (load_tile(at, (k < WIDTH)[None, :], FOLD * WIDTH, K),)
        for i in tl.static_range(len(VT)):
            at = value_words + (VT[i][0] + tl.arange(0, P // FOLD)[None, :] * VT[i][1] + w[:, None])
            v_tiles = v_tiles + (load_tile(at, (w < VT[i][1])[:, None], VT[i][1], W),)
        radii_at = keys.to(tl.pointer_type(tl.int16 if FOLD == 1 else tl.int32), bitcast=True)
        k_words = tl.load(radii_at + RADII // FOLD + row)
        v_radii = tl.load(values.to(tl.pointer_type(tl.int32), bitcast=True) + RADII // 2 + pair)
        if CALIBRATED:
            k_scales = tl.load((keys + D).to(tl.pointer_type(tl.int32), bitcast=True))
            v_scales = tl.load((values + D).to(tl.pointer_type(tl.int32), bitcast=True))
            k_half, k_centroid_half = pair_of(k_scales)
            v_half, v_centroid_half = pair_of(v_scales)
            v_unit, v_step = v_half.to(tl.float32), v_centroid_half.to(tl.float32)
            if DP >= 128:
                k_codes = load_tile(keys + d, d < D, D, DP)
                k_codes = tl.broadcast_to(k_codes[None, :], [16, DP])
            else:  # fewer than four bytes a lane would not be copied asynchronously: repeat them
                at = keys + tl.broadcast_to(d[None, :], [16, DP])
                k_codes = load_tile(at, (d < D)[None, :], D, DP)
            v_codes = ()
            for i in tl.static_range(len(centroid_at)):
                v_codes = v_codes + (tl.load(value_words + centroid_at[i]),)
            near = tl.dot(take_bytes(k_codes, 0, 8, 0, PTX), whole_q, out_dtype=tl.int32)
            near = join_parts(near, 1)
            near = near * c_unit[None, :] + c_start[None, :]
            near *= k_centroid_half.to(tl.float32)
            k_unit = k_half.to(tl.float32) * ROOT_UNIT
        else:  # what nobody wrote may be NaN
            valid = row < tl.where(e == end - 1, last_valid, P)
            k_words = tl.where(valid, k_words, 0)
            low = 2 * pair < tl.where(e == end - 1, last_valid, P)
            high = 2 * pair + 1 < tl.where(e == end - 1, last_valid, P)
            v_radii &= tl.where(low, 0xFFFF, 0) | tl.where(high, -65536, 0)
            largest = tl.max(tl.maximum(v_radii & 0xFFFF, v_radii >> 16 & 0xFFFF), 0)
            v_unit = largest.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            near = tl.zeros([16, HEADS], tl.float32)
            k_unit = 1.0
        logits = tl.zeros([P, HEADS], tl.float32)
        for b in tl.static_range(len(KB)):
            if KB[b][2] > 0:
                dots = tl.zeros([P // FOLD, FOLD * COLUMNS], tl.int32)
                for i in tl.static_range(len(KD)):
                    if KD[i][1] == b:
                        tile = k_tiles[KD[i][0]]
                        if KT[KD[i][0]][2]:
                            shift = (k % WIDTH // KT[KD[i][0]][1] * KT[KD[i][0]][2])[None, :]
                            # smaller tiles may have single bytes in a lane's registers
                            codes = take_runs(
                                tile, shift, KD[i][3],
                                PTX and KT[KD[i][0]][1] % 4 == 0 and P // FOLD >= 32,
                            )  # fmt: skip
                        else:
                            codes = take_bytes(tile, KD[i][2], KD[i][3], KD[i][4], PTX)
                        dots = tl.dot(codes, q[b], dots, out_dtype=tl.int32)
                radii = key_radii(k_words, b, FOLD, CALIBRATED)
                level = join_parts(dots, FOLD) * units[b][None, :] + starts[b][None, :]
                logits += level * radii[:, None]
        if not CALIBRATED:
            logits = tl.where(valid[:, None], logits, -float("inf"))
        blocks = tl.reshape(logits, [P // 16, 16, HEADS])
        x = blocks * k_unit + (near - top[None, :])[None, :, :]
        larger = tl.maximum(v_unit, v_step) if CALIBRATED else v_unit
        power = tl.maximum(larger.to(tl.int32, bitcast=True) & 0x7F800000, unit)
        # of positive numbers the bits are in order
        rise = tl.max(tl.reshape(x, [P * HEADS]).to(tl.int32, bitcast=True), 0)
        if (rise > HEADROOM) | (power > unit):
            # rarely: sums are in units of the largest scale so far, cut to a power of two
            lifted = blocks * k_unit + near[None, :, :]
            new_top = tl.maximum(top, tl.max(tl.reshape(lifted, [P, HEADS]), 0))
            fade = tl.exp2(top - new_top)
            top = new_top
            x = blocks * k_unit + (near - top[None, :])[None, :, :]
            mass *= fade[None, :]
            sums_fade = twice(fade) * (unit - power + 0x3F800000).to(tl.float32, bitcast=True)
            new_weight, new_out = (), ()
            for u in tl.static_range(len(weight)):
                new_weight = new_weight + (weight[u] * sums_fade[None, :],)
            for i in tl.static_range(len(out)):
                new_out = new_out + (out[i] * sums_fade[None, :],)
            weight, out, unit = new_weight, new_out, power
        p = tl.reshape(tl.exp2(x), [P, HEADS])
        # of a lane's own tokens: products and the end add the rest up
        in_even, in_odd = masses_of(p, FOLD)
        mass += in_even + in_odd if FOLD == 2 else in_even
        per_unit = (0x7F000000 - unit).to(tl.float32, bitcast=True)
        if CALIBRATED:
            per_step = v_step * per_unit * 2.0**P_SHIFT
            in_even, in_odd = in_even * per_step, in_odd * per_step
            pairs = turn_weights(p * (v_unit * per_unit * 2.0**P_SHIFT), FOLD, PTX)
        else:
            pairs = turn_weights(p * 2.0**P_SHIFT, FOLD, PTX)
            bits = per_unit.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            turn = bits | bits << 16
        radii = radii_of_columns(v_radii, FOLD, PTX)
        weights, shares, halves, new_weight, new_out = (), (), (), (), ()
        for u in tl.static_range(0, len(VB), EACH):
            if CALIBRATED:
                turn = turn_of(u, EACH)
            its = weights_of(pairs, radii, turn, CALIBRATED, PTX)
            weights = weights + (its,)
            sums = tl.dot(ones, its, weight[u // EACH])
            if CALIBRATED:
                words = share_words(
                    in_even * (SHARE / VB[u][1]), in_odd * (SHARE / VB[u + EACH - 1][1]), PTX
                )
                shares = shares + (words,)
                own = words_to_operand(words & (word_mask(0) | word_mask(1)), PTX)
                sums = tl.dot(code_offsets[u // EACH], own, sums)
            new_weight = new_weight + (sums,)
        if CALIBRATED:
            for i in tl.static_range(len(v_codes)):
                halves = halves + (take_digit(v_codes[i], 0, 8, 0, PTX),)
                halves = halves + (take_digit(v_codes[i], 8, 8, 0, PTX),)
        for i in tl.static_range(len(VP)):
            sums = out[i]
            if CALIBRATED:
                rows = word_mask(VP[i][4] % 4)
                if VP[i][3] >= 0:  # the other part's codes are in these sums, so its centroid too
                    rows |= word_mask(VP[VP[i][3]][4] % 4)
                own = words_to_operand(shares[VP[i][0] // EACH] & rows, PTX)
                sums = tl.dot(halves[VP[i][4] // 4 * 2 + VP[i][1] % 2], own, sums)
            for j in tl.static_range(len(VD)):
                if VD[j][1] == i:
                    codes = take_digit(v_tiles[VD[j][0]], VD[j][2], VD[j][3], VD[j][4], PTX)
                    sums = tl.dot(codes, weights[VP[i][0] // EACH], sums)
            new_out = new_out + (sums,)
        out, weight = new_out, new_weight

    target = Out + at_head * D
    mass = tl.sum(mass, 0)
    inverse = tl.where(mass > 0, 1.0 / mass, 0.0)
    scale = unit.to(tl.float32, bitcast=True) * 2.0**-P_SHIFT
    if CALIBRATED:
        scale *= HALF_RADIUS_UNIT
    by_column = twice(inverse * scale)
    for i in tl.static_range(len(VP)):
        own_rows = n[:, None] // 8 == (column % 2)[None, :]
        its = weight[VP[i][0] // EACH]
        offset = tl.max(tl.where(own_rows, its, -float("inf")), 0) * VB[VP[i][0]][0]
        sums = out[i] - (out[VP[i][3]] if VP[i][3] >= 0 else 0.0)
        sums = (sums - offset[None, :]) * (by_column * VB[VP[i][0]][1])[None, :]
        if FOLD == 2:
            sums = add_rows_of_tokens(sums, VP[i][2])
            channel = VP[i][1] + 2 * tl.arange(0, VP[i][2])
            at = target + (g * D)[None, :] + channel[:, None]
            tl.store(at, sums, mask=(g < real_heads)[None, :])
        else:
            mine = (column // 2 < real_heads) & (column % 2 == VP[i][0] % 2)
            inside = (w < VP[i][2])[:, None] & mine[None, :]
            channel = VP[i][1] + 2 * w
            tl.store(target + (column // 2 * D)[None, :] + channel[:, None], sums, mask=inside)
    lse = tl.where(mass > 0, top + tl.log2(mass), -float("inf"))
    tl.store(Lse + at_head + g, lse, mask=g < real_heads)


# one binary for all sizes of workspace and all layers
@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["KindOf"])
def decode_pages(
    signs, Arena, Items, Pages, Blocks, Places, KindOf, Parts, Units, Out, Lse, max_pages,
    blocks_per_page, block_bytes, level_stride, kv_heads, stride,
    D: tl.constexpr, P: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr,
    KINDS: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one item of one KV head, at most HEADS query heads of it, by every program.

    signs   operands.SIGNS, which `take_bytes` reads
    Arena   int8, the whole arena; Blocks int32 [pages, blocks_per_page], blocks of block_bytes
    Items   int32 [items, ITEM_NUMBERS]: level << 16 | request, first, end, valid tokens of the last
            page, number
    Pages   int32 [requests, max_pages], pages of each request in order of level
    Places  int32 [levels, kv_heads, 2, 2], block of the page and byte offset of keys and values
    KindOf  int32 [levels, kv_heads], kinds of the slices; levels lie level_stride heads apart in
            both
    Parts, Units  queries as `frame_queries` leaves them, sets `stride` queries apart
    Out     float32 [items, kv_heads, G, D] in the value frame, by an item's number; Lse [items,
            kv_heads, G] likewise, base 2
    """
    head = tl.program_id(0)
    first_head = tl.program_id(1) * HEADS
    entry = tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    which = tl.load(Items + entry * ITEM_NUMBERS)
    first = tl.load(Items + entry * ITEM_NUMBERS + 1)
    end = tl.load(Items + entry * ITEM_NUMBERS + 2)
    last_valid = tl.load(Items + entry * ITEM_NUMBERS + 3)
    item = tl.load(Items + entry * ITEM_NUMBERS + 4)
    request = (which & 0xFFFF).to(tl.int64)
    row = (which >> 16) * level_stride + head
    places = Places + row * 4
    if first >= end:
        return
    kind = tl.load(KindOf + row)
    if PDL:
        # while queries are still on their way into the frames
        fetch_pages(
            Arena, Pages + request * max_pages + first, Blocks, places, end - first,
            blocks_per_page, block_bytes, DP // 4,
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    query = (request * kv_heads + head) * G + first_head
    at = (item.to(tl.int64) * kv_heads + head) * G + first_head
    # a bit that the compiler does not see through: of four and more numbers it would make a jump
    # through a table, which took 8 us to read where other kernels had run in between
    bit = 1 << kind
    if PTX:
        bit = tl.inline_asm_elementwise("shl.b32 $0, 1, $1;", "=r,r", [kind], tl.int32, True, 1)
    for i in tl.static_range(len(KINDS)):
        if (bit >> i) & 1:
            attend_pages(
                Arena, Pages + request * max_pages, Blocks, places,
                Parts, Units, query, stride, Out, Lse, at,
                first, end, last_valid, blocks_per_page, block_bytes, G - first_head,
                D, P, HEADS, DP, KINDS, i, PTX,
            )  # fmt: skip
