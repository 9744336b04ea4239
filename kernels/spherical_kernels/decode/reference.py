"""Angle-domain attention in plain PyTorch: the query meets the codes, no key is rebuilt.

    logit_t = q.c + (B q).g + sum_bands r_t,b (B q)_b . level_t,b
    out     = c_v + B_v^T (sum_pages p(page) g_v + sum_t (p_t r_t,b) level_t,b)

with c the head's fixed centre and g the page's centroid, both only where the frame has them.

A *row* is one (request, KV head); an *entry* is one page of a row. Entries are independent until
they are merged by their log-sum-exp, as in split-KV decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..codec.pages import level_offset, read_centroids, read_radii
from ..codec.slices import SliceLayout, read_codes

CHUNK_ELEMENTS = 1 << 23
"""Logits computed at once: bounds the memory of a long prefix under many query rows."""


@dataclass
class AttentionState:
    """Attention over a part of the keys: out [rows, queries, d], lse [rows, queries] (natural log)."""

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
    dual    [rows, d, d], or [d, d] for all: B of the frame the slices were coded in
    centre  [rows, d], the fixed centre of each row's head
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
    queries, page_size = q.shape[1], keys.layout.page_size
    step = max(1, CHUNK_ELEMENTS // (queries * page_size))
    framed_q = q @ keys.dual.transpose(-1, -2)
    state = None
    for start in range(0, len(row_of), step):
        part = slice(start, start + step)
        chunk = _attend_chunk(
            q,
            framed_q,
            CodedSide(keys.layout, keys.slices[part], keys.dual, keys.centre),
            CodedSide(values.layout, values.slices[part], values.dual, values.centre),
            row_of[part],
            valid[part],
        )
        state = chunk if state is None else state.merge(chunk)
    return empty_state(q) if state is None else state


def empty_state(q: torch.Tensor) -> AttentionState:
    """Attention of q [rows, queries, d] over nothing."""
    return AttentionState(torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf))


def _attend_chunk(
    q: torch.Tensor,
    framed_q: torch.Tensor,
    keys: CodedSide,
    values: CodedSide,
    row_of: torch.Tensor,
    valid: torch.Tensor,
) -> AttentionState:
    rows, queries, d = q.shape
    tokens = torch.arange(keys.layout.page_size, device=q.device)
    exists = tokens < valid.unsqueeze(1)  # [entries, page_size]
    logits = _logits(framed_q, keys, row_of, exists)  # [entries, queries, page_size]

    peak = logits.amax(-1)
    top = q.new_full((rows, queries), -torch.inf)
    top.scatter_reduce_(0, row_of.unsqueeze(1).expand_as(peak), peak, "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = torch.exp(logits - top[row_of].unsqueeze(-1))

    total = q.new_zeros(rows, queries).index_add_(0, row_of, p.sum(-1))
    coded = q.new_zeros(rows, queries, d).index_add_(0, row_of, _coded_sum(p, values, exists))
    safe = total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    out = (coded / safe) @ values.dual + values.centre.unsqueeze(1)
    lse = top + torch.log(total) + (q @ keys.centre.unsqueeze(-1)).squeeze(-1)
    return AttentionState(out, lse)


def _logits(
    framed_q: torch.Tensor, keys: CodedSide, row_of: torch.Tensor, exists: torch.Tensor
) -> torch.Tensor:
    """Logits [entries, queries, page_size] from codes, q.c left out; -inf where no token exists."""
    layout, width = keys.layout, keys.layout.band_width
    codes = read_codes(layout, keys.slices)  # [entries, page_size, d]
    radii = read_radii(layout, keys.slices)
    offset = level_offset(layout, framed_q.device)
    query = framed_q[row_of]  # [entries, queries, d]
    logits = query.new_zeros(1)
    if layout.calibrated:
        logits = query @ read_centroids(layout, keys.slices).unsqueeze(-1)
    for band in layout.pattern.coded_bands:
        channels = slice(band * width, (band + 1) * width)
        part = query[..., channels]
        dots = part @ codes[..., channels].transpose(1, 2) - (part @ offset[channels]).unsqueeze(-1)
        logits = torch.addcmul(logits, dots, radii[:, band].unsqueeze(1))
    return logits.masked_fill(~exists.unsqueeze(1), -torch.inf)


def _coded_sum(p: torch.Tensor, values: CodedSide, exists: torch.Tensor) -> torch.Tensor:
    """sum_t p_t (g + r_t level_t) in the value frame: [entries, queries, d], p [entries, queries, page_size]."""
    layout, width = values.layout, values.layout.band_width
    codes = read_codes(layout, values.slices)
    radii = read_radii(layout, values.slices).masked_fill(~exists.unsqueeze(1), 0.0)
    offset = level_offset(layout, p.device)
    parts = []
    for band, bits in enumerate(layout.pattern.bits):
        channels = slice(band * width, (band + 1) * width)
        if not bits:
            parts.append(p.new_zeros(*p.shape[:2], width))
            continue
        weighted = p * radii[:, band].unsqueeze(1)
        shift = weighted.sum(-1, keepdim=True) * offset[channels]
        parts.append(weighted @ codes[..., channels] - shift)
    coded = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    if layout.calibrated:
        centroids = read_centroids(layout, values.slices)
        coded = coded + p.sum(-1, keepdim=True) * centroids.unsqueeze(1)
    return coded
