# mypy: ignore-errors
"""Triton bodies before and after the pages: queries into the frames, items into one output."""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(-1e30)  # the maximum of no logits
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def frame_queries(
    Q, Dual, Centre, Framed, Near, batch, kv_heads, stride, scale,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Queries into a key frame: COLUMNS channels of ROWS queries of one KV head by every program.

    Q       [batch, kv_heads * G, D]; logits in base 2 are `scale` times q . k
    Dual    float32 [2, kv_heads, D, D], B; Centre float32 [kv_heads, D]
    Framed  float32 [2, batch, kv_heads * G, D], frames `stride` apart: B q; and Near float32
            [batch, kv_heads * G], q . centre, both in base 2
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
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
    target = Framed + frame.to(tl.int64) * stride + query[:, None] * D + column[None, :]
    tl.store(target, framed, mask=known[:, None] & (column < D)[None, :])
    if (frame == 0) & (tl.program_id(1) == 0):
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
