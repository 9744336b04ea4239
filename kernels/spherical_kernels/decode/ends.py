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


@triton.jit
def frame_queries(
    Q, Dual, Centre, Parts, Sums, Units, Near, batch, kv_heads, stride, scale,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries into a key frame and to integers: ROWS queries of one KV head by every program.

    Q       [batch, kv_heads * G, D]; logits in base 2 are `scale` times q . k
    Dual    float32 [2, kv_heads, D, D], B; Centre float32 [kv_heads, D]
    Near    float32 [batch, kv_heads * G], q . centre, base 2
    The rest by set, which are `stride` queries apart: in the hot frame, in the calibrated one by
    bands, in the calibrated one as a whole; [3, batch, kv_heads * G, ...]:
    Parts   int8 [..., 2, D], integers, their high then their low part: 128 * high + low
    Sums    int32 [..., BANDS], sums of a band's integers; Units float32 [..., BANDS], what an
            integer of the band stands for, base 2
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) % kv_heads
    of_set = tl.program_id(1)
    m = tl.program_id(0) // kv_heads * ROWS + tl.arange(0, ROWS)
    known = m < batch * G
    query = (m // G * kv_heads + head) * G + m % G
    d = tl.arange(0, DP)
    step = tl.arange(0, STEP)
    dual = Dual + (tl.minimum(of_set, 1) * kv_heads + head).to(tl.int64) * (D * D)
    framed = tl.zeros([ROWS, DP], tl.float32)
    near = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, STEP):
        channel = start + step
        inside = known[:, None] & (channel < D)[None, :]
        q = tl.load(Q + query[:, None] * D + channel[None, :], mask=inside, other=0.0)
        q = q.to(tl.float32) * scale
        inside = (channel < D)[:, None] & (d < D)[None, :]
        turned = tl.load(dual + d[None, :] * D + channel[:, None], mask=inside, other=0.0)
        framed = tl.dot(q, turned, framed, input_precision="tf32x3")
        centre = tl.load(Centre + head * D + channel, mask=channel < D, other=0.0)
        near += tl.sum(q * centre[None, :], 1)
    inside = known[:, None] & (d < D)[None, :]
    width = tl.where(of_set == 1, D // BANDS, D)
    place = (of_set * stride + query).to(tl.int64)
    per_step = tl.full([ROWS, DP], 0.0, tl.float32)
    for b in tl.static_range(BANDS):
        mine = (d // width == b)[None, :]
        peak = tl.max(tl.where(mine, tl.abs(framed), 0.0), 1)
        of_band = tl.where(peak > 0, QUERY_PEAK / peak, 1.0)
        per_step = tl.where(mine, of_band[:, None], per_step)
        tl.store(Units + place * BANDS + b, 1.0 / of_band, mask=known)
    whole = tl.floor(framed * per_step + 0.5).to(tl.int32)
    high = (whole + 64) >> 7
    target = Parts + place[:, None] * (2 * D) + d[None, :]
    tl.store(target, high.to(tl.int8), mask=inside)
    tl.store(target + D, (whole - (high << 7)).to(tl.int8), mask=inside)
    for b in tl.static_range(BANDS):
        total = tl.sum(tl.where((d // width == b)[None, :], whole, 0), 1)
        tl.store(Sums + place * BANDS + b, total, mask=known)
    if of_set == 0:
        tl.store(Near + query, near, mask=known)


@triton.jit
def weigh_items(Lse, first, end, stride, SPLITS: tl.constexpr, GP: tl.constexpr):
    """log2 of what items weigh together, in every row, split and query head (rows of both).

    first, end  [ROWS] of the split: it takes items first, first + SPLITS, ... below `end`
    Returns it over all splits, [ROWS / (SPLITS GP), GP]; -inf for no items.
    """
    top = tl.full([first.shape[0]], NONE, tl.float32)
    mass = tl.zeros([first.shape[0]], tl.float32)
    for i in range(0, tl.max(end - first, 0), SPLITS):
        known = first + i < end
        logs = tl.load(Lse + (first + i).to(tl.int64) * stride, mask=known, other=-float("inf"))
        higher = tl.maximum(top, logs)
        mass = mass * tl.exp2(top - higher) + tl.exp2(logs - higher)
        top = higher
    REQUESTS: tl.constexpr = first.shape[0] // (SPLITS * GP)
    tops = tl.reshape(top, [REQUESTS, SPLITS, GP])
    highest = tl.max(tops, 1)
    masses = tl.reshape(mass, [REQUESTS, SPLITS, GP]) * tl.exp2(tops - highest[:, None, :])
    return highest + tl.log2(tl.sum(masses, 1))


@triton.jit
def add_items(
    Partial, Lse, first, end, stride, total, D: tl.constexpr, DP: tl.constexpr,
    SPLITS: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """Items weighed against `total` [ROWS], added over all splits: [ROWS / SPLITS, DP]."""
    d = tl.arange(0, DP)
    REQUESTS: tl.constexpr = first.shape[0] // (SPLITS * GP)
    sums = tl.zeros([first.shape[0], DP], tl.float32)
    for i in range(0, tl.max(end - first, 0), SPLITS):
        known = first + i < end
        at = (first + i).to(tl.int64) * stride
        share = tl.exp2(tl.load(Lse + at, mask=known, other=-float("inf")) - total)
        inside = known[:, None] & (d < D)[None, :]
        part = tl.load(Partial + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        sums += part * share[:, None]
    sums = tl.sum(tl.reshape(sums, [REQUESTS, SPLITS, GP, DP]), 1)
    return tl.reshape(sums, [REQUESTS * GP, DP])


@triton.jit
def merge_rows(
    Partial, Lse, ItemStart, HotItems, Merged, Dual, Centre, Near, Out, OutLse, batch, kv_heads,
    stride,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, COLUMNS: tl.constexpr,
    REQUESTS: tl.constexpr, SPLITS: tl.constexpr, HOT: tl.constexpr, CALIBRATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS channels of the output of REQUESTS requests and one KV head by every program.

    Partial    float32 [items, kv_heads, G, D], in the value frames; Lse likewise, base 2
    ItemStart  int32 [requests + 1], HotItems int32 [requests]
    Merged     float32 [2, requests, kv_heads * G, D], frames `stride` numbers apart: sums on their
               way to being an operand; programs of the same rows write the same
    Dual       float32 [2, kv_heads, D, D], B of the value frames; Centre float32 [kv_heads, D]
    Near       float32 [requests, kv_heads * G], q . centre of the keys, base 2
    Out        [requests, kv_heads * G, D], zero without items; OutLse float32, natural
    HOT, CALIBRATED  whether items may be of the frame
    """
    head = tl.program_id(0) % kv_heads
    first_request = tl.program_id(0) // kv_heads * REQUESTS
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, REQUESTS * SPLITS * GP)
    request = first_request + row // (GP * SPLITS)
    real = (request < batch) & (row % GP < G)
    split = row // GP % SPLITS
    first = tl.load(ItemStart + request, mask=real, other=0)
    end = tl.load(ItemStart + request + 1, mask=real, other=0)
    middle = first
    if HOT:
        middle += tl.load(HotItems + request, mask=real, other=0)
    lses = Lse + head * G + row % GP
    partials = Partial + ((head * G + row % GP) * D)[:, None]
    weight = weigh_items(lses, first + split, end, kv_heads * G, SPLITS, GP)
    total = tl.where(weight > NONE, weight, 0.0)
    all_splits = tl.broadcast_to(total[:, None, :], [REQUESTS, SPLITS, GP])
    all_splits = tl.reshape(all_splits, [REQUESTS * SPLITS * GP])

    m = tl.arange(0, REQUESTS * GP)
    of_row = first_request + m // GP
    real = (of_row < batch) & (m % GP < G)
    query = (of_row * kv_heads + head) * G + m % GP
    d = tl.arange(0, DP)
    target = Merged + query.to(tl.int64)[:, None] * D + d[None, :]
    inside = real[:, None] & (d < D)[None, :]
    if HOT:
        sums = add_items(
            partials, lses, first + split, middle, kv_heads * G, all_splits, D, DP, SPLITS, GP
        )
        tl.store(target, sums, mask=inside)
    if CALIBRATED:
        sums = add_items(
            partials, lses, middle + split, end, kv_heads * G, all_splits, D, DP, SPLITS, GP
        )
        tl.store(target + stride, sums, mask=inside)
    tl.debug_barrier()

    # a product takes 16 rows at least
    ROWS: tl.constexpr = 16 if REQUESTS * GP < 16 else REQUESTS * GP
    m = tl.arange(0, ROWS)
    of_row = first_request + m // GP
    real = (m < REQUESTS * GP) & (of_row < batch) & (m % GP < G)
    query = (of_row * kv_heads + head) * G + m % GP
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, STEP)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for frame in tl.static_range(2):
        if HOT if frame == 0 else CALIBRATED:
            source = Merged + frame * stride + query.to(tl.int64)[:, None] * D
            dual = Dual + (frame * kv_heads + head).to(tl.int64) * (D * D)
            for start in range(0, D, STEP):
                channel = start + step
                wanted = real[:, None] & (channel < D)[None, :]
                rows = tl.load(source + channel[None, :], mask=wanted, other=0.0)
                at = dual + channel[:, None] * D + column[None, :]
                wanted_too = (channel < D)[:, None] & (column < D)[None, :]
                turned = tl.load(at, mask=wanted_too, other=0.0)
                out = tl.dot(rows, turned, out, input_precision="tf32x3")
    first = tl.load(ItemStart + of_row, mask=real, other=0)
    some = tl.load(ItemStart + of_row + 1, mask=real, other=0) > first
    centre = tl.load(Centre + head * D + column, mask=column < D, other=0.0)
    out = tl.where(some[:, None], out + centre[None, :], 0.0)
    target = Out + query.to(tl.int64)[:, None] * D + column[None, :]
    inside = real[:, None] & (column < D)[None, :]
    tl.store(target, out.to(Out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        r = first_request + tl.arange(0, REQUESTS)[:, None]
        g = tl.arange(0, GP)[None, :]
        at_lse = (r * kv_heads + head) * G + g
        mine = (r < batch) & (g < G)
        lse = (weight + tl.load(Near + at_lse, mask=mine, other=0.0)) * LN_2
        tl.store(OutLse + at_lse, tl.where(weight > NONE, lse, -float("inf")), mask=mine)
