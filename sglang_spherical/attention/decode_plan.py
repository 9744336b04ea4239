"""What decode steps read on a GPU: tables at fixed addresses, filled outside the step's graph."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.layout import SIDES
from spherical_kernels.decode.launch import (
    DecodeWorkspace,
    LayerPages,
    run_decode,
    wave_of,
)
from spherical_kernels.encode.launch import NewTokens
from spherical_kernels.plan.launch import PlanTables, most_items, page_costs, plan_pages

FEWEST_PAGES = 4
"""Of an item: below, starting and merging cost more than reading."""

MULTIPROCESSORS = 132
"""Taken for granted where there is no GPU to ask."""


class DecodeTables:
    """Tables and workspace for up to `max_batch` requests, the same for all layers."""

    def __init__(
        self, pool: SphericalKVPool, req_to_token: torch.Tensor, max_batch: int, q_heads: int
    ) -> None:
        layout, arena = pool.layout, pool.arena
        self.pool, self.req_to_token, self.max_batch = pool, req_to_token, max_batch
        self.wave = wave_of(
            arena.kinds, q_heads // layout.kv_heads, layout.kv_heads, _processors(arena.device)
        )
        items = self._items_of(max_batch)
        pages = -(-req_to_token.shape[1] // layout.page_size)
        pairs = layout.layers * layout.kv_heads
        costs = page_costs(
            [blocks * layout.block_bytes / pairs for blocks in layout.blocks],
            SIDES * layout.page_size * layout.head_dim,
        )
        self.tables = PlanTables.allocate(max_batch, pages, costs, items, arena.device)
        self.workspace = DecodeWorkspace.allocate(
            max_batch, items, q_heads, layout.head_dim, arena.device
        )
        self.lse = torch.empty(max_batch, q_heads, dtype=torch.float32, device=arena.device)
        self.layers = [
            LayerPages(
                arena.bytes,
                arena.page_blocks,
                arena.places[:, layer],
                arena.kind_of[:, layer],
                layout.block_bytes,
            )
            for layer in range(layout.layers)
        ]
        self.of_batch = cache(self._of_batch)

    def _items_of(self, batch: int) -> int:
        return most_items(self.wave, batch, len(self.pool.layout.levels))

    def _of_batch(self, batch: int) -> PlanTables:
        """The tables that a batch of this size fills."""
        return replace(self.tables, items=self.tables.items[: self._items_of(batch)])

    def plan(self, slots: torch.Tensor, lengths: torch.Tensor) -> None:
        """Plans a step that reads the first `lengths` [batch] tokens of the requests in `slots`."""
        plan_pages(
            self.of_batch(len(slots)), self.req_to_token, slots, lengths,
            self.pool.arena.page_level, self.pool.page_size, FEWEST_PAGES,
            self.wave,
        )  # fmt: skip

    def attend(
        self, layer: int, q: torch.Tensor, scale: float, new: NewTokens | None
    ) -> torch.Tensor:
        """Attention of q [batch, heads, d], heads contiguous, over everything planned; out like q,
        contiguous. new: the step's tokens, where they are not in their pages yet."""
        out, batch = torch.empty(q.shape, dtype=q.dtype, device=q.device), len(q)
        run_decode(
            self.of_batch(batch), self.pool.arena.kinds, q, self.layers[layer],
            self.pool.layer_frames[layer], scale, self.workspace, out, self.lse[:batch],
            new=new,
        )  # fmt: skip
        return out


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
