"""What a batch of extends reads on a GPU, worked out once and used by every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_spherical.pool.kv_pool import SphericalKVPool
from spherical_kernels.extend.launch import (
    MULTIPROCESSORS,
    ExtendWorkspace,
    run_extend,
    tuning_for,
)
from spherical_kernels.extend.tables import build_tables, locate_entries

ENTRY_BYTES = 16  # of a page, layer and KV head: two addresses
MOST_ENTRY_BYTES = 64 << 20
"""Addresses of as many layers are worked out together as fit."""


class ExtendPlan:
    """The prefixes and new tokens of one forward pass.

    prefixes, lengths  tokens of every request, on the host; slots int [requests], on the device
    """

    def __init__(
        self,
        pool: SphericalKVPool,
        req_to_token: torch.Tensor,
        slots: torch.Tensor,
        prefixes: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        self.pool, self.req_to_token, self.slots = pool, req_to_token, slots
        self.prefixes, self.lengths = list(prefixes), list(lengths)
        self._of: tuple[int, torch.dtype] | None = None  # what it is prepared for
        self._first_layer = 0
        self._entries: tuple[torch.Tensor, ...] = ()

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """q [tokens, q_heads, d], k and v [tokens, kv_heads, d] -> out like q, until the next
        layer's."""
        of = q.shape[1] // k.shape[1], q.dtype
        if of != self._of:
            self.prepare(*of)
        out, _ = run_extend(
            self.tables, q, k, v, self._words, self.entries_of(layer), self._levels[layer],
            self.pool.layer_frames[layer], scale, self.workspace,
        )  # fmt: skip
        return out

    def prepare(self, group: int, dtype: torch.dtype) -> None:
        """Works out the tables, for `group` query heads of `dtype` per KV head. What a layer would
        otherwise make of a tensor, 2 us each time, is made for all of them."""
        layout, arena = self.pool.layout, self.pool.arena
        self._of, self._entries = (group, dtype), ()
        self._words, self._levels = arena.bytes.view(torch.int32), arena.kind_levels.unbind()
        tuning = tuning_for(layout.head_dim, layout.page_size, arena.device)
        self.tables = build_tables(
            self.req_to_token, self.slots, arena.page_level, self.prefixes, self.lengths,
            page_size=layout.page_size, group=group, levels=len(layout.levels),
            tile_rows=tuning.tile_rows,
            most_items=max(1, MULTIPROCESSORS * tuning.programs // layout.kv_heads),
            present=layout.kinds_at(self.pool.levels_seen),
        )  # fmt: skip
        self.workspace = ExtendWorkspace.allocate(
            self.tables, arena.kinds, group * layout.kv_heads, layout.kv_heads, arena.device,
            dtype, tuning,
        )  # fmt: skip

    def entries_of(self, layer: int) -> torch.Tensor:
        """Addresses of the slices of all pages in a layer: int64 [kv_heads, pages, 2]."""
        if not 0 <= layer - self._first_layer < len(self._entries):
            layout, arena = self.pool.layout, self.pool.arena
            one_layer = self.tables.pages.shape[0] * layout.kv_heads * ENTRY_BYTES
            together = max(1, MOST_ENTRY_BYTES // max(one_layer, 1))
            places = arena.places[:, layer : layer + together]
            self._first_layer = layer
            self._entries = locate_entries(
                self.tables, arena.page_blocks, places, layout.block_bytes
            ).unbind()
        return self._entries[layer - self._first_layer]
