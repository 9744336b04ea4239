"""Fills the tables that a decode step reads, at fixed addresses, without waiting for the device.

Two launches before every step, outside its graph: the shapes depend on the batch size and on what
was allocated, never on the requests' lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from ..device import Launch
from .kernel import MOST_WAVES, cut_items, sort_pages

PAGES_AT_ONCE = 256
"""Pages that a program of `sort_pages` looks at together."""

RUN_NUMBERS = 4
"""int32 numbers per run (kernel.py)."""

SORT_WARPS, CUT_WARPS = 4, 8


@dataclass(frozen=True)
class PlanTables:
    """What the decode kernel reads; `runs` is the planner's own.

    items       int32 [max_items, 4]: level << 16 | request, first, end, valid tokens of the last;
                [first, end) of the request's sorted pages, first == end where unused
    item_start  int32 [max_batch + 1], where the items of each request start
    hot_items   int32 [max_batch], how many of them read pages of level 0: the first ones
    pages       int32 [max_batch, max_pages], pages of each request in order of level
    runs        int32 [RUN_NUMBERS, max_batch, levels rounded up to a power of two]
    """

    items: torch.Tensor
    item_start: torch.Tensor
    hot_items: torch.Tensor
    pages: torch.Tensor
    runs: torch.Tensor

    @classmethod
    def allocate(
        cls, max_batch: int, max_pages: int, levels: int, max_items: int, device: torch.device | str
    ) -> PlanTables:
        """Empty tables. Raises ValueError when a request's pages of every level may not get an
        item each."""
        if max_items < max_batch * levels:
            raise ValueError(
                f"max_items: expected at least {max_batch * levels} for {max_batch} requests with "
                f"pages of {levels} levels, got {max_items}"
            )

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        runs = table(RUN_NUMBERS, max_batch, triton.next_power_of_2(levels))
        return cls(
            table(max_items, 4), table(max_batch + 1), table(max_batch),
            table(max_batch, max_pages), runs,
        )  # fmt: skip


def most_items(wave: int, batch: int, levels: int) -> int:
    """Items that a plan may make: enough waves of them, and one of every request and level."""
    return max(int(MOST_WAVES.value) * wave, batch * levels)


def plan_pages(
    tables: PlanTables,
    req_to_token: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    page_level: torch.Tensor,
    page_size: int,
    fewest_pages: int,
    wave: int,
) -> None:
    """Plans a batch that reads the first `lengths` tokens, 1 or more, of the requests in `slots`.

    req_to_token  int32 [slots, context], token locations
    slots         int [batch], lengths int [batch]
    page_level    uint8 [num_pages], the level of each page
    fewest_pages  of an item, where there are so many
    wave          items that the device runs at once
    """
    batch, (max_batch, max_pages) = len(slots), tables.pages.shape
    if batch > max_batch:
        raise ValueError(f"slots: expected at most {max_batch} requests, got {batch}")
    levels = tables.runs.shape[2]
    runs, max_items = max_batch * levels, len(tables.items)
    _sort_launch(page_size, levels)(
        (batch, 1, 1),
        req_to_token, slots, lengths, page_level, tables.pages, tables.runs, req_to_token.stride(0),
        max_pages, runs,
    )  # fmt: skip
    steps = max(max_pages, runs).bit_length() + 1
    _cut_launch(page_size, levels, runs, max_items, fewest_pages, steps)(
        (1, 1, 1),
        tables.runs, tables.items, tables.item_start, tables.hot_items, batch, runs, max_items,
        wave,
    )  # fmt: skip


@cache
def _sort_launch(page_size: int, levels: int) -> Launch:
    return Launch(sort_pages, PAGE=page_size, LP=levels, BLOCK=PAGES_AT_ONCE, num_warps=SORT_WARPS)


@cache
def _cut_launch(
    page_size: int, levels: int, runs: int, max_items: int, fewest_pages: int, steps: int
) -> Launch:
    return Launch(
        cut_items, PAGE=page_size, LP=levels, BP=triton.next_power_of_2(runs),
        ITEMS=triton.next_power_of_2(max_items), FEWEST=fewest_pages, STEPS=steps,
        num_warps=CUT_WARPS,
    )  # fmt: skip
