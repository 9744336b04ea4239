"""What a batch reads, worked out once and used by every layer.

A row is one (request, KV head), an entry one page of one row. Entries are grouped by the patterns
of
their keys and values, which may differ between the heads and layers of a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_spherical.pool.arena import KEYS, VALUES, Arena
from sglang_spherical.pool.frames import Frames
from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import SliceLayout, slice_layout
from spherical_kernels.decode.reference import (
    AttentionState,
    CodedSide,
    attend_entries,
    empty_state,
)


@dataclass(frozen=True)
class EntryGroup:
    """Entries of one layer with the same pair of patterns.

    row_of     int64 [entries]
    valid      int64 [entries], tokens of the page that may be attended to: its first ones
    addresses  int64 [entries, 2], of the key and the value slice
    """

    keys: SliceLayout
    values: SliceLayout
    row_of: torch.Tensor
    valid: torch.Tensor
    addresses: torch.Tensor


class ReadPlan:
    """The pages that each request of a batch attends to.

    pages     int64 [n], logical page of each (request, page) pair
    requests  int64 [n], request (0 .. batch - 1) of each pair
    valid     int64 [n], tokens of that page that belong to the request
    """

    def __init__(
        self,
        arena: Arena,
        frames: Frames,
        pages: torch.Tensor,
        requests: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        self.arena, self.frames = arena, frames
        heads = arena.layout.kv_heads
        patterns, self._addresses = arena.locate(pages)  # [layers, n, heads, 2]
        self._pairs = patterns[..., KEYS] * len(PATTERNS) + patterns[..., VALUES]
        self._row_of = requests.unsqueeze(1) * heads + torch.arange(heads, device=pages.device)
        self._valid = valid.unsqueeze(1).expand(-1, heads)
        self._alike = bool((self._pairs == self._pairs[0]).all())
        self._chosen = self._choose(0) if self._alike else []

    def _choose(self, layer: int) -> list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Pair of patterns, place in (pages, heads), row and valid tokens of each group of a
        layer."""
        pairs = self._pairs[layer].flatten()
        row_of, valid = self._row_of.flatten(), self._valid.flatten()
        chosen = [(pair, (pairs == pair).nonzero().squeeze(1)) for pair in pairs.unique().tolist()]
        return [(pair, at, row_of[at], valid[at]) for pair, at in chosen]

    @classmethod
    def for_lengths(
        cls,
        arena: Arena,
        frames: Frames,
        req_to_token: torch.Tensor,
        request_slots: torch.Tensor,
        lengths: torch.Tensor,
    ) -> ReadPlan:
        """A plan to read the first `lengths` [batch] tokens of the requests in slots [batch]."""
        page_size = arena.layout.page_size
        counts = (lengths + page_size - 1) // page_size
        starts = torch.arange(int(counts.max()), device=lengths.device) * page_size
        present = starts < lengths.unsqueeze(1)
        requests, index = present.nonzero(as_tuple=True)
        pages = req_to_token[request_slots[requests], index * page_size].long() // page_size
        valid = (lengths[requests] - index * page_size).clamp_max(page_size)
        return cls(arena, frames, pages, requests, valid.long())

    def groups(self, layer: int) -> list[EntryGroup]:
        """The entries of a layer, by pair of patterns."""
        layout = self.arena.layout
        addresses = self._addresses[layer].flatten(0, 1)
        groups = []
        for pair, at, row_of, valid in self._chosen if self._alike else self._choose(layer):
            keys, values = (
                slice_layout(PATTERNS[i], layout.page_size, layout.head_dim)
                for i in divmod(pair, len(PATTERNS))
            )
            groups.append(EntryGroup(keys, values, row_of, valid, addresses[at]))
        return groups

    def attend(self, layer: int, q: torch.Tensor) -> AttentionState:
        """Attention of q float32 [batch * kv_heads, queries, d], scaled, over everything
        planned."""
        state = empty_state(q)
        for group in self.groups(layer):
            keys = self._side(group.keys, layer, KEYS, group.addresses[:, KEYS])
            values = self._side(group.values, layer, VALUES, group.addresses[:, VALUES])
            state = state.merge(attend_entries(q, keys, values, group.row_of, group.valid))
        return state

    def _side(
        self, layout: SliceLayout, layer: int, side: int, addresses: torch.Tensor
    ) -> CodedSide:
        return CodedSide(
            layout,
            self.arena.read_slices(layout, addresses),
            self.frames.duals(layout.pattern.frame, layer, side),
            self.frames.centre[side, layer],
        )
