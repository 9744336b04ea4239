"""Triton bodies of angle-domain decoding; launch.py sets up what they assume.

A program reads one *item*: consecutive entries (pages) of one row, all of one pair of patterns.
Tokens are the rows of the matrix products, query heads their columns. Codes become operands without
a conversion: a digit in the low bits of a 16-bit word reads, as a float16, as digit * 2**(place -
24), a subnormal number that tensor cores take exactly. A word holds the bytes of two neighbouring
channels, so every digit has an even and an odd half.

A side (keys or values) is described by tuples of constants:
    TILES   (offset in words, words per row)
    PARTS   (band, first channel, words): channels first, first + 2, ... of a band
    DIGITS  (tile, part, shift in the word, bits, place in the operand)
    BANDS   (what a code exceeds its level by, factor that undoes place and 2**-24), (0, 0) uncoded
"""

from __future__ import annotations

import triton
import triton.language as tl

P_SHIFT = tl.constexpr(8)  # probabilities are held as p * 2**8: small ones stay normal in float16
HEADROOM = tl.constexpr(6.0)  # how far (in powers of two) a logit may exceed `top` before sums fade
SMALLEST = tl.constexpr(103 << 23)  # 2**-24, float16's smallest number, as float32 exponent bits
UNIT = tl.constexpr(2.0**24)  # undoes the operand's 2**-24
RADIUS_UNIT = tl.constexpr(2.0**112)  # undoes what radius_of leaves out
CENTROID = tl.constexpr(4)  # place of the centroid's radius among the header's scales
NONE = tl.constexpr(-1e30)  # the maximum of no logits


@triton.constexpr_function
def digit_asm(shift, bits, place):
    """PTX that takes a digit out of two words at once."""
    mask = (((1 << bits) - 1) << place) * 0x10001
    if shift == place:
        return f"and.b32 $0, $1, {mask};"
    if shift != place + 8:
        op = "shr.u32" if shift > place else "shl.b32"
        return f"{{ .reg .b32 t; {op} t, $1, {abs(shift - place)}; and.b32 $0, t, {mask}; }}"
    upper = "prmt.b32 t, $1, 0, 0x4341;"  # the upper byte of both words
    if bits == 8:
        return f"{{ .reg .b32 t; {upper} mov.b32 $0, t; }}"
    if place + bits < 8:
        return f"{{ .reg .b32 t; {upper} and.b32 $0, t, {mask}; }}"
    # the highest digit is the byte without the others: that is not the busy integer unit's work
    rest = ((1 << place) - 1) * 0x10001
    return f"{{ .reg .b32 t, r; {upper} and.b32 r, t, {rest}; sub.f16x2 $0, t, r; }}"


@triton.jit
def take_digit(
    words, SHIFT: tl.constexpr, BITS: tl.constexpr, PLACE: tl.constexpr, PTX: tl.constexpr
):
    """int16 words -> the digit at bit SHIFT, as float16 digit * 2**(PLACE - 24)."""
    if PTX:
        asm: tl.constexpr = digit_asm(SHIFT, BITS, PLACE)
        return tl.inline_asm_elementwise(
            asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    digit = (((words.to(tl.int32) & 0xFFFF) >> SHIFT) & ((1 << BITS) - 1)) << PLACE
    return digit.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def columns_of(values, GP: tl.constexpr):
    """[n, slots] -> [n, GP], the value of a slot in all of its columns."""
    rows: tl.constexpr = values.shape[0]
    slots: tl.constexpr = values.shape[1]
    wide = tl.broadcast_to(values[:, :, None], [rows, slots, GP // slots])
    return tl.reshape(wide, [rows, GP])


@triton.jit
def scales_of(scales, slot, TILE: tl.constexpr, SLOTS: tl.constexpr):
    """The bands' scalars -> those of the bands TILE * SLOTS + slot, like slot."""
    found = tl.full([slot.shape[0]], 0.0, tl.float32)
    for i in tl.static_range(SLOTS):
        found = tl.where(slot == i, scales[TILE * SLOTS + i], found)
    return found


@triton.jit
def radii_of(words, slot, TILE: tl.constexpr, SLOTS: tl.constexpr, PTX: tl.constexpr):
    """Bytes TILE * SLOTS + slot of int32 words [n], e4m4 numbers -> float32 [n, SLOTS] times
    2**-112."""
    turn = ((19 - 8 * (TILE * SLOTS + slot)) & 31)[None, :]
    words = tl.broadcast_to(words[:, None], [words.shape[0], SLOTS])
    turn = tl.broadcast_to(turn, [words.shape[0], SLOTS])
    if PTX:
        asm: tl.constexpr = "shf.l.wrap.b32 $0, $1, $1, $2;"
        turned = tl.inline_asm_elementwise(asm, "=r,r,r", [words, turn], tl.int32, True, 1)
    else:
        wide = words.to(tl.uint32, bitcast=True).to(tl.uint64)
        turned = ((wide << turn.to(tl.uint64)) | (wide >> (32 - turn).to(tl.uint64))).to(tl.uint32)
        turned = turned.to(tl.int32, bitcast=True)
    return (turned & 0x07F80000).to(tl.float32, bitcast=True)


@triton.jit
def load_tile(at, column, WORDS: tl.constexpr, PADDED: tl.constexpr):
    """A tile whose rows are padded to a width that tl.dot takes."""
    if WORDS == PADDED:
        return tl.load(at)
    return tl.load(at, mask=column < WORDS, other=0)


@triton.jit
def load_words(halves, t):
    return tl.load(halves.to(tl.pointer_type(tl.int32), bitcast=True) + t)


@triton.jit
def load_halves(halves, t):
    return tl.load(halves + t).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_scales(halves):
    """The header's float16 scales: one per band, then the centroid's."""
    quads = halves.to(tl.pointer_type(tl.int64), bitcast=True)  # too short loads are not pipelined
    bands, centroid = tl.load(quads), tl.load(quads + 1)
    scales = ()
    for i in tl.static_range(5):
        bits = (bands >> (16 * i)) if i < 4 else centroid
        scales = scales + (bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    return scales


@triton.jit
def load_query(
    q_row, per_step, w, slot, PARTS: tl.constexpr, BANDS: tl.constexpr, SLOTS: tl.constexpr
):
    """The query by parts, [W, GP] float16, each in the columns of its band's slot, zero elsewhere;
    and by column tile what codes exceed levels by, [GP], negative."""
    parts, offsets = (), ()
    for i in tl.static_range(len(PARTS)):
        inside = (w < PARTS[i][2])[:, None] & (slot == PARTS[i][0] % SLOTS)[None, :]
        part = tl.load(q_row + PARTS[i][1] + 2 * w[:, None], mask=inside, other=0.0)
        parts = parts + ((part * per_step[None, :]).to(tl.float16),)
    for u in tl.static_range(len(BANDS) // SLOTS):
        total = tl.zeros([slot.shape[0]], tl.float32)
        for i in tl.static_range(len(PARTS)):
            if PARTS[i][0] // SLOTS == u:
                total += tl.sum(parts[i].to(tl.float32), 0) * -BANDS[PARTS[i][0]][0]
        offsets = offsets + (total,)
    return parts, offsets


@triton.jit
def tile_dots(
    tiles, q, start, TILE: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
    DIGITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """start + codes . query over the bands of one column tile: [tokens, GP]."""
    dots = start
    for i in tl.static_range(len(DIGITS)):
        if PARTS[DIGITS[i][1]][0] // SLOTS == TILE:
            words = tiles[DIGITS[i][0]]
            codes = take_digit(words, DIGITS[i][2], DIGITS[i][3], DIGITS[i][4], PTX)
            dots = tl.dot(codes, q[DIGITS[i][1]], dots)
    return dots


@triton.jit
def decode_items(
    Arena, Entries, Items, Q, Out, Lse, first_item,
    D: tl.constexpr, P: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SLOTS: tl.constexpr,
    W: tl.constexpr, CW: tl.constexpr, CALIBRATED: tl.constexpr, RADII: tl.constexpr,
    KT: tl.constexpr, KP: tl.constexpr, KD: tl.constexpr, KB: tl.constexpr,
    VT: tl.constexpr, VP: tl.constexpr, VD: tl.constexpr, VB: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attention of one item by every program.

    Arena    int16, the whole arena
    Entries  int64 [entries, 2]: byte addresses of the key and of the value slice
    Items    int32 [items, 4]: row, first entry, end, valid tokens of the last entry
    Q        float32 [rows, G, D] in the key frame, gives logits in base 2
    Out      float32 [items, 2, G, D] in the value frame: codes, centroids; Lse [items, G], base 2
    """
    item = first_item + tl.program_id(0)
    row = tl.load(Items + item * 4)
    first = tl.load(Items + item * 4 + 1)
    end = tl.load(Items + item * 4 + 2)
    last_valid = tl.load(Items + item * 4 + 3)
    g = tl.arange(0, GP) % (GP // SLOTS)
    real = g < G
    slot = tl.arange(0, GP) // (GP // SLOTS)
    slots = tl.arange(0, SLOTS)
    w = tl.arange(0, W)
    c = tl.arange(0, CW)
    t = tl.arange(0, P)
    q_row = Q + row * (G * D) + g[None, :] * D
    channel = (c < D // 2)[:, None] & real[None, :]
    q_even = tl.load(q_row + 2 * c[:, None], mask=channel, other=0.0)
    q_odd = tl.load(q_row + 2 * c[:, None] + 1, mask=channel, other=0.0)
    peak = tl.max(tl.maximum(tl.abs(q_even), tl.abs(q_odd)), 0)
    per_step = tl.where(peak > 0, 2.0**14 / peak, 1.0)  # as large as is safe in float16
    q_scale = UNIT / per_step
    q, offsets = load_query(q_row, per_step, w, tl.where(real, slot, -1), KP, KB, SLOTS)
    real = real[None, :]
    top = tl.full([GP], NONE, tl.float32)
    mass = tl.zeros([GP], tl.float32)
    ones = tl.full([16, P], 1.0, tl.float16)
    out, weight, unit, near_sums = (), (), (), ()
    for i in tl.static_range(len(VP)):
        out = out + (tl.zeros([W, GP], tl.float32),)
    for u in tl.static_range(len(VB) // SLOTS):
        weight = weight + (tl.zeros([16, GP], tl.float32),)
    for b in tl.static_range(len(VB)):
        unit = unit + (tl.full([], SMALLEST, tl.int32),)
    if CALIBRATED:
        per_step = tl.where(slot == 0, per_step, 0.0)[None, :]
        q_even = (q_even * per_step).to(tl.float16)
        q_odd = (q_odd * per_step).to(tl.float16)
        c_offset = tl.sum(q_even.to(tl.float32), 0) + tl.sum(q_odd.to(tl.float32), 0)
        c_offset = c_offset * (-127.5 / UNIT)
        c_mass = tl.zeros([GP], tl.float32)
        HALVES: tl.constexpr = 1 if SLOTS > 1 else 2
        for _ in tl.static_range(HALVES):
            near_sums = near_sums + (tl.zeros([CW, GP], tl.float32),)
    for e in tl.range(first, end, num_stages=STAGES):
        keys = Arena + tl.multiple_of(tl.load(Entries + 2 * e) >> 1, 8)
        values = Arena + tl.multiple_of(tl.load(Entries + 2 * e + 1) >> 1, 8)
        k_tiles, v_tiles = (), ()
        for i in tl.static_range(len(KT)):
            at = keys + (KT[i][0] + t[:, None] * KT[i][1] + w[None, :])
            k_tiles = k_tiles + (load_tile(at, w[None, :], KT[i][1], W),)
        for i in tl.static_range(len(VT)):
            at = values + (VT[i][0] + t[None, :] * VT[i][1] + w[:, None])
            v_tiles = v_tiles + (load_tile(at, w[:, None], VT[i][1], W),)
        valid = t < tl.where(e == end - 1, last_valid, P)
        if CALIBRATED:
            k_radii = load_words(keys + RADII, t)
            v_radii = load_words(values + RADII, t)
            k_scales = load_scales(keys + D // 2)
            v_scales = load_scales(values + D // 2)
            k_centroid = load_tile(keys + c[None, :], c[None, :], D // 2, CW)
            v_centroid = load_tile(values + c[:, None], c[:, None], D // 2, CW)
            k_centroid = tl.broadcast_to(k_centroid, [16, CW])
            near = tl.dot(take_digit(k_centroid, 0, 8, 0, PTX), q_even)
            near = tl.dot(take_digit(k_centroid, 8, 8, 0, PTX), q_odd, near)
            near = (tl.max(near, 0) + c_offset) * k_scales[CENTROID]
            logits = tl.where(valid[:, None], near[None, :], -float("inf"))
        else:  # what nobody wrote may be NaN
            k_radii = tl.where(valid, load_halves(keys + RADII, t), 0.0)
            v_radii = tl.where(valid, load_halves(values + RADII, t), 0.0)
            v_scales = (tl.max(v_radii, 0),)
            logits = tl.where(valid[:, None], tl.zeros([P, GP], tl.float32), -float("inf"))
        for u in tl.static_range(len(KB) // SLOTS):
            dots = tl.broadcast_to(offsets[u][None, :], [P, GP])
            dots = tile_dots(k_tiles, q, dots, u, SLOTS, KP, KD, PTX)
            if CALIBRATED:
                factors = ()
                for b in tl.static_range(len(KB)):
                    factors = factors + (k_scales[b] * (KB[b][1] * RADIUS_UNIT / UNIT),)
                radii = radii_of(k_radii, slots, u, SLOTS, PTX)
                radii = radii * scales_of(factors, slots, u, SLOTS)[None, :]
                logits += dots * columns_of(radii, GP)
            else:
                logits += dots * (k_radii * (KB[0][1] / UNIT))[:, None]
        if SLOTS > 1:  # the bands' shares of a logit lie in different columns
            whole = tl.sum(tl.reshape(logits, [P, SLOTS, GP // SLOTS]), 1)
            whole = tl.broadcast_to(whole[:, None, :], [P, SLOTS, GP // SLOTS])
            logits = tl.reshape(whole, [P, GP])

        page_top = tl.max(logits, 0) * q_scale
        rise = tl.max(page_top - top, 0)
        powers, grown = (), rise > HEADROOM
        for b in tl.static_range(len(VB)):
            power = tl.maximum(v_scales[b].to(tl.int32, bitcast=True) & 0x7F800000, unit[b])
            grown = grown | (power > unit[b])
            powers = powers + (power,)
        if grown:  # rarely: sums are in units of the largest scale so far, cut to a power of two
            new_top = tl.maximum(top, page_top)
            fade = tl.exp2(top - new_top)
            top = new_top
            mass *= fade
            if CALIBRATED:
                c_mass *= fade
            ratios, new_weight, new_out, new_near = (), (), (), ()
            for b in tl.static_range(len(VB)):
                ratio = (unit[b] - powers[b] + 0x3F800000).to(tl.float32, bitcast=True)
                ratios = ratios + (ratio,)
            for i in tl.static_range(len(near_sums)):
                new_near = new_near + (near_sums[i] * fade[None, :],)
            for u in tl.static_range(len(VB) // SLOTS):
                in_slot = scales_of(ratios, slot, u, SLOTS)
                new_weight = new_weight + (weight[u] * (fade * in_slot)[None, :],)
            for i in tl.static_range(len(VP)):
                new_out = new_out + (out[i] * (fade * ratios[VP[i][0]])[None, :],)
            weight, out, unit, near_sums = new_weight, new_out, powers, new_near
        p = tl.exp2(logits * q_scale[None, :] - (top - P_SHIFT)[None, :])
        page_mass = tl.sum(p, 0)
        mass += page_mass
        if CALIBRATED:
            share = page_mass * v_scales[CENTROID]
            c_mass += share
            new_near = ()
            for i in tl.static_range(HALVES):
                half = (slots + i) % 2
                codes = (v_centroid.to(tl.int32) >> (8 * half)[None, :]) & 0xFF
                sums = columns_of(codes.to(tl.float32), GP) * share[None, :]
                new_near = new_near + (near_sums[i] + sums,)
            near_sums = new_near
        weights, new_weight, new_out = (), (), ()
        for u in tl.static_range(len(VB) // SLOTS):
            if CALIBRATED:
                factors = ()
                for b in tl.static_range(len(VB)):
                    per_unit = (0x7F000000 - unit[b]).to(tl.float32, bitcast=True)
                    factors = factors + (v_scales[b] * per_unit * RADIUS_UNIT,)
                radii = radii_of(v_radii, slots, u, SLOTS, PTX)
                radii = columns_of(radii * scales_of(factors, slots, u, SLOTS)[None, :], GP)
            else:
                radii = (v_radii * (0x7F000000 - unit[0]).to(tl.float32, bitcast=True))[:, None]
            weights = weights + ((p * radii).to(tl.float16),)
            new_weight = new_weight + (tl.dot(ones, weights[u], weight[u]),)
        for i in tl.static_range(len(VP)):
            sums = out[i]
            for j in tl.static_range(len(VD)):
                if VD[j][1] == i:
                    codes = take_digit(v_tiles[VD[j][0]], VD[j][2], VD[j][3], VD[j][4], PTX)
                    sums = tl.dot(codes, weights[VP[i][0] // SLOTS], sums)
            new_out = new_out + (sums,)
        out, weight = new_out, new_weight

    inverse = tl.where(mass > 0, 1.0 / mass, 0.0)
    target = Out + item * (2 * G * D) + g[None, :] * D
    for i in tl.static_range(len(VP)):
        offset = tl.max(weight[VP[i][0] // SLOTS], 0) * VB[VP[i][0]][0]
        scale = inverse * (unit[VP[i][0]].to(tl.float32, bitcast=True) * VB[VP[i][0]][1])
        inside = (w < VP[i][2])[:, None] & real & (slot == VP[i][0] % SLOTS)[None, :]
        channel = VP[i][1] + 2 * w[:, None]
        tl.store(target + channel, (out[i] - offset[None, :]) * scale[None, :], mask=inside)
    for i in tl.static_range(len(near_sums)):
        half = (slot + i) % 2
        inside = (c < D // 2)[:, None] & real & (slot < 2)[None, :]
        sums = (near_sums[i] - (c_mass * 127.5)[None, :]) * inverse[None, :]
        tl.store(target + (G * D + 2 * c[:, None] + half[None, :]), sums, mask=inside)
    lse = tl.where(mass > 0, top - P_SHIFT + tl.log2(mass), -float("inf"))
    tl.store(Lse + item * G + g, lse, mask=(g < G) & (slot == 0))


@triton.jit
def frame_queries(
    Q, Dual, Centre, Framed, Near, batch, kv_heads, scale,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Queries into a key frame: COLUMNS channels of ROWS queries of one KV head by every program.

    Q       [batch, kv_heads * G, D]; logits in base 2 are `scale` times q . k
    Dual    float32 [frames, kv_heads, D, D], B; Centre float32 [kv_heads, D]
    Framed  float32 [frames, batch, kv_heads * G, D], B q, and Near float32 [batch, kv_heads * G],
            q . centre, both in base 2
    """
    head = tl.program_id(0) % kv_heads
    frame = tl.program_id(2)
    m = tl.program_id(0) // kv_heads * ROWS + tl.arange(0, ROWS)
    known = m < batch * G
    query = (m // G * kv_heads + head) * G + m % G
    d = tl.arange(0, DP)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = known[:, None] & (d < D)[None, :]
    q = tl.load(Q + query[:, None] * D + d[None, :], mask=inside, other=0.0)
    q = q.to(tl.float32) * scale
    dual = Dual + (frame * kv_heads + head).to(tl.int64) * (D * D)
    inside = (d < D)[:, None] & (column < D)[None, :]
    turned = tl.load(dual + column[None, :] * D + d[:, None], mask=inside, other=0.0)
    framed = tl.dot(q, turned, input_precision="tf32x3")
    target = Framed + (frame * batch * kv_heads * G + query)[:, None] * D + column[None, :]
    tl.store(target, framed, mask=known[:, None] & (column < D)[None, :])
    if (frame == 0) & (tl.program_id(1) == 0):
        centre = tl.load(Centre + head * D + d, mask=d < D, other=0.0)
        tl.store(Near + query, tl.sum(q * centre[None, :], 1), mask=known)


@triton.jit
def merge_items(
    Partial, Lse, RowItems, RowStart, Near, Merged, OutLse,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """Items of a row into one sum per frame, one query head by every program.

    Partial   float32 [items, 2, G, D]; Lse float32 [items, G], base 2
    RowItems  int32, items by row, then by frame; those of (row, frame) start at RowStart
              int32 [rows * FRAMES + 1]
    Merged    float32 [FRAMES, rows * G, D]: what the items of a frame add to the attention
    OutLse    float32 [rows * G], natural
    """
    query = tl.program_id(0)
    row = query // G
    g = query % G
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    first = tl.load(RowStart + row * FRAMES)
    end = tl.load(RowStart + (row + 1) * FRAMES)
    top, mass = NONE, 0.0
    for i in range(first, end, BLOCK):
        item = tl.load(RowItems + i + n, mask=i + n < end, other=0)
        logs = tl.load(Lse + item * G + g, mask=i + n < end, other=-float("inf"))
        higher = tl.maximum(top, tl.max(logs, 0))
        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(logs - higher), 0)
        top = higher
    total = tl.where(mass > 0, top + tl.log2(mass), 0.0)
    for frame in tl.static_range(FRAMES):
        first = tl.load(RowStart + row * FRAMES + frame)
        end = tl.load(RowStart + row * FRAMES + frame + 1)
        sums = tl.zeros([DP], tl.float32)
        for i in range(first, end, BLOCK):
            item = tl.load(RowItems + i + n, mask=i + n < end, other=0)
            logs = tl.load(Lse + item * G + g, mask=i + n < end, other=-float("inf"))
            at = Partial + (item.to(tl.int64) * 2 * G + g)[:, None] * D + d[None, :]
            known = (i + n < end)[:, None] & (d < D)[None, :]
            part = tl.load(at, mask=known, other=0.0)
            if frame == 1:
                part += tl.load(at + G * D, mask=known, other=0.0)
            sums += tl.sum(part * tl.exp2(logs - total)[:, None], 0)
        tl.store(Merged + (frame * tl.num_programs(0) + query) * D + d, sums, mask=d < D)
    lse = (total + tl.load(Near + query)) * 0.6931471805599453
    tl.store(OutLse + query, tl.where(mass > 0, lse, -float("inf")))


@triton.jit
def unframe_sums(
    Merged, Dual, Centre, OutLse, Out, batch, kv_heads,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FRAMES: tl.constexpr,
):  # fmt: skip
    """Finished sums out of their frames: COLUMNS channels of ROWS queries of one KV head.

    Merged  float32 [FRAMES, batch, kv_heads * G, D]
    Dual    float32 [FRAMES, kv_heads, D, D], B of the value frames; Centre float32 [kv_heads, D]
    Out     [batch, kv_heads * G, D]; zero where OutLse float32 [batch, kv_heads * G] is -inf
    """
    head = tl.program_id(0) % kv_heads
    m = tl.program_id(0) // kv_heads * ROWS + tl.arange(0, ROWS)
    known = m < batch * G
    query = (m // G * kv_heads + head) * G + m % G
    d = tl.arange(0, DP)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    some = tl.load(OutLse + query, mask=known, other=-float("inf")) > -float("inf")
    centre = tl.load(Centre + head * D + column, mask=column < D, other=0.0)
    out = tl.where(some[:, None], centre[None, :], 0.0)
    for frame in tl.static_range(FRAMES):
        at = Merged + (frame * batch * kv_heads * G + query)[:, None] * D + d[None, :]
        sums = tl.load(at, mask=known[:, None] & (d < D)[None, :], other=0.0)
        at = Dual + (frame * kv_heads + head).to(tl.int64) * (D * D)
        at += d[:, None] * D + column[None, :]
        dual = tl.load(at, mask=(d < D)[:, None] & (column < D)[None, :], other=0.0)
        out = tl.dot(sums, dual, out, input_precision="tf32x3")
    target = Out + query[:, None] * D + column[None, :]
    tl.store(target, out.to(Out.dtype.element_ty), mask=known[:, None] & (column < D)[None, :])
