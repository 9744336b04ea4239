"""Triton bodies of attention of many new tokens over coded pages; launch.py sets up what they
assume.

The rows of a *tile* are (token, query head of the group) of one request and KV head. Codes of a
page become float16 in frame coordinates once per tile, level * radius, and meet the queries in
tensor cores; page centroids enter as one product per row and page, for BLOCK pages at once.

A word is four bytes, four neighbouring channels. It unpacks to pairs of 16-bit lanes, so channels
stand in an order of their own in every [.., DC] tensor (columns.py).

A side (keys or values) is described by tuples of constants:
    TILES  (first word, words per row, bits of a run, bytes per row; the last two 0 without runs)
    BANDS  (place, what a code exceeds its level by, factor of the radius, and for both digits
           tile, shift in the byte, bits, shift in the code; 0 bits where there is no such digit;
           1 where code * factor less the offset's is exact, 0 where the level is taken first)
    STEPS  (VS) of every band, what its operands leave out; keys' are in the queries of the kind
CB is the BANDS of centroids, KC and VC what their codes are times to be like operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import step_of
from .operands import (
    factors_of,
    load_centroids,
    load_radii,
    load_scale,
    load_unit,
    load_words,
    unpack_rows,
)

SHRUNK = tl.constexpr(8.0)  # hot operands are values over this: keeps large radii in float16
UNITS = tl.constexpr(4096.0)  # calibrated ones are level * radius over this, which is exact
BOOST = tl.constexpr(16.0)  # weights of calibrated values are held times this: keeps small ones
NONE = tl.constexpr(-1e30)  # the maximum of no logits


# what changes from batch to batch and from layer to layer must not make a new binary
@triton.jit(
    do_not_specialize=["rows", "pages", "order"],
    do_not_specialize_on_alignment=["QScale", "Levels"],
)
def extend_pages(
    Arena, Entries, Items, Requests, Runs, Levels, Q, QScale, Partial, Lse, rows, pages, order,
    D: tl.constexpr, DC: tl.constexpr, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    W: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr,
    CALIBRATED: tl.constexpr, RADII: tl.constexpr, BLOCK: tl.constexpr,
    KT: tl.constexpr, KB: tl.constexpr, KC: tl.constexpr, VT: tl.constexpr, VB: tl.constexpr,
    VC: tl.constexpr, VS: tl.constexpr, CB: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One item (a tile over a share of its request's pages of one kind) of one KV head.

    A head's pages of the kind are a run: pages lie in order of level, and so of every head's kinds.

    Arena     int32, the whole arena; Entries int64 [kv_heads, pages, 2], byte addresses
    Items     int32 [items, 4]: request, first row, split, splits
    Requests  int32 [requests, 4]: first token, tokens, valid tokens of the last page, unused
    Runs      int32 [requests * LEVELS + 1]: where the pages of (request, level) start
    Levels    int32 [kinds, kv_heads, 2]: levels [first, end) at which a head has the kind
    Q         float16 [kv_heads, rows, DC] as frame_rows makes it, QScale float32 [kv_heads, rows]
    Partial   float32 [items, kv_heads, M, DC] in the frame; Lse float32 [items, kv_heads, M],
              base 2
    order     0 for the first launch after frame_rows, which starts Partial, 1 for a later one that
              starts its own, 2 for one that joins what is there
    """
    item, head = tl.program_id(0), tl.program_id(1)
    request = tl.load(Items + item * 4)
    first_row = tl.load(Items + item * 4 + 1)
    split = tl.load(Items + item * 4 + 2)
    splits = tl.load(Items + item * 4 + 3)
    levels = Levels + (KIND * tl.num_programs(1) + head) * 2
    begin = tl.load(Runs + request * LEVELS + tl.load(levels))
    run_end = tl.load(Runs + request * LEVELS + tl.load(levels + 1))
    first = begin + (run_end - begin) * split // splits
    end = begin + (run_end - begin) * (split + 1) // splits
    m = tl.arange(0, M)
    place = (item * tl.num_programs(1) + head).to(tl.int64) * M
    if PDL:
        if order == 0:  # for the queries; later kinds start when all programs are past it
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if first >= end:
        if PDL and order > 0:
            tl.extra.cuda.gdc_wait()
        if order < 2:
            tl.store(Lse + place + m, tl.full([M], -float("inf"), tl.float32))
        return

    first_token = tl.load(Requests + request * 4)
    last_valid = tl.load(Requests + request * 4 + 2)
    known = first_row + m < tl.load(Requests + request * 4 + 1) * G
    row = head.to(tl.int64) * rows + first_token * G + first_row
    column = tl.arange(0, DC)
    at = Q + row * DC + (m[:, None] * DC + column[None, :])
    q = tl.load(at, mask=known[:, None], other=0.0)
    q_scale = tl.load(QScale + row + m, mask=known, other=0.0)
    t = tl.arange(0, P)
    j = tl.arange(0, W)
    n = tl.arange(0, BLOCK)
    entries = Entries + head.to(tl.int64) * pages * 2
    top = tl.full([M], NONE, tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DC], tl.float32)
    for block in range(first, end, BLOCK if CALIBRATED else 1 << 24):
        if CALIBRATED:
            inside = block + n < end
            k_at = tl.load(entries + 2 * (block + n), mask=inside, other=0)
            k_radius = load_scale(Arena, k_at, inside, D)
            whole, rest = load_centroids(Arena, k_at, inside, j, KC, CB, D, WORDS, W, DC, PTX)
            near = tl.dot(q, tl.trans(rest), tl.dot(q, tl.trans(whole)))
            near *= k_radius[None, :] * q_scale[:, None]
            masses = tl.zeros([M, BLOCK], tl.float32)
        last = tl.minimum(end, block + BLOCK) if CALIBRATED else end
        for e in tl.range(block, last, num_stages=STAGES):
            keys = Arena + tl.multiple_of(tl.load(entries + 2 * e) >> 2, 4)
            values = Arena + tl.multiple_of(tl.load(entries + 2 * e + 1) >> 2, 4)
            k_words = load_words(keys, t, j, KT, WORDS, W)
            v_words = load_words(values, t, j, VT, WORDS, W)
            k_radii = load_radii(keys, t, RADII)
            v_radii = load_radii(values, t, RADII)
            if CALIBRATED:
                mine = n == e - block
                base = tl.sum(tl.where(mine[None, :], near, 0.0), 1)
                per_dot = q_scale * (load_unit(keys, D) * UNITS)
                weigh = tl.log2(load_unit(values, D) * BOOST)
            else:  # what nobody wrote may be NaN
                valid = t < tl.where(e == run_end - 1, last_valid, P)
                k_radii = tl.where(valid, k_radii, 0)
                v_radii = tl.where(valid, v_radii, 0)
                base = tl.zeros([M], tl.float32)
                per_dot = q_scale * SHRUNK
                weigh = 0.0
            factors, less = factors_of(k_radii, KB, CALIBRATED, PTX)
            k = unpack_rows(k_words, factors, less, KB, W, DC, PTX)
            factors, less = factors_of(v_radii, VB, CALIBRATED, PTX)
            v = unpack_rows(v_words, factors, less, VB, W, DC, PTX)
            dots = tl.dot(q, tl.trans(k))
            if not CALIBRATED:
                dots = tl.where(valid[None, :], dots, -float("inf"))
            new_top = tl.maximum(top, tl.max(dots, 1) * per_dot + base)
            fade = tl.exp2(top - new_top)
            p = tl.exp2(dots * per_dot[:, None] + (base - new_top + weigh)[:, None])
            page_mass = tl.sum(p, 1)
            if CALIBRATED:
                page_mass *= tl.exp2(-weigh)
                masses = tl.where(mine[None, :], page_mass[:, None], masses * fade[:, None])
            mass = mass * fade + page_mass
            top = new_top
            acc = tl.dot(p.to(tl.float16), v, acc * fade[:, None])
        if CALIBRATED:
            inside = block + n < end
            v_at = tl.load(entries + 2 * (block + n) + 1, mask=inside, other=0)
            v_radius = load_scale(Arena, v_at, inside, D)
            whole, rest = load_centroids(Arena, v_at, inside, j, VC, CB, D, WORDS, W, DC, PTX)
            shares = masses * (v_radius * BOOST)[None, :]
            share = shares.to(tl.float16)
            acc = tl.dot(share, rest, tl.dot(share, whole, acc))
            acc = tl.dot((shares - share.to(tl.float32)).to(tl.float16), whole, acc)

    out = acc * (1.0 / mass * (UNITS / BOOST if CALIBRATED else SHRUNK))[:, None]
    if CALIBRATED:
        out *= step_of(column, VS)[None, :]
    lse = top + tl.log2(mass)
    target = Partial + place * DC + (m[:, None] * DC + column[None, :])
    if PDL and order > 0:
        tl.extra.cuda.gdc_wait()
    before = tl.load(Lse + place + m, mask=m * 0 + order == 2, other=-float("inf"))
    known = before > -float("inf")
    peak = tl.maximum(lse, before)
    whole = peak + tl.log2(tl.exp2(lse - peak) + tl.exp2(before - peak))
    earlier = tl.load(target, mask=known[:, None], other=0.0)
    out = out * tl.exp2(lse - whole)[:, None] + earlier * tl.exp2(before - whole)[:, None]
    lse = whole
    tl.store(target, out)
    tl.store(Lse + place + m, lse)
