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
    inside = known[:, None] & (d < D)[None, :]
    q = tl.load(Q + query[:, None] * D + d[None, :], mask=inside, other=0.0)
    q = q.to(tl.float32) * scale
    dual = Dual + (tl.minimum(of_set, 1) * kv_heads + head).to(tl.int64) * (D * D)
    at = dual + d[None, :] * D + d[:, None]
    turned = tl.load(at, mask=(d < D)[:, None] & (d < D)[None, :], other=0.0)
    framed = tl.dot(q, turned, input_precision="tf32x3")
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
        centre = tl.load(Centre + head * D + d, mask=d < D, other=0.0)
        tl.store(Near + query, tl.sum(q * centre[None, :], 1), mask=known)


@triton.jit
def weigh_items(Lse, first, end, stride, g, BLOCK: tl.constexpr, G: tl.constexpr):
    """log2 of what the items [first, end) of a row weigh together: float32 like g; 0 for none."""
    n = tl.arange(0, BLOCK)
    top = tl.full([g.shape[0]], NONE, tl.float32)
    mass = tl.zeros([g.shape[0]], tl.float32)
    for i in range(first, end, BLOCK):
        inside = (i + n < end)[:, None] & (g < G)[None, :]
        logs = tl.load(
            Lse + (i + n)[:, None] * stride + g[None, :], mask=inside, other=-float("inf")
        )
        higher = tl.maximum(top, tl.max(logs, 0))
        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(logs - higher[None, :]), 0)
        top = higher
    return tl.where(mass > 0, top + tl.log2(mass), 0.0), mass > 0


@triton.jit
def merge_rows(
    Partial, Lse, ItemStart, HotItems, Dual, Centre, Near, Out, OutLse, kv_heads,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, COLUMNS: tl.constexpr,
    ITEMS: tl.constexpr, HOT: tl.constexpr, CALIBRATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COLUMNS channels of the output of one request and KV head by every program.

    Partial    float32 [items, kv_heads, G, D], in the value frames; Lse likewise, base 2
    ItemStart  int32 [requests + 1], HotItems int32 [requests]
    Dual       float32 [2, kv_heads, D, D], B of the value frames; Centre float32 [kv_heads, D]
    Near       float32 [requests, kv_heads * G], q . centre of the keys, base 2
    Out        [requests, kv_heads * G, D], zero without items; OutLse float32, natural
    HOT, CALIBRATED  whether items may be of the frame; ITEMS are read at once
    """
    head = tl.program_id(0) % kv_heads
    request = tl.program_id(0) // kv_heads
    if PDL:
        tl.extra.cuda.gdc_wait()
    first = tl.load(ItemStart + request)
    end = tl.load(ItemStart + request + 1)
    middle = first
    if HOT:
        middle += tl.load(HotItems + request)
    g = tl.arange(0, GP)
    n = tl.arange(0, ITEMS)
    x = tl.arange(0, GP * DP)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    stride = kv_heads * G
    lses = Lse + head * G
    total, some = weigh_items(lses, first, end, stride, g, 4 * ITEMS, G)
    centre = tl.load(Centre + head * D + column, mask=column < D, other=0.0)
    # a product takes 16 rows at least: heads are repeated
    ROWS: tl.constexpr = 16 if GP < 16 else GP
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for frame in tl.static_range(2):
        if HOT if frame == 0 else CALIBRATED:
            sums = tl.zeros([GP * DP], tl.float32)
            inside = (x % DP < D) & (x // DP < G)
            source = Partial + head * (G * D) + x // DP * D + x % DP
            for i in range(first if frame == 0 else middle, middle if frame == 0 else end, ITEMS):
                known = i + n < (middle if frame == 0 else end)
                item = (i + n).to(tl.int64)
                logs = tl.load(
                    lses + item[:, None] * stride + g[None, :],
                    mask=known[:, None] & (g < G)[None, :], other=-float("inf"),
                )  # fmt: skip
                share = tl.broadcast_to(tl.exp2(logs - total[None, :])[:, :, None], [ITEMS, GP, DP])
                part = tl.load(
                    source[None, :] + item[:, None] * (stride * D),
                    mask=known[:, None] & inside[None, :], other=0.0,
                )  # fmt: skip
                sums += tl.sum(part * tl.reshape(share, [ITEMS, GP * DP]), 0)
            rows = tl.broadcast_to(tl.reshape(sums, [1, GP, DP]), [ROWS // GP, GP, DP])
            d = tl.arange(0, DP)
            dual = Dual + (frame * kv_heads + head).to(tl.int64) * (D * D)
            inside = (d < D)[:, None] & (column < D)[None, :]
            dual = tl.load(dual + d[:, None] * D + column[None, :], mask=inside, other=0.0)
            out = tl.dot(tl.reshape(rows, [ROWS, DP]), dual, out, input_precision="tf32x3")
    row = tl.arange(0, ROWS)
    has = tl.reshape(tl.broadcast_to(some[None, :], [ROWS // GP, GP]), [ROWS])
    out = tl.where(has[:, None], out + centre[None, :], 0.0)
    query = tl.program_id(0) * G
    inside = (row < G)[:, None] & (column < D)[None, :]
    target = Out + (query + row)[:, None].to(tl.int64) * D + column[None, :]
    tl.store(target, out.to(Out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        lse = (total + tl.load(Near + query + g, mask=g < G, other=0.0)) * LN_2
        tl.store(OutLse + query + g, tl.where(some, lse, -float("inf")), mask=g < G)
