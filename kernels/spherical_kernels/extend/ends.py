# mypy: ignore-errors
"""Triton bodies around the pages: queries into the frames, new tokens among themselves, and both
parts into one output. Columns stand in the order of columns.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import channel_of, columns_of_kind

NONE = tl.constexpr(-1e30)  # the maximum of no logits


@triton.constexpr_function
def precision_of(dtype):
    """Of products with frames. What tf32 takes is small beside the rounding of an output to
    bfloat16."""
    return "tf32" if dtype == tl.bfloat16 else "tf32x3"


@triton.constexpr_function
def root_of(d):
    """What makes whole numbers of the elements of a hot frame, which have no bits to be rounded
    alike then."""
    return (d & -d) ** 0.5


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """Finite float32 x as an operand: to the nearest tf32, where tensor cores would cut the rest
    off and make every product smaller."""
    if PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


# what changes from batch to batch must not make a new binary
@triton.jit(do_not_specialize=["tokens", "present"])
def frame_rows(
    Q, Dual, Centre, Framed, Scales, Near, tokens, q_token, kv_heads, scale, present,
    D: tl.constexpr, DC: tl.constexpr, STEPS: tl.constexpr, PLANES: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries of one KV head into the frame and the steps of a kind: ROWS rows by every program,
    BLOCK of their channels at once.

    Q       [tokens, kv_heads * G, D], tokens q_token apart; logits in base 2 are `scale` times
            q . k
    Dual    float32 [planes, kv_heads, D, D], B; Centre float32 [kv_heads, D]
    Framed  float16 [present, kv_heads, tokens * G, DC] at most 2**8, times 1 / Scales float32
            [present, kv_heads, tokens * G]; Near float32 [kv_heads, tokens * G], q . centre; all in
            base 2
    present the kinds that are framed, four bits each, the first in the lowest
    STEPS, PLANES  steps and frame of every kind
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head, which = tl.program_id(1), tl.program_id(2)
    kind = present >> (4 * which) & 15
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = r < tokens * G
    column = tl.arange(0, DC)
    channel, step = columns_of_kind(column, D, STEPS, 0)
    plane = PLANES[0]
    for i in tl.static_range(1, len(STEPS)):
        its_channel, its_step = columns_of_kind(column, D, STEPS, i)
        channel = tl.where(kind == i, its_channel, channel)
        step = tl.where(kind == i, its_step, step)
        plane = tl.where(kind == i, PLANES[i], plane)
    q_row = Q + (r // G).to(tl.int64) * q_token + (head * G + r % G) * D
    dual = Dual + (plane * kv_heads + head).to(tl.int64) * (D * D)
    PRECISION: tl.constexpr = precision_of(Q.dtype.element_ty)
    framed = tl.zeros([ROWS, DC], tl.float32)
    near = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, DC, BLOCK, num_stages=1):
        d = start + tl.arange(0, BLOCK)
        inside = known[:, None] & (d < D)[None, :]
        q = tl.load(q_row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        inside = (d < D)[:, None] & (channel < D)[None, :]
        turned = tl.load(dual + channel[None, :] * D + d[:, None], mask=inside, other=0.0)
        turned = operand(turned * root_of(D), PRECISION)
        framed = tl.dot(q, turned, framed, input_precision=PRECISION)
        centre = tl.load(Centre + head * D + d, mask=d < D, other=0.0)
        near += tl.sum(q * centre[None, :], 1)
    near *= scale
    framed *= (step * (scale / root_of(D)))[None, :]
    peak = tl.max(tl.abs(framed), 1)
    unit = tl.where(peak > 0, peak * 2.0**-8, 1.0)
    place = (which * kv_heads + head).to(tl.int64) * (tokens * G) + r
    framed = (framed / unit[:, None]).to(tl.float16)
    tl.store(Framed + place[:, None] * DC + column[None, :], framed, mask=known[:, None])
    tl.store(Scales + place, unit, mask=known)
    if which == 0:
        tl.store(Near + head.to(tl.int64) * (tokens * G) + r, near, mask=known)
    if PDL:  # the new tokens' attention, which this did not need, is done when this is
        tl.extra.cuda.gdc_wait()


@triton.jit
def joined_splits(Partial, Lse, place, column, splits, stride, total, DC: tl.constexpr):
    """Columns of the splits' sums, weighted by their share of `total` (base 2): [ROWS, columns]."""
    sums = tl.zeros([place.shape[0], column.shape[0]], tl.float32)
    for split in range(splits):
        at = place + split * stride
        logs = tl.load(Lse + at)
        known = (logs > -float("inf"))[:, None]
        part = tl.load(Partial + at[:, None] * DC + column[None, :], mask=known, other=0.0)
        sums += part * tl.exp2(logs - total)[:, None]
    return sums


@triton.jit(do_not_specialize=["rows", "items"])
def finish_rows(
    Partial, Logs, Tiles, Requests, Dual, Centre, Near, Out, Lse, rows, items, kv_heads,
    D: tl.constexpr, DC: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
    PLANES: tl.constexpr, BANDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a tile of one KV head: splits, frames, then new tokens become one attention.

    PLANES   frames of the sums; BANDS their bands
    Partial  float32 [planes, items, kv_heads, M, DC]; Logs [planes, items, kv_heads, M], base 2
    Tiles    int32 [tiles, 4]: request, first row, first item, splits
    Dual     float32 [frames, kv_heads, D, D], B of the value frames; Centre float32 [kv_heads, D]
    Out      [tokens, kv_heads * G, D], Lse float32 [tokens, kv_heads * G], base 2: of the new
             tokens among themselves before, of everything after
    """
    tile, head = tl.program_id(0) // (M // ROWS), tl.program_id(1)
    m = tl.program_id(0) % (M // ROWS) * ROWS + tl.arange(0, ROWS)
    request = tl.load(Tiles + tile * 4)
    r = tl.load(Tiles + tile * 4 + 1) + m
    first_item = tl.load(Tiles + tile * 4 + 2)
    splits = tl.load(Tiles + tile * 4 + 3)
    known = r < tl.load(Requests + request * 4 + 1) * G
    r += tl.load(Requests + request * 4) * G
    column = tl.arange(0, DC)
    stride = kv_heads * M
    plane = tl.cast(items, tl.int64) * stride
    place = (first_item * kv_heads + head).to(tl.int64) * M + m
    centre = tl.load(Centre + head * D + column, mask=column < D, other=0.0)
    PRECISION: tl.constexpr = precision_of(Out.dtype.element_ty)
    top = tl.full([ROWS], NONE, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in range(len(PLANES) * splits):
        logs = tl.load(Logs + i // splits * plane + place + i % splits * stride)
        higher = tl.maximum(top, logs)
        mass = mass * tl.exp2(top - higher) + tl.exp2(logs - higher)
        top = higher
    some = mass > 0
    total = tl.where(some, top + tl.log2(mass), 0.0)
    out = tl.where(some[:, None], centre[None, :], 0.0)
    for i in tl.static_range(len(PLANES)):
        partial, logs = Partial + i * plane * DC, Logs + i * plane
        at = Dual + (PLANES[i] * kv_heads + head).to(tl.int64) * (D * D) + column[None, :]
        for start in range(0, DC, BLOCK):
            some_columns = start + tl.arange(0, BLOCK)
            channel = channel_of(some_columns, D, BANDS[i])
            part = joined_splits(partial, logs, place, some_columns, splits, stride, total, DC)
            part = tl.where((channel < D)[None, :], part, 0.0)
            inside = (channel < D)[:, None] & (column < D)[None, :]
            dual = tl.load(at + channel[:, None] * D, mask=inside, other=0.0)
            part *= 1 / root_of(D)
            part = tl.where(part == part, operand(part, PRECISION), part)  # NaN shows
            dual = operand(dual * root_of(D), PRECISION)
            out = tl.dot(part, dual, out, input_precision=PRECISION)
    near = tl.load(Near + head.to(tl.int64) * rows + r, mask=known, other=0.0)
    prefix = tl.where(some, total + near, -float("inf"))
    at = (r // G * kv_heads + head).to(tl.int64) * G + r % G
    new = tl.load(Lse + at, mask=known, other=0.0)
    inside = known[:, None] & (column < D)[None, :]
    dense = tl.load(Out + at[:, None] * D + column[None, :], mask=inside, other=0.0)
    peak = tl.maximum(prefix, new)
    whole = peak + tl.log2(tl.exp2(prefix - peak) + tl.exp2(new - peak))
    out *= tl.exp2(prefix - whole)[:, None]
    out += dense.to(tl.float32) * tl.exp2(new - whole)[:, None]
    tl.debug_barrier()  # other warps may still be about to read what is overwritten now
    tl.store(Out + at[:, None] * D + column[None, :], out.to(Out.dtype.element_ty), mask=inside)
    tl.store(Lse + at, whole, mask=known)


@triton.jit
def attend_new_rows(
    Q, K, V, Tiles, Requests, Out, Lse, q_token, kv_token, kv_heads, scale,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Causal attention of ROWS rows of a tile to their request's new tokens, BLOCK at once.

    Q    [tokens, kv_heads * G, D], tokens q_token apart; K, V [tokens, kv_heads, D], tokens
         kv_token apart; `scale` times q . k is in base 2
    Out  [tokens, kv_heads * G, D]; Lse float32 [tokens, kv_heads * G], base 2
    """
    tile, head = tl.program_id(0) // (M // ROWS), tl.program_id(1)
    request = tl.load(Tiles + tile * 4)
    first_row = tl.load(Tiles + tile * 4 + 1) + tl.program_id(0) % (M // ROWS) * ROWS
    first_token = tl.load(Requests + request * 4)
    tokens = tl.load(Requests + request * 4 + 1)
    r = first_row + tl.arange(0, ROWS)
    known = r < tokens * G
    d = tl.arange(0, DP)
    b = tl.arange(0, BLOCK)
    at = ((first_token + r // G) * kv_heads + head).to(tl.int64) * G + r % G
    inside = known[:, None] & (d < D)[None, :]
    q_row = Q + (first_token + r // G).to(tl.int64) * q_token + (head * G + r % G) * D
    q = tl.load(q_row[:, None] + d[None, :], mask=inside, other=0.0)
    top = tl.full([ROWS], NONE, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    last = tl.minimum(tokens, (first_row + ROWS - 1) // G + 1)
    for start in range(0, last, BLOCK):
        token = start + b
        first = (first_token + start).to(tl.int64) * kv_token + head * D
        place = (b * kv_token)[:, None] + d[None, :]
        mask = (token < tokens)[:, None] & (d < D)[None, :]
        k = tl.load(K + first + place, mask=mask, other=0.0)
        dots = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        dots = tl.where(token[None, :] <= (r // G)[:, None], dots, -float("inf"))
        new_top = tl.maximum(top, tl.max(dots, 1))
        fade = tl.exp2(top - new_top)
        p = tl.exp2(dots - new_top[:, None])
        mass = mass * fade + tl.sum(p, 1)
        top = new_top
        v = tl.load(V + first + place, mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="tf32x3")
    out = (acc / mass[:, None]).to(Out.dtype.element_ty)
    tl.store(Out + at[:, None] * D + d[None, :], out, mask=inside)
    tl.store(Lse + at, top + tl.log2(mass), mask=known)
