"""Angle-domain attention in plain PyTorch: the query meets the codes, no key is rebuilt.

    logit_t = q.c + (B q).g + sum_bands r_t,b (B q)_b . level_t,b
    out     = c_v + B_v^T (sum_pages p(page) g_v + sum_t (p_t r_t,b) level_t,b)

with c the head's fixed centre and g the page's centroid, both only where the frame has them.

A *row* is one (request, KV head), request by request; an *entry* is one page of a row. Entries are
independent until they are merged by their log-sum-exp, as in split-KV decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..codec.pages import join_bands, level_offset, read_centroids, read_radii, split_bands
from ..codec.slices import SliceLayout, read_codes

CHUNK_ELEMENTS = 1 << 21
"""Codes or logits held at once: bounds the memory of a long prefix, and under many query rows."""


@dataclass
class AttentionState:
    """Attention over a part of the keys: out [rows, queries, d], lse [rows, queries] (natural
    log)."""

    out: torch.Tensor
    lse: torch.Tensor

    def merge(self, other: AttentionState) -> AttentionState:
        """Attention over the union of both parts; a part with lse -inf adds nothing."""
        lse = torch.logaddexp(self.lse, other.lse)
        base = lse.masked_fill(lse == -torch.inf, 0.0)
        mine, theirs = torch.exp(self.lse - base), torch.exp(other.lse - base)
        return AttentionState(self.out * mine.unsqueeze(-1) + other.out * theirs.unsqueeze(-1), lse)


@dataclass
class CodedSide:
    """Keys (or values) of a batch of entries, as stored.

    slices  uint8 [entries, size_bytes]
    dual    [kv_heads, d, d], B of the frame the slices were coded in
    centre  [kv_heads, d], the fixed centre of each head
    """

    layout: SliceLayout
    slices: torch.Tensor
    dual: torch.Tensor
    centre: torch.Tensor


def attend_entries(
    q: torch.Tensor,
    keys: CodedSide,
    values: CodedSide,
    row_of: torch.Tensor,
    valid: torch.Tensor,
) -> AttentionState:
    """Attention of q over entries of one key pattern and one value pattern.

    q       [rows, queries, d] float32, already scaled by the softmax scale
    row_of  int64 [entries], the row an entry belongs to
    valid   int64 [entries], tokens of the entry that exist: the first ones of its page
    """
    queries, page_size, bands = q.shape[1], keys.layout.page_size, keys.layout.bands
    step = max(1, CHUNK_ELEMENTS // (max(bands * queries, q.shape[-1]) * page_size))
    query = _frame_query(q, keys)
    state = empty_state(q)
    for start in range(0, len(row_of), step):
        part = slice(start, start + step)
        k, v = replace(keys, slices=keys.slices[part]), replace(values, slices=values.slices[part])
        state = state.merge(_attend_chunk(query, k, v, row_of[part], valid[part]))
    return state


def empty_state(q: torch.Tensor) -> AttentionState:
    """Attention of q [rows, queries, d] over nothing."""
    return AttentionState(torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf))


@dataclass
class FramedQuery:
    """Queries in the key frame.

    whole     [rows, queries, d], B q
    bands     [rows, bands, queries, band_width], the same by bands
    offset    [rows, bands, queries, 1], what (B q).code exceeds (B q).level by
    centre    [rows, queries], q.c
    """

    whole: torch.Tensor
    bands: torch.Tensor
    offset: torch.Tensor
    centre: torch.Tensor


def _frame_query(q: torch.Tensor, keys: CodedSide) -> FramedQuery:
    per_head = q.unflatten(0, (-1, len(keys.dual)))  # [requests, kv_heads, queries, d]
    framed = (per_head @ keys.dual.transpose(-1, -2)).flatten(0, 1)
    centre = (per_head @ keys.centre.unsqueeze(-1)).flatten(0, 1).squeeze(-1)
    bands = split_bands(keys.layout, framed)
    offset = bands.sum(-1, keepdim=True) * level_offset(keys.layout, q.device)
    return FramedQuery(framed, bands, offset, centre)


def _attend_chunk(
    query: FramedQuery,
    keys: CodedSide,
    values: CodedSide,
    row_of: torch.Tensor,
    valid: torch.Tensor,
) -> AttentionState:
    rows, queries, d = query.whole.shape
    tokens = torch.arange(keys.layout.page_size, device=valid.device)
    missing = tokens >= valid.view(-1, 1, 1)  # [entries, 1, page_size]
    logits = _logits(query, keys, row_of).masked_fill_(missing, -torch.inf)

    peak = logits.amax(-1)
    top = peak.new_full((rows, queries), -torch.inf)
    top.scatter_reduce_(0, row_of.unsqueeze(1).expand_as(peak), peak, "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(logits - top[row_of].unsqueeze(-1))

    total = p.new_zeros(rows, queries).index_add_(0, row_of, p.sum(-1))
    coded = p.new_zeros(rows, queries, d).index_add_(0, row_of, _coded_sum(p, values, missing))
    mean = coded / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    out = mean.unflatten(0, (-1, len(values.dual))) @ values.dual + values.centre.unsqueeze(1)
    return AttentionState(out.flatten(0, 1), top + torch.log(total) + query.centre)


def _logits(query: FramedQuery, keys: CodedSide, row_of: torch.Tensor) -> torch.Tensor:
    """Logits [entries, queries, page_size] from codes, q.c left out."""
    codes, radii = read_codes(keys.layout, keys.slices), read_radii(keys.layout, keys.slices)
    dots = query.bands[row_of] @ codes.transpose(-1, -2) - query.offset[row_of]
    logits = dots.mul_(radii.unsqueeze(2)).sum(1)
    if keys.layout.calibrated:
        logits += query.whole[row_of] @ read_centroids(keys.layout, keys.slices).unsqueeze(-1)
    return logits


def _coded_sum(p: torch.Tensor, values: CodedSide, missing: torch.Tensor) -> torch.Tensor:
    """sum_t p_t (g + r_t level_t) in the value frame: [entries, queries, d] from p [entries,
    queries, page_size]."""
    layout = values.layout
    radii = read_radii(layout, values.slices).masked_fill(
        missing, 0.0
    )  # unwritten radii may be NaN
    weighted = p.unsqueeze(1) * radii.unsqueeze(2)  # [entries, bands, queries, page_size]
    coded = weighted @ read_codes(layout, values.slices)
    coded -= weighted.sum(-1, keepdim=True) * level_offset(layout, p.device)
    out = join_bands(coded)
    if layout.calibrated:
        out = out + p.sum(-1, keepdim=True) * read_centroids(layout, values.slices).unsqueeze(1)
    return out
