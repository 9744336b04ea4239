# mypy: ignore-errors
"""Triton bodies before and after the pages: the step's tokens into their pages and its queries into
the frames, items into one output."""

from __future__ import annotations

import triton
import triton.language as tl

from ..encode.kernel import encode_rows

BANDS = tl.constexpr(4)  # of a calibrated frame
QUERY_PEAK = tl.constexpr(16000.0)  # largest integer of a query: high part at most 125
NONE = tl.constexpr(-1e30)  # the maximum of no logits
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def signs_of(i, j, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Elements (i, j), below SIZE, of `codec.frames.hadamard` in blocks of BLOCK, at most 256:
    bfloat16."""
    odd = i & j & (BLOCK - 1)
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    bits = (odd & 1) << 15 | 0x3F80  # of 1.0 or -1.0
    if BLOCK < SIZE:
        bits = tl.where(i // BLOCK == j // BLOCK, bits, 0)
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
    BAND_BLOCK: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries into the key frames: ROWS queries of one KV head and a frame by every program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    frame_rows(
        Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale,
        tl.program_id(0), D, DP, G, HOT_BLOCK, BAND_BLOCK, ROWS, PTX,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "batch", "stride", "encoding"])
def encode_and_frame(
    Arena, PageBlocks, Loc, K, V, Places, HotCentre, Signs,
    num_tokens, k_row, k_head, v_row, v_head, centre_side, block_bytes,
    Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale, encoding,
    D: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr, PAGE: tl.constexpr, RADII: tl.constexpr, TILE: tl.constexpr,
    H: tl.constexpr, TOKENS: tl.constexpr,
    DP: tl.constexpr, G: tl.constexpr, HOT_BLOCK: tl.constexpr, BAND_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The step's tokens into their pages by the first `encoding` programs, as
    `encode_tokens_kernel` does it, and its queries into the frames by the others.

    Neither waits for the other, and a launch that starts beside another one starts 1 us late.
    """
    if PDL:  # what comes next may start, and waits for the pages where it reads them
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < encoding:
        encode_rows(
            Arena, PageBlocks, Loc, K, V, Places, HotCentre, Signs,
            num_tokens, k_row, k_head, v_row, v_head, centre_side, block_bytes,
            program // 2 // kv_heads, program // 2 % kv_heads, program % 2,
            D, CODED, BLOCK, STAGES, BITS, PAGE, RADII, TILE, H, TOKENS,
        )  # fmt: skip
    else:
        frame_rows(
            Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale,
            program - encoding, D, DP, G, HOT_BLOCK, BAND_BLOCK, ROWS, PTX,
        )  # fmt: skip


@triton.jit
def frame_rows(
    Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale, program,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, HOT_BLOCK: tl.constexpr,
    BAND_BLOCK: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Queries into a key frame and to integers: ROWS queries of one KV head and a frame.

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
    of_frame = program % 2
    head = program // 2 % kv_heads
    m = program // 2 // kv_heads * ROWS + tl.arange(0, ROWS)
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
    # nothing here waits for anything else here
    picked = (of_frame * kv_heads + head) * D + d
    channel = tl.load(Channel + picked, mask=real, other=0)
    weight = tl.load(Weight + picked, mask=real, other=0.0) * scale
    centre = tl.load(Centre + head * D + place, mask=place < D, other=0.0)
    inside = known[:, None] & (place < D)[None, :]
    q = tl.load(row[:, None] + place[None, :], mask=inside, other=0.0).to(tl.float32)
    if of_frame == 0:
        tl.store(Near + query, tl.sum(q * centre[None, :], 1) * scale, mask=known)
    else:
        q = tl.gather(q, tl.broadcast_to(channel[None, :], [ROWS, DP]), 1)
    i, j = tl.arange(0, RUN)[:, None], tl.arange(0, RUN)[None, :]
    turn = tl.where(of_frame == 0, signs_of(i, j, RUN, INNER), signs_of(i, j, RUN, BAND_BLOCK))
    framed = tl.reshape(q * weight[None, :], [ROWS * BANDS, RUN])
    framed = add_signed(framed, turn, tl.zeros([ROWS * BANDS, RUN], tl.float32), PTX)
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
def rows_and_items(
    ItemStart, HotItems, first_request, batch, first_head, G: tl.constexpr, GP: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Query head and first item of ROWS rows (request, split, query head), and the end of their
    items: all (PART 0), those of the hot frame (1) or of the calibrated one (2)."""
    row = tl.arange(0, ROWS)
    request = first_request + row // (GP * SPLITS)
    query_head = first_head + row % GP
    real = (request < batch) & (query_head < G)
    first = tl.load(ItemStart + request, mask=real, other=0)
    end = tl.load(ItemStart + request + 1, mask=real, other=0)
    if PART != 0:
        middle = first + tl.load(HotItems + request, mask=real, other=0)
        if PART == 1:
            end = middle
        else:
            first = middle
    return query_head, first + row // GP % SPLITS, end


@triton.jit
def spread(x, SPLITS: tl.constexpr):
    """[REQUESTS, GP] -> [REQUESTS * SPLITS * GP], the same for every split."""
    wide = tl.broadcast_to(x[:, None, :], [x.shape[0], SPLITS, x.shape[1]])
    return tl.reshape(wide, [x.shape[0] * SPLITS * x.shape[1]])


@triton.jit
def add_splits(x, REQUESTS: tl.constexpr, GP: tl.constexpr):
    """[REQUESTS * splits * GP, n] -> [REQUESTS * GP, n]."""
    SPLITS: tl.constexpr = x.shape[0] // (REQUESTS * GP)
    n: tl.constexpr = x.shape[1]
    return tl.reshape(tl.sum(tl.reshape(x, [REQUESTS, SPLITS, GP, n]), 1), [REQUESTS * GP, n])


@triton.jit
def load_quarters(Partial, item, end, stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """Item `item` [ROWS] of every row, below `end`: four times WIDTH of its channels."""
    parts = ()
    inside = (item < end)[:, None]
    at = Partial + (item.to(tl.int64) * stride * D)[:, None]
    for i in tl.static_range(BANDS):
        d = i * WIDTH + tl.arange(0, WIDTH)
        parts = parts + (tl.load(at + d[None, :], mask=inside & (d < D)[None, :], other=0.0),)
    return parts


@triton.jit
def load_band(Partial, item, end, stride, column, real, D: tl.constexpr):
    """Item `item` [ROWS] of every row, below `end`: one band of its channels."""
    inside = (item < end)[:, None] & real[None, :]
    at = (item.to(tl.int64) * stride * D)[:, None] + column[None, :]
    return tl.load(Partial + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["batch"])
def merge_rows(
    Partial, Lse, ItemStart, HotItems, Channel, Weight, Centre, Near, Out, OutLse, batch,
    kv_heads,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, HOT_BLOCK: tl.constexpr,
    BAND_BLOCK: tl.constexpr, REQUESTS: tl.constexpr, HOT_ROWS: tl.constexpr,
    ROWS: tl.constexpr, HOT: tl.constexpr, CALIBRATED: tl.constexpr, PTX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The channels of one band of the output of REQUESTS requests and GP query heads of one KV head
    by every program.

    Partial    float32 [items, kv_heads, G, D], in the value frames; Lse likewise, base 2
    ItemStart  int32 [requests + 1], HotItems int32 [requests]
    Channel    int32, Weight float32 [2, kv_heads, D], picks of the value frames, whose rotations
               have blocks of HOT_BLOCK and BAND_BLOCK; Centre float32 [kv_heads, D]
    Near       float32 [requests, kv_heads * G], q . centre of the keys, base 2
    Out        [requests, kv_heads * G, D], zero without items; OutLse float32, natural
    HOT_ROWS, ROWS  rows (request, split, query head) at once: of hot items, and of calibrated ones
               and logarithms
    HOT, CALIBRATED  whether items may be of the frame
    """
    head = tl.program_id(0) % kv_heads
    first_request = tl.program_id(0) // kv_heads * REQUESTS
    band = tl.program_id(1)
    first_head = tl.program_id(2) * GP
    OF_REQUEST: tl.constexpr = REQUESTS * GP
    # what does not depend on the kernel before comes first: the plan was ready long ago
    QUARTER: tl.constexpr = DP // BANDS
    WIDTH: tl.constexpr = D // BANDS
    column = tl.arange(0, QUARTER)
    real = column < WIDTH
    place = head * D + band * WIDTH + column
    # a band of the calibrated frame is of any channels, and these take all of the hot frame
    if CALIBRATED:
        channel = tl.load(Channel + kv_heads * D + place, mask=real, other=0)
        weight = tl.load(Weight + kv_heads * D + place, mask=real, other=0.0)
    else:
        channel = band * WIDTH + column
    hot_weight = tl.load(Weight + head * D + channel, mask=real, other=0.0)
    centre = tl.load(Centre + head * D + channel, mask=real, other=0.0)
    HOT_SPLITS: tl.constexpr = HOT_ROWS // OF_REQUEST
    SPLITS: tl.constexpr = ROWS // OF_REQUEST
    BOTH: tl.constexpr = HOT and CALIBRATED
    log_head, log_item, log_end = rows_and_items(
        ItemStart, HotItems, first_request, batch, first_head, G, GP, SPLITS, ROWS, 0
    )
    hot_head, hot_item, hot_end = rows_and_items(
        ItemStart, HotItems, first_request, batch, first_head, G, GP, HOT_SPLITS, HOT_ROWS,
        1 if BOTH else 0,
    )  # fmt: skip
    its_head, item, end = rows_and_items(
        ItemStart, HotItems, first_request, batch, first_head, G, GP, SPLITS, ROWS, 2 if BOTH else 0
    )
    if PDL:
        tl.extra.cuda.gdc_wait()

    stride = kv_heads * G
    hot_partial = Partial + ((head * G + hot_head) * D)[:, None]
    at = ((head * G + its_head) * D + band * WIDTH)[:, None]
    # the first items are on their way while logarithms are added up
    if HOT:
        next_hot = load_quarters(hot_partial, hot_item, hot_end, stride, D, QUARTER)
    if CALIBRATED:
        next_band = load_band(Partial + at, item, end, stride, column, real, D)

    logs_at = Lse + head * G
    top = tl.full([ROWS], NONE, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for _ in range((tl.max(log_end - log_item, 0) + SPLITS - 1) // SPLITS):
        its = logs_at + log_item.to(tl.int64) * stride + log_head
        logs = tl.load(its, mask=log_item < log_end, other=-float("inf"))
        higher = tl.maximum(top, logs)
        mass = mass * tl.exp2(top - higher) + tl.exp2(logs - higher)
        top = higher
        log_item += SPLITS
    tops = tl.reshape(top, [REQUESTS, SPLITS, GP])
    top = tl.max(tops, 1)
    masses = tl.reshape(mass, [REQUESTS, SPLITS, GP]) * tl.exp2(tops - top[:, None, :])
    mass = tl.sum(masses, 1)  # [REQUESTS, GP]

    out = tl.zeros([OF_REQUEST, QUARTER], tl.float32)
    if HOT:
        hot_top = spread(top, HOT_SPLITS)
        sums = ()
        for i in tl.static_range(BANDS):
            sums = sums + (tl.zeros([HOT_ROWS, QUARTER], tl.float32),)
        for _ in range((tl.max(hot_end - hot_item, 0) + HOT_SPLITS - 1) // HOT_SPLITS):
            its = logs_at + hot_item.to(tl.int64) * stride + hot_head
            logs = tl.load(its, mask=hot_item < hot_end, other=-float("inf"))
            share = tl.exp2(logs - hot_top)[:, None]
            parts = next_hot
            hot_item += HOT_SPLITS
            next_hot = load_quarters(hot_partial, hot_item, hot_end, stride, D, QUARTER)
            new_sums = ()
            for i in tl.static_range(BANDS):
                new_sums = new_sums + (sums[i] + parts[i] * share,)
            sums = new_sums
        turned = tl.zeros([HOT_ROWS, QUARTER], tl.float32)
        for i in tl.static_range(BANDS):
            d = i * QUARTER + tl.arange(0, QUARTER)
            turned = add_signed(
                sums[i], signs_of(d[:, None], channel[None, :], DP, HOT_BLOCK), turned, PTX
            )
        out += add_splits(turned, REQUESTS, GP) * hot_weight[None, :]
    if CALIBRATED:
        its_top = spread(top, SPLITS)
        band_sums = tl.zeros([ROWS, QUARTER], tl.float32)
        for _ in range((tl.max(end - item, 0) + SPLITS - 1) // SPLITS):
            its = logs_at + item.to(tl.int64) * stride + its_head
            logs = tl.load(its, mask=item < end, other=-float("inf"))
            part = next_band
            item += SPLITS
            next_band = load_band(Partial + at, item, end, stride, column, real, D)
            band_sums += part * tl.exp2(logs - its_top)[:, None]
        turn = signs_of(column[:, None], column[None, :], QUARTER, BAND_BLOCK)
        turned = add_signed(band_sums, turn, tl.zeros([ROWS, QUARTER], tl.float32), PTX)
        out += add_splits(turned, REQUESTS, GP) * weight[None, :]

    masses = tl.reshape(mass, [OF_REQUEST])[:, None]
    out = out * tl.where(masses == 0, 0.0, 1.0 / masses)  # NaN stays
    out = tl.where(masses == 0, 0.0, out + centre[None, :])
    m = tl.arange(0, OF_REQUEST)
    request = first_request + m // GP
    known = (request < batch) & (first_head + m % GP < G)
    query = (request * kv_heads + head) * G + first_head + m % GP
    target = Out + query.to(tl.int64)[:, None] * D + channel[None, :]
    tl.store(target, out.to(Out.dtype.element_ty), mask=known[:, None] & real[None, :])
    if band == 0:
        r = first_request + tl.arange(0, REQUESTS)[:, None]
        g = first_head + tl.arange(0, GP)[None, :]
        at_lse = (r * kv_heads + head) * G + g
        mine = (r < batch) & (g < G)
        near = tl.load(Near + at_lse, mask=mine, other=0.0)
        lse = (top + tl.log2(mass) + near) * LN_2
        tl.store(OutLse + at_lse, tl.where(mass > 0, lse, -float("inf")), mask=mine)
