# mypy: ignore-errors
"""Triton bodies before and after the pages: queries into the frames, items into one output."""

from __future__ import annotations

import triton
import triton.language as tl

BANDS = tl.constexpr(4)  # of a calibrated frame
QUERY_PEAK = tl.constexpr(16000.0)  # largest integer of a query: high part at most 125
NONE = tl.constexpr(-1e30)  # the maximum of no logits
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def signs_of(i, j, BLOCK: tl.constexpr):
    """Elements (i, j) of `codec.frames.hadamard` in blocks of BLOCK, at most 256: float32."""
    odd = i & j & (BLOCK - 1)
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return tl.where(i // BLOCK == j // BLOCK, 1.0 - 2.0 * (odd & 1).to(tl.float32), 0.0)


@triton.jit
def add_and_subtract(x):
    """[ROWS, n, 2, m] -> the sum and the difference of its pairs, of x's shape."""
    first, second = tl.split(tl.permute(x, (0, 1, 3, 2)))
    return tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))


@triton.jit
def turn_runs(x, OUTER: tl.constexpr):
    """The rest of a rotation whose blocks are OUTER of x's runs [ROWS, BANDS, RUN] wide."""
    ROWS: tl.constexpr = x.shape[0]
    RUN: tl.constexpr = x.shape[2]
    if OUTER > 1:
        x = tl.reshape(add_and_subtract(tl.reshape(x, [ROWS, 2, 2, RUN])), [ROWS, 4, RUN])
    if OUTER > 2:
        x = tl.reshape(add_and_subtract(tl.reshape(x, [ROWS, 1, 2, 2 * RUN])), [ROWS, 4, RUN])
    return x


@triton.jit(do_not_specialize=["batch", "stride"])  # one binary for all batches
def frame_queries(
    Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, HOT_BLOCK: tl.constexpr,
    BAND_BLOCK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries into a key frame and to integers: ROWS queries of one KV head and a frame by every
    program.

    Q       [batch, kv_heads * G, D], rows q_row apart; logits in base 2 are `scale` times q . k
    Channel int32, Weight float32 [2, kv_heads, D], picks of the key frames, whose rotations have
            blocks of HOT_BLOCK and BAND_BLOCK; Centre float32 [kv_heads, D]
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
    # bands are padded on their own, so that they are a dimension; hot channels lie as they are
    RUN: tl.constexpr = DP // BANDS
    INNER: tl.constexpr = HOT_BLOCK if HOT_BLOCK < RUN else RUN
    place = tl.arange(0, DP)
    in_band = place % RUN
    d = tl.where(of_frame == 0, place, place // RUN * (D // BANDS) + in_band)
    real = tl.where(of_frame == 0, place, in_band) < tl.where(of_frame == 0, D, D // BANDS)
    picked = (of_frame * kv_heads + head) * D + d
    channel = tl.load(Channel + picked, mask=real, other=0)
    weight = tl.load(Weight + picked, mask=real, other=0.0) * scale
    inside = known[:, None] & real[None, :]
    q = tl.load(row[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if of_frame == 0:
        centre = tl.load(Centre + head * D + channel, mask=real, other=0.0) * scale
        tl.store(Near + query, tl.sum(q * centre[None, :], 1), mask=known)
    i, j = tl.arange(0, RUN)[:, None], tl.arange(0, RUN)[None, :]
    turn = tl.where(of_frame == 0, signs_of(i, j, INNER), signs_of(i, j, BAND_BLOCK))
    framed = tl.reshape(q * weight[None, :], [ROWS * BANDS, RUN])
    # factors in two pieces of bfloat16 are exact to 2**-16, the integers to 2**-14
    framed = tl.dot(framed, turn, input_precision=PRECISION)
    by_band = tl.reshape(framed, [ROWS, BANDS, RUN])
    if of_frame == 0:
        by_band = turn_runs(by_band, HOT_BLOCK // INNER)
    peak = tl.max(tl.abs(by_band), 2)
    highest = tl.broadcast_to(tl.max(peak, 1)[:, None], [ROWS, BANDS])
    if of_frame == 0:
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
def load_item(Partial, Lse, item, end, stride, d, real, D: tl.constexpr):
    """Item `item` [ROWS] of every row, below `end`: logarithms [ROWS], sums of channels d."""
    known = item < end
    at = item.to(tl.int64) * stride
    logs = tl.load(Lse + at, mask=known, other=-float("inf"))
    inside = known[:, None] & real[None, :]
    return logs, tl.load(Partial + at[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def halves_of(x):
    """[n, 2 m] -> its left and its right half, [n, m] both."""
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, HALF]), (0, 2, 1)))


@triton.jit
def turn_piece(sums, first, channel, out, BLOCK: tl.constexpr):
    """out + channels first, first + 1, ... of a sum, turned into `channel`."""
    i = first + tl.arange(0, sums.shape[1])
    turn = signs_of(i[:, None], channel[None, :], BLOCK)
    return tl.dot(sums, turn, out, input_precision="tf32x3")


@triton.jit
def turn_in_quarters(sums, channel, out, BLOCK: tl.constexpr):
    """out + sums turned: as an operand a whole row of a wide head would not fit into registers."""
    QUARTER: tl.constexpr = sums.shape[1] // 4
    left, right = halves_of(sums)
    first, second = halves_of(left)
    third, fourth = halves_of(right)
    out = turn_piece(first, 0, channel, out, BLOCK)
    out = turn_piece(second, QUARTER, channel, out, BLOCK)
    out = turn_piece(third, 2 * QUARTER, channel, out, BLOCK)
    return turn_piece(fourth, 3 * QUARTER, channel, out, BLOCK)


@triton.jit
def sum_items(
    partials, shares, lses, item, end, logs, part, d, real, stride, D: tl.constexpr,
    SPLITS: tl.constexpr, GP: tl.constexpr, COPIES: tl.constexpr, EARLY: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """Items of one frame: every row takes item, item + SPLITS, ... below `end` [ROWS].

    logs, part  where EARLY, the first of them
    d, real     channels, and whether there are such
    Returns the sums [COPIES * REQUESTS * GP, channels], in their frame, and per request and query
    head [REQUESTS, GP] the largest logarithm and the mass, which those sums are in units of.
    """
    ROWS: tl.constexpr = item.shape[0]
    REQUESTS: tl.constexpr = ROWS // (SPLITS * GP)
    WIDTH: tl.constexpr = d.shape[0]
    top = tl.full([ROWS], NONE, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for _ in range((tl.max(end - item, 0) + SPLITS - 1) // SPLITS):
        if EARLY:  # the next items are on their way while these are added
            its_logs, its_part = logs, part
            logs, part = load_parts(
                partials, shares, lses, item + SPLITS, end, stride, d, real, D, SHARES
            )
        else:
            its_logs, its_part = load_parts(
                partials, shares, lses, item, end, stride, d, real, D, SHARES
            )
        higher = tl.maximum(top, its_logs)
        fade, share = tl.exp2(top - higher), tl.exp2(its_logs - higher)
        sums = sums * fade[:, None] + its_part * share[:, None]
        mass = mass * fade + share
        top = higher
        item += SPLITS

    tops = tl.reshape(top, [REQUESTS, SPLITS, GP])
    highest = tl.max(tops, 1)
    shares_of = tl.exp2(tops - highest[:, None, :])
    whole = tl.sum(tl.reshape(mass, [REQUESTS, SPLITS, GP]) * shares_of, 1)
    sums *= tl.reshape(shares_of, [ROWS])[:, None]
    sums = tl.sum(tl.reshape(sums, [REQUESTS, SPLITS, GP, WIDTH]), 1)
    sums = tl.broadcast_to(sums[None, :, :, :], [COPIES, REQUESTS, GP, WIDTH])
    return tl.reshape(sums, [COPIES * REQUESTS * GP, WIDTH]), highest, whole


@triton.jit
def load_parts(
    partials, shares, lses, item, end, stride, d, real, D: tl.constexpr, SHARES: tl.constexpr
):  # fmt: skip
    """`load_item`, with the share of the centroids where there are any."""
    logs, part = load_item(partials, lses, item, end, stride, d, real, D)
    if SHARES:
        _, share = load_item(shares, lses, item, end, stride, d, real, D)
        part += share
    return logs, part


@triton.jit
def rows_of(x, COPIES: tl.constexpr):
    """[REQUESTS, GP] -> a column [COPIES * REQUESTS * GP, 1]."""
    copies = tl.broadcast_to(x[None, :, :], [COPIES, x.shape[0], x.shape[1]])
    return tl.reshape(copies, [COPIES * x.shape[0] * x.shape[1], 1])


@triton.jit
def rows_and_items(
    ItemStart, HotItems, first_request, batch, G: tl.constexpr, GP: tl.constexpr,
    REQUESTS: tl.constexpr, SPLITS: tl.constexpr, HOT: tl.constexpr, CALIBRATED: tl.constexpr,
    OF_HOT: tl.constexpr,
):  # fmt: skip
    """Query head and first item of every row (request, split, query head), and the end of the
    items of its frame."""
    row = tl.arange(0, REQUESTS * SPLITS * GP)
    request = first_request + row // (GP * SPLITS)
    real = (request < batch) & (row % GP < G)
    first = tl.load(ItemStart + request, mask=real, other=0)
    end = tl.load(ItemStart + request + 1, mask=real, other=0)
    if HOT and CALIBRATED:
        middle = first + tl.load(HotItems + request, mask=real, other=0)
        if OF_HOT:
            end = middle
        else:
            first = middle
    return row % GP, first + row // GP % SPLITS, end


@triton.jit(do_not_specialize=["batch"])
def merge_rows(
    Partial, Shares, Lse, ItemStart, HotItems, Channel, Weight, Centre, Near, Out, OutLse, batch,
    kv_heads,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, HOT_BLOCK: tl.constexpr,
    BAND_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, REQUESTS: tl.constexpr,
    HOT_SPLITS: tl.constexpr, SPLITS: tl.constexpr, HOT: tl.constexpr, CALIBRATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The channels of one band of the output of REQUESTS requests and one KV head by every
    program.

    Partial    float32 [items, kv_heads, G, D], in the value frames; Lse likewise, base 2
    Shares     float32 like Partial, to be added to items of the calibrated frame
    ItemStart  int32 [requests + 1], HotItems int32 [requests]
    Channel    int32, Weight float32 [2, kv_heads, D], picks of the value frames, whose rotations
               have blocks of HOT_BLOCK and BAND_BLOCK; Centre float32 [kv_heads, D]
    Near       float32 [requests, kv_heads * G], q . centre of the keys, base 2
    Out        [requests, kv_heads * G, D], zero without items; OutLse float32, natural
    HOT, CALIBRATED  whether items may be of the frame
    """
    head = tl.program_id(0) % kv_heads
    first_request = tl.program_id(0) // kv_heads * REQUESTS
    band = tl.program_id(1)
    # what does not depend on the kernel before comes first: the plan was ready long ago
    WIDTH: tl.constexpr = D // BANDS
    column = tl.arange(0, COLUMNS)
    real = column < WIDTH
    place = head * D + band * WIDTH + column
    # a band of the calibrated frame is of any channels, and these take all of the hot frame
    if CALIBRATED:
        channel = tl.load(Channel + kv_heads * D + place, mask=real, other=0)
        weight = tl.load(Weight + kv_heads * D + place, mask=real, other=0.0)
        turn = signs_of(column[:, None], column[None, :], BAND_BLOCK)
    else:
        channel = band * WIDTH + column
    centre = tl.load(Centre + head * D + channel, mask=real, other=0.0)
    EARLY: tl.constexpr = DP <= 128 and REQUESTS * GP <= 16
    d = tl.arange(0, DP)
    if HOT:
        hot_weight = tl.load(Weight + head * D + channel, mask=real, other=0.0)
        if DP <= 128:
            hot_turn = signs_of(d[:, None], channel[None, :], HOT_BLOCK)
        hot_head, hot_item, hot_end = rows_and_items(
            ItemStart, HotItems, first_request, batch, G, GP, REQUESTS, HOT_SPLITS, HOT,
            CALIBRATED, True,
        )  # fmt: skip
        hot_lses = Lse + head * G + hot_head
        hot_partials = Partial + ((head * G + hot_head) * D)[:, None]
    if CALIBRATED:
        its_head, item, end = rows_and_items(
            ItemStart, HotItems, first_request, batch, G, GP, REQUESTS, SPLITS, HOT, CALIBRATED,
            False,
        )  # fmt: skip
        lses = Lse + head * G + its_head
        at = ((head * G + its_head) * D + band * WIDTH)[:, None]
        partials, shares = Partial + at, Shares + at
    if PDL:
        tl.extra.cuda.gdc_wait()

    stride = kv_heads * G
    # a product takes 16 rows at least
    COPIES: tl.constexpr = 16 // (REQUESTS * GP) if REQUESTS * GP < 16 else 1
    hot_logs, hot_part, logs, part = 0.0, 0.0, 0.0, 0.0
    if EARLY and HOT:
        hot_logs, hot_part = load_item(
            hot_partials, hot_lses, hot_item, hot_end, stride, d, d < D, D
        )
    if EARLY and CALIBRATED:
        logs, part = load_parts(partials, shares, lses, item, end, stride, column, real, D, True)
    if HOT:
        sums, top, mass = sum_items(
            hot_partials, hot_partials, hot_lses, hot_item, hot_end, hot_logs, hot_part, d, d < D,
            stride, D, HOT_SPLITS, GP, COPIES, EARLY, False,
        )  # fmt: skip
        out = tl.zeros([COPIES * REQUESTS * GP, COLUMNS], tl.float32)
        if DP <= 128:
            out = tl.dot(sums, hot_turn, out, input_precision="tf32x3")
        else:
            out = turn_in_quarters(sums, channel, out, HOT_BLOCK)
        out *= hot_weight[None, :]
    if CALIBRATED:
        its_sums, its_top, its_mass = sum_items(
            partials, shares, lses, item, end, logs, part, column, real, stride, D, SPLITS, GP,
            COPIES, EARLY, True,
        )  # fmt: skip
        its_out = tl.dot(its_sums, turn, input_precision="tf32x3") * weight[None, :]
        if HOT:
            higher = tl.maximum(top, its_top)
            fade, its_fade = tl.exp2(top - higher), tl.exp2(its_top - higher)
            its_out = out * rows_of(fade, COPIES) + its_out * rows_of(its_fade, COPIES)
            its_top, its_mass = higher, mass * fade + its_mass * its_fade
        out, top, mass = its_out, its_top, its_mass
    inverse = tl.where(mass == 0, 0.0, 1.0 / mass)  # NaN stays
    m = tl.arange(0, COPIES * REQUESTS * GP)
    of_row = first_request + m // GP
    known = (m < REQUESTS * GP) & (of_row < batch) & (m % GP < G)
    out *= rows_of(inverse, COPIES)
    out = tl.where(rows_of(mass, COPIES) == 0, 0.0, out + centre[None, :])
    query = (of_row * kv_heads + head) * G + m % GP
    target = Out + query.to(tl.int64)[:, None] * D + channel[None, :]
    inside = known[:, None] & real[None, :]
    tl.store(target, out.to(Out.dtype.element_ty), mask=inside)
    if band == 0:
        r = first_request + tl.arange(0, REQUESTS)[:, None]
        g = tl.arange(0, GP)[None, :]
        at_lse = (r * kv_heads + head) * G + g
        mine = (r < batch) & (g < G)
        near = tl.load(Near + at_lse, mask=mine, other=0.0)
        lse = (top + tl.log2(mass) + near) * LN_2
        tl.store(OutLse + at_lse, tl.where(mass > 0, lse, -float("inf")), mask=mine)
