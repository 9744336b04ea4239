# mypy: ignore-errors
"""Triton bodies before and after the pages: queries into the frames, items into one output."""

from __future__ import annotations

import triton
import triton.language as tl

STEP = tl.constexpr(32)  # channels of the query that meet a frame at once
BANDS = tl.constexpr(4)  # of a calibrated frame
QUERY_PEAK = tl.constexpr(16000.0)  # largest integer of a query: high part at most 125
NONE = tl.constexpr(-1e30)  # the maximum of no logits
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["batch", "stride"])  # one binary for all batches
def frame_queries(
    Q, Dual, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries into a key frame and to integers: ROWS queries of one KV head and a frame by every
    program.

    Q       [batch, kv_heads * G, D], rows q_row apart; logits in base 2 are `scale` times q . k
    Dual    float32 [2, kv_heads, D, D], B; Centre float32 [kv_heads, D]
    Near    float32 [batch, kv_heads * G], q . centre, base 2
    The rest by set, which are `stride` queries apart: in the hot frame, in the calibrated one by
    bands, in the calibrated one as a whole; [3, batch, kv_heads * G, ...]:
    Parts   int8 [..., 2, D], integers, their high then their low part: 128 * high + low
    Units   float32 [..., BANDS], what an integer of the band stands for, base 2; the same for all
            bands where the query has one unit
    """
    head = tl.program_id(0) % kv_heads
    of_frame = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0) // kv_heads * ROWS + tl.arange(0, ROWS)
    known = m < batch * G
    query = (m // G * kv_heads + head) * G + m % G
    row = Q + (m // G).to(tl.int64) * q_row + (head * G + m % G) * D
    # bands are padded on their own, so that they are a dimension
    PADDED: tl.constexpr = DP // BANDS
    place = tl.arange(0, DP)
    d = place // PADDED * (D // BANDS) + place % PADDED
    real = place % PADDED < D // BANDS
    step = tl.arange(0, STEP)
    dual = Dual + (of_frame * kv_heads + head).to(tl.int64) * (D * D)
    framed = tl.zeros([ROWS, DP], tl.float32)
    near = tl.zeros([ROWS, STEP], tl.float32)
    for start in tl.range(0, D, STEP, num_stages=STAGES):
        channel = start + step
        inside = known[:, None] & (channel < D)[None, :]
        q = tl.load(row[:, None] + channel[None, :], mask=inside, other=0.0)
        inside = (channel < D)[:, None] & real[None, :]
        turned = tl.load(dual + d[None, :] * D + channel[:, None], mask=inside, other=0.0)
        # factors in two pieces of bfloat16 are exact to 2**-16, the integers to 2**-14
        framed = tl.dot(q.to(tl.float32), turned, framed, input_precision=PRECISION)
        centre = tl.load(Centre + head * D + channel, mask=channel < D, other=0.0)
        near += q.to(tl.float32) * centre[None, :]
    framed *= scale
    by_band = tl.reshape(framed, [ROWS, BANDS, PADDED])
    peak = tl.max(tl.abs(by_band), 2)
    highest = tl.broadcast_to(tl.max(peak, 1)[:, None], [ROWS, BANDS])
    if of_frame == 0:
        tl.store(Near + query, tl.sum(near, 1) * scale, mask=known)
        store_integers(by_band, highest, Parts, Units, query, known, d, real, D)
    else:
        first = stride + query
        store_integers(by_band, peak, Parts, Units, first, known, d, real, D)
        store_integers(by_band, highest, Parts, Units, first + stride, known, d, real, D)
    if PDL:  # the step's tokens, which this did not need, are in their pages when this is done
        tl.extra.cuda.gdc_wait()


@triton.jit
def store_integers(
    by_band, peak, Parts, Units, query, known, d, real, D: tl.constexpr
):  # fmt: skip
    """Queries [ROWS, BANDS, PADDED] as integers, of which `peak` [ROWS, BANDS] becomes the largest,
    and their units."""
    ROWS: tl.constexpr = by_band.shape[0]
    PADDED: tl.constexpr = by_band.shape[2]
    per_unit = tl.where(peak > 0, QUERY_PEAK / peak, 1.0)
    query = query.to(tl.int64)
    at = (query * BANDS)[:, None] + tl.arange(0, BANDS)[None, :]
    tl.store(Units + at, 1.0 / per_unit, mask=known[:, None])
    whole = tl.floor(by_band * per_unit[:, :, None] + 0.5).to(tl.int32)
    whole = tl.reshape(whole, [ROWS, BANDS * PADDED])
    high = (whole + 64) >> 7
    inside = known[:, None] & real[None, :]
    target = Parts + query[:, None] * (2 * D) + d[None, :]
    tl.store(target, high.to(tl.int8), mask=inside)
    tl.store(target + D, (whole - (high << 7)).to(tl.int8), mask=inside)


@triton.jit
def load_item(Partial, Lse, item, end, stride, D: tl.constexpr, DP: tl.constexpr):
    """Item `item` [ROWS] of every row, below `end`: logarithms [ROWS] and sums [ROWS, DP]."""
    d = tl.arange(0, DP)
    known = item < end
    at = item.to(tl.int64) * stride
    logs = tl.load(Lse + at, mask=known, other=-float("inf"))
    inside = known[:, None] & (d < D)[None, :]
    return logs, tl.load(Partial + at[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_dual(dual, first, column, D: tl.constexpr, ROWS: tl.constexpr):
    """Rows [first, first + ROWS) of a frame's matrix [D, D]; zero where there are none."""
    d = first + tl.arange(0, ROWS)
    at = dual + (d * D)[:, None] + column[None, :]
    return tl.load(at, mask=(d < D)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def halves_of(x):
    """[n, 2 m] -> its left and its right half, [n, m] both."""
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, HALF]), (0, 2, 1)))


@triton.jit
def turn_piece(sums, dual, first, column, out, D: tl.constexpr):
    """out + sums @ dual[first : first + n], sums [rows, n]."""
    turned = load_dual(dual, first, column, D, sums.shape[1])
    return tl.dot(sums, turned, out, input_precision="tf32x3")


@triton.jit
def turn_sums(sums, dual, column, out, D: tl.constexpr):
    """out + sums @ dual, in quarters: as an operand a whole row would not fit into registers."""
    QUARTER: tl.constexpr = sums.shape[1] // 4
    left, right = halves_of(sums)
    first, second = halves_of(left)
    third, fourth = halves_of(right)
    out = turn_piece(first, dual, 0, column, out, D)
    out = turn_piece(second, dual, QUARTER, column, out, D)
    out = turn_piece(third, dual, 2 * QUARTER, column, out, D)
    return turn_piece(fourth, dual, 3 * QUARTER, column, out, D)


@triton.jit
def merge_frame(
    partials, lses, item, end, logs, part, dual, column, stride, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, GP: tl.constexpr, COPIES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Items of one frame: every row takes item, item + SPLITS, ... below `end` [ROWS].

    EARLY: logs and part are the first of them, and dual holds the frame's columns; else it is where
    the frame lies.
    Returns the sums out of their frame, COPIES times [n, COLUMNS], and per request and query head
    [REQUESTS, GP] the largest logarithm and the mass, which those sums are in units of.
    """
    ROWS: tl.constexpr = item.shape[0]
    REQUESTS: tl.constexpr = ROWS // (SPLITS * GP)
    top = tl.full([ROWS], NONE, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    for _ in range((tl.max(end - item, 0) + SPLITS - 1) // SPLITS):
        if EARLY:  # the next items are on their way while these are added
            its_logs, its_part = logs, part
            logs, part = load_item(partials, lses, item + SPLITS, end, stride, D, DP)
        else:
            its_logs, its_part = load_item(partials, lses, item, end, stride, D, DP)
        higher = tl.maximum(top, its_logs)
        fade, share = tl.exp2(top - higher), tl.exp2(its_logs - higher)
        sums = sums * fade[:, None] + its_part * share[:, None]
        mass = mass * fade + share
        top = higher
        item += SPLITS

    tops = tl.reshape(top, [REQUESTS, SPLITS, GP])
    highest = tl.max(tops, 1)
    shares = tl.exp2(tops - highest[:, None, :])
    whole = tl.sum(tl.reshape(mass, [REQUESTS, SPLITS, GP]) * shares, 1)
    sums *= tl.reshape(shares, [ROWS])[:, None]
    sums = tl.sum(tl.reshape(sums, [REQUESTS, SPLITS, GP, DP]), 1)
    sums = tl.broadcast_to(sums[None, :, :, :], [COPIES, REQUESTS, GP, DP])
    sums = tl.reshape(sums, [COPIES * REQUESTS * GP, DP])
    out = tl.zeros([COPIES * REQUESTS * GP, column.shape[0]], tl.float32)
    if EARLY:
        out = tl.dot(sums, dual, out, input_precision="tf32x3")
    else:
        out = turn_sums(sums, dual, column, out, D)
    return out, highest, whole


@triton.jit
def rows_of(x, COPIES: tl.constexpr):
    """[REQUESTS, GP] -> a column [COPIES * REQUESTS * GP, 1]."""
    copies = tl.broadcast_to(x[None, :, :], [COPIES, x.shape[0], x.shape[1]])
    return tl.reshape(copies, [COPIES * x.shape[0] * x.shape[1], 1])


@triton.jit(do_not_specialize=["batch"])
def merge_rows(
    Partial, Lse, ItemStart, HotItems, Dual, Centre, Near, Out, OutLse, batch, kv_heads,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, COLUMNS: tl.constexpr,
    REQUESTS: tl.constexpr, SPLITS: tl.constexpr, HOT: tl.constexpr, CALIBRATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS channels of the output of REQUESTS requests and one KV head by every program.

    Partial    float32 [items, kv_heads, G, D], in the value frames; Lse likewise, base 2
    ItemStart  int32 [requests + 1], HotItems int32 [requests]
    Dual       float32 [2, kv_heads, D, D], B of the value frames; Centre float32 [kv_heads, D]
    Near       float32 [requests, kv_heads * G], q . centre of the keys, base 2
    Out        [requests, kv_heads * G, D], zero without items; OutLse float32, natural
    HOT, CALIBRATED  whether items may be of the frame
    """
    head = tl.program_id(0) % kv_heads
    first_request = tl.program_id(0) // kv_heads * REQUESTS
    # what does not depend on the kernel before comes first, as far as there are registers: the plan
    # was ready before the queries' frames
    row = tl.arange(0, REQUESTS * SPLITS * GP)
    request = first_request + row // (GP * SPLITS)
    real = (request < batch) & (row % GP < G)
    first = tl.load(ItemStart + request, mask=real, other=0)
    end = tl.load(ItemStart + request + 1, mask=real, other=0)
    middle = first
    if HOT:
        middle = end
        if CALIBRATED:
            middle = first + tl.load(HotItems + request, mask=real, other=0)
    split = row // GP % SPLITS
    EARLY: tl.constexpr = DP <= 128 and REQUESTS * GP <= 16
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    hot_dual, dual = Dual + head * (D * D), Dual + (kv_heads + head) * (D * D)
    if EARLY and HOT:
        hot_dual = load_dual(hot_dual, 0, column, D, DP)
    if EARLY and CALIBRATED:
        dual = load_dual(dual, 0, column, D, DP)
    centre = tl.load(Centre + head * D + column, mask=column < D, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    stride = kv_heads * G
    lses = Lse + head * G + row % GP
    partials = Partial + ((head * G + row % GP) * D)[:, None]
    # a product takes 16 rows at least
    COPIES: tl.constexpr = 16 // (REQUESTS * GP) if REQUESTS * GP < 16 else 1
    hot_logs, hot_part, logs, part = 0.0, 0.0, 0.0, 0.0
    if EARLY and HOT:
        hot_logs, hot_part = load_item(partials, lses, first + split, middle, stride, D, DP)
    if EARLY and CALIBRATED:
        logs, part = load_item(partials, lses, middle + split, end, stride, D, DP)
    if HOT:
        out, top, mass = merge_frame(
            partials, lses, first + split, middle, hot_logs, hot_part, hot_dual, column, stride,
            D, DP, SPLITS, GP, COPIES, EARLY,
        )  # fmt: skip
    if CALIBRATED:
        its_out, its_top, its_mass = merge_frame(
            partials, lses, middle + split, end, logs, part, dual, column, stride, D, DP, SPLITS,
            GP, COPIES, EARLY,
        )  # fmt: skip
        if HOT:
            higher = tl.maximum(top, its_top)
            fade, its_fade = tl.exp2(top - higher), tl.exp2(its_top - higher)
            its_out = out * rows_of(fade, COPIES) + its_out * rows_of(its_fade, COPIES)
            its_top, its_mass = higher, mass * fade + its_mass * its_fade
        out, top, mass = its_out, its_top, its_mass
    inverse = tl.where(mass == 0, 0.0, 1.0 / mass)  # NaN stays
    m = tl.arange(0, COPIES * REQUESTS * GP)
    of_row = first_request + m // GP
    real = (m < REQUESTS * GP) & (of_row < batch) & (m % GP < G)
    out *= rows_of(inverse, COPIES)
    out = tl.where(rows_of(mass, COPIES) == 0, 0.0, out + centre[None, :])
    query = (of_row * kv_heads + head) * G + m % GP
    target = Out + query.to(tl.int64)[:, None] * D + column[None, :]
    inside = real[:, None] & (column < D)[None, :]
    tl.store(target, out.to(Out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        r = first_request + tl.arange(0, REQUESTS)[:, None]
        g = tl.arange(0, GP)[None, :]
        at_lse = (r * kv_heads + head) * G + g
        mine = (r < batch) & (g < G)
        near = tl.load(Near + at_lse, mask=mine, other=0.0)
        lse = (top + tl.log2(mass) + near) * LN_2
        tl.store(OutLse + at_lse, tl.where(mass > 0, lse, -float("inf")), mask=mine)
