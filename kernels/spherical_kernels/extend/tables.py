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
from functools import cache

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from ..device import Launch
from .prefixes import locate_slices, sort_prefixes

ITEM_COST_PAGES = 4
"""What starting and merging an item costs, in pages read."""

MOST_WAVES = 8
"""Rounds of programs up to which shares are fitted to the rounds; beyond, tiles stay whole."""

PAGES_AT_ONCE, SORT_WARPS = 256, 4
"""Pages that a program of `sort_prefixes` or `locate_slices` looks at together, and its warps."""

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
    first_page = np.append(0, counts.cumsum())

    device = req_to_token.device
    # rows of four numbers first, so that all start at multiples of 16 bytes
    of_request, of_tile, of_item, first = _to_device([requests, tiles, items, first_page], device)
    pages = torch.empty(int(first_page[-1]), dtype=torch.int32, device=device)
    page_levels = torch.empty(len(pages), dtype=torch.uint8, device=device)
    runs = torch.empty(len(counts) * levels + 1, dtype=torch.int32, device=device)
    _sort_launch(page_size, levels)(
        (len(counts), 1, 1),
        req_to_token, slots, first, page_level, pages, page_levels, runs, req_to_token.stride(0),
    )  # fmt: skip
    return ExtendTables(
        pages, page_levels, runs, of_request, of_tile, of_item, levels, tuple(sorted(present)),
        tile_rows, tuple(int(n) for n in tokens),
    )  # fmt: skip


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
    tables: ExtendTables, page_blocks: torch.Tensor, places: torch.Tensor, block_bytes: int
) -> torch.Tensor:
    """Byte addresses of the key and value slices of all pages: int64 [layers, kv_heads, n, 2].

    page_blocks  int32 [num_pages, blocks of a page]
    places       int32 [levels, layers, kv_heads, 2 (keys, values), 2], where a slice is: block of
                 the page, and offset in bytes; each level's contiguous
    """
    n, (layers, kv_heads) = len(tables.pages), places.shape[1:3]
    entries = torch.empty(layers, kv_heads, n, 2, dtype=torch.int64, device=page_blocks.device)
    launch = _locate_launch(page_blocks.shape[1])
    launch(
        (-(-n // launch.constants["BLOCK"]), layers * kv_heads, 1),
        tables.pages, tables.page_levels, page_blocks, places, entries, n, places.stride(0),
        block_bytes,
    )  # fmt: skip
    return entries


@cache
def _sort_launch(page_size: int, levels: int) -> Launch:
    rounded = int(triton.next_power_of_2(levels + 1))
    return Launch(
        sort_prefixes, PAGE=page_size, LEVELS=levels, LP=rounded, BLOCK=PAGES_AT_ONCE,
        num_warps=SORT_WARPS,
    )  # fmt: skip


@cache
def _locate_launch(columns: int) -> Launch:
    return Launch(locate_slices, H=columns, BLOCK=PAGES_AT_ONCE, num_warps=SORT_WARPS)
