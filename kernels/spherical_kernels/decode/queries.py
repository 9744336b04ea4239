# mypy: ignore-errors
"""Queries as the integer operands that keys meet; kernel.py describes the bands (KB)."""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import join_parts, keep


@triton.jit
def load_query(
    Parts, Units, query, real_heads, D: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr,
    FOLD: tl.constexpr, KB: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Of every band: the query as integers, int8 [K, FOLD * 2 heads]; logits per unit of its
    products, and what they start from, float32 [heads] both. Of queries from `query` on.

    FOLD tokens lie side by side in a row, each meets the query in columns of its own."""
    k = tl.arange(0, K)
    g = tl.arange(0, HEADS)
    n = tl.arange(0, FOLD * 2 * HEADS)
    column = n % (2 * HEADS)
    parts, units, starts = (), (), ()
    WIDTH: tl.constexpr = D // len(KB)
    for b in tl.static_range(len(KB)):
        at = Parts + (query * 2 + column)[None, :] * D + (b * WIDTH + k % WIDTH)[:, None]
        inside = (k // WIDTH)[:, None] == (n // (2 * HEADS))[None, :]
        inside &= (column // 2 < real_heads)[None, :]
        part = keep(tl.load(at, mask=inside, other=0), PTX)
        unit = tl.load(Units + (query + g) * 4 + b, mask=g < real_heads, other=0.0)
        unit *= KB[b][2] * 2.0 ** -KB[b][0]
        parts = parts + (part,)
        units = units + (unit,)
        starts = starts + (sum_query(part, FOLD) * unit * -KB[b][1],)
    return parts, units, starts


@triton.jit
def sum_query(part, FOLD: tl.constexpr):
    """The sums of the queries' integers, float32 [heads].

    A product, as in the loop: with two uses the compiler brings the query into an operand's layout
    once, and not in every iteration."""
    ones = tl.full([16, part.shape[0]], 1, tl.int8)
    return tl.max(join_parts(tl.dot(ones, part, out_dtype=tl.int32), FOLD), 0)


@triton.jit
def load_whole_query(
    Parts, Units, query, real_heads, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The query for centroids: int8 [DP, 2 heads]; the logit per unit of its products, and what
    that starts from, float32 [heads] both."""
    d = tl.arange(0, DP)
    g = tl.arange(0, HEADS)
    column = tl.arange(0, 2 * HEADS)
    at = Parts + (query * 2 + column)[None, :] * D + d[:, None]
    inside = (d < D)[:, None] & (column // 2 < real_heads)[None, :]
    parts = keep(tl.load(at, mask=inside, other=0), PTX)
    unit = tl.load(Units + (query + g) * 4, mask=g < real_heads, other=0.0)
    return parts, unit, sum_query(parts, 1) * (unit * 0.5)
