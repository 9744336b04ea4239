"""What a batch of extends reads, worked out once per forward pass and used by every layer.

A *tile* is some rows (token, query head of the group) of one request; an *item* is a tile over one
of the equal shares of its request's pages, of every kind alike. A *kind* is a pair of patterns of
keys and values: kind 0 is hot. A KV head's slices of one level are of one kind, and never finer at
a lower level. A request's pages are sorted by level, stable, so that its partial page, always hot,
is the last of level 0.

Lengths are known on the host and shape the tables; which pages, and at what level, only the device
knows. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

ITEM_COST_PAGES = 4
"""What starting and merging an item costs, in pages read."""

MOST_WAVES = 8
"""Rounds of programs up to which shares are fitted to the rounds; beyond, tiles stay whole."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ExtendTables:
    """Tables on the device; `n` pages, sorted by request and level.

    pages       int32 [n], logical page ids
    page_levels uint8 [n]
    runs        int32 [requests * levels + 1]: where the pages of (request, level) start in `pages`
    requests    int32 [requests, 4]: first new token, new tokens, valid tokens of the last page, 0
    tiles       int32 [tiles, 4]: request, first row, first item, items (0 without a prefix)
    items       int32 [items, 4]: request, first row, share, shares
    levels      how many there are
    present     kinds that may be among the slices: the others are not launched
    tile_rows   rows of a tile
    lengths     new tokens of every request
    """

    pages: torch.Tensor
    page_levels: torch.Tensor
    runs: torch.Tensor
    requests: torch.Tensor
    tiles: torch.Tensor
    items: torch.Tensor
    levels: int
    present: tuple[int, ...]
    tile_rows: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def build_tables(
    req_to_token: torch.Tensor,
    slots: torch.Tensor,
    page_level: torch.Tensor,
    prefixes: Sequence[int],
    lengths: Sequence[int],
    *,
    page_size: int,
    group: int,
    levels: int,
    tile_rows: int,
    most_items: int,
    present: Collection[int],
) -> ExtendTables:
    """Tables for requests with `prefixes` cached and `lengths` new tokens.

    req_to_token  int32 [slots, context] on the device, token locations
    slots         int [requests] on the device
    page_level    uint8 [num_pages] on the device, the level of each page
    group         query heads per KV head
    most_items    items of one KV head that run at once
    present       kinds that may be among their slices
    Raises ValueError when there are not as many prefixes as lengths.
    """
    if len(prefixes) != len(lengths):
        raise ValueError(f"prefixes: expected {len(lengths)}, one per request, got {len(prefixes)}")
    counts = -(-np.asarray(prefixes, np.int64) // page_size)
    tokens = np.asarray(lengths, np.int64)
    starts = np.cumsum(tokens) - tokens
    valid = np.asarray(prefixes, np.int64) - (counts - 1).clip(0) * page_size
    requests = np.stack([starts, tokens, valid, np.zeros_like(tokens)], 1)
    tiles, items = cut_tiles(counts, tokens * group, tile_rows, most_items)
    request_of = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(request_of)) - np.repeat(np.cumsum(counts) - counts, counts)

    device = req_to_token.device
    parts = _to_device([requests, tiles, items, request_of, index * page_size], device)
    on_device, first_token = parts[3].long(), parts[4].long()
    pages = req_to_token[slots.long()[on_device], first_token] // page_size
    level = page_level[pages.long()]
    key = on_device * levels + level
    key, order = torch.sort(key, stable=True)
    bounds = torch.arange(len(counts) * levels + 1, device=device)
    return ExtendTables(
        pages=pages[order].int(),
        page_levels=level[order],
        runs=torch.searchsorted(key, bounds).int(),
        requests=parts[0],
        tiles=parts[1],
        items=parts[2],
        levels=levels,
        present=tuple(sorted(present)),
        tile_rows=tile_rows,
        lengths=tuple(int(n) for n in tokens),
    )


def cut_tiles(
    pages: Integers, rows: Integers, tile_rows: int, most_items: int
) -> tuple[Integers, Integers]:
    """Tiles [tiles, 4] and items [items, 4], as in `ExtendTables`.

    pages, rows  of every request
    """
    of_request = -(-rows // tile_rows)
    share = pages_per_item(pages, of_request, most_items)
    request = np.repeat(np.arange(len(rows)), of_request)
    rank = np.arange(len(request)) - np.repeat(np.cumsum(of_request) - of_request, of_request)
    splits = -(-pages[request] // share)
    first_item = np.cumsum(splits) - splits
    tiles = np.stack([request, rank * tile_rows, first_item, splits], 1)
    tile = np.repeat(np.arange(len(request)), splits)
    split = np.arange(len(tile)) - first_item[tile]
    items = np.stack([request[tile], tiles[tile, 1], split, splits[tile]], 1)
    return tiles, items


def pages_per_item(pages: Integers, tiles: Integers, most_items: int) -> int:
    """How many pages an item should read, so that whole rounds of `most_items` items end soonest.

    pages, tiles  of every request
    """
    longest = max(1, int(pages[tiles > 0].max(initial=0)))
    best, least = longest, float("inf")
    for waves in range(1, MOST_WAVES + 1):
        share = _fewest_pages(pages, tiles, waves * most_items, longest)
        if share is None:
            continue
        cost = waves * (share + ITEM_COST_PAGES)
        if cost < least:
            best, least = share, cost
    return best


def _fewest_pages(pages: Integers, tiles: Integers, items: int, longest: int) -> int | None:
    """The fewest pages per item that make at most `items`; None where there are more tiles."""
    low, high = 1, longest
    if int(tiles[pages > 0].sum()) > items:
        return None
    while low < high:
        middle = (low + high) // 2
        if int((-(-pages // middle) * tiles).sum()) <= items:
            high = middle
        else:
            low = middle + 1
    return high


def _to_device(arrays: Sequence[Integers], device: torch.device) -> list[torch.Tensor]:
    """Integers as int32 tensors of their shapes, all in one copy that nobody waits for."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int32))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays)]


def locate_entries(
    tables: ExtendTables,
    page_blocks: torch.Tensor,
    block_of: torch.Tensor,
    offset_of: torch.Tensor,
    block_bytes: int,
) -> torch.Tensor:
    """Byte addresses of the key and value slices of all pages: int64 [..., kv_heads, n, 2].

    page_blocks  int32 [num_pages, blocks of a page]
    block_of     int64 [levels, ..., kv_heads, 2], in which block of the page each slice lies
    offset_of    like block_of, where in the block, in bytes
    The dots may be nothing (the tables of one layer) or [layers].
    """
    level = tables.page_levels.long()
    slot, offset = (table.movedim(0, -2)[..., level, :] for table in (block_of, offset_of))
    block = page_blocks[tables.pages.long().unsqueeze(-1), slot]
    return (block.long() * block_bytes + offset).contiguous()
