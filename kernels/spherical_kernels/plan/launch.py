"""Fills the tables that a decode step reads, at fixed addresses, without waiting for the device.

Three launches before every step, outside its graph: the shapes depend on the batch size and on what
was allocated, never on the requests' lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton

from ..device import Launch
from .kernel import ITEM_NUMBERS, MOST_SMALL, cut_runs, place_items, sort_pages

PAGES_AT_ONCE = 256
"""Pages that a program of `sort_pages` looks at together."""

RUN_NUMBERS = 6
"""int32 numbers per run (kernel.py)."""

SORT_WARPS, CUT_WARPS, PLACE_WARPS = 4, 8, 4

ITEMS_AT_ONCE = 128
"""Items and runs that a program of `place_items` looks at together."""

NUMBERS_AT_ONCE = 1024
"""Of items, that `cut_runs` clears together."""

VALUE_COST = 2
"""Bytes that take a program as long as what it does with a value whatever its bits: where pages of
8, 4 and 2 bits are read side by side on an H200, their times are as 1.2, 1 and 0.9."""


@dataclass(frozen=True)
class PlanTables:
    """What the decode kernel reads; `runs` is the planner's own.

    items       int32 [max_items, ITEM_NUMBERS], in the order in which they start: level << 16 |
                request, first, end, valid tokens of the last, the item's number; [first, end) of
                the request's sorted pages, first == end where unused
    item_start  int32 [max_batch + 1], the number of the first item of each request
    hot_items   int32 [max_batch], how many of them read pages of level 0: the first ones
    pages       int32 [max_batch, max_pages], pages of each request in order of level
    runs        int32 [RUN_NUMBERS, max_batch, levels rounded up to a power of two]
    costs       float32 [levels, rounded up], of a page
    """

    items: torch.Tensor
    item_start: torch.Tensor
    hot_items: torch.Tensor
    pages: torch.Tensor
    runs: torch.Tensor
    costs: torch.Tensor

    @classmethod
    def allocate(
        cls,
        max_batch: int,
        max_pages: int,
        costs: Sequence[float],
        max_items: int,
        device: torch.device | str,
    ) -> PlanTables:
        """Empty tables for pages of levels with these `page_costs`. Raises ValueError when a
        request's pages of every level may not get an item each."""
        levels = len(costs)
        if max_items < max_batch * levels:
            raise ValueError(
                f"max_items: expected at least {max_batch * levels} for {max_batch} requests with "
                f"pages of {levels} levels, got {max_items}"
            )

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        padded = triton.next_power_of_2(levels)
        return cls(
            table(max_items, ITEM_NUMBERS.value), table(max_batch + 1), table(max_batch),
            table(max_batch, max_pages), table(RUN_NUMBERS, max_batch, padded),
            torch.tensor(
                [*costs, *[1.0] * (padded - levels)], dtype=torch.float32, device=device
            ),
        )  # fmt: skip


def most_items(wave: int, batch: int, levels: int) -> int:
    """Items that a plan may make, of which the device runs `wave` at once.

    Every share has a large item, and a run leaves about a share at most, which makes MOST_SMALL
    small ones; where many runs leave much, there is room beside others' items for it. Room for more
    would be programs without an item in most steps: a plan that wants more has larger ones.
    """
    runs, most_small = batch * levels, int(MOST_SMALL.value)
    return 4 + wave + min(3 * wave + runs, wave + (most_small + 1) * runs)


def page_costs(pair_bytes: Sequence[float], values: int) -> list[float]:
    """What a page of each level takes of a program's time, over their mean.

    pair_bytes  bytes of its keys' and values' slices of a head, on average
    values      in those two slices
    """
    costs = [its + VALUE_COST * values for its in pair_bytes]
    return [cost * len(costs) / sum(costs) for cost in costs]


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
    fewest_pages  of a large item, where there are so many
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
    _cut_launch(levels, runs, fewest_pages)(
        (1, 1, 1),
        tables.runs, tables.costs, tables.items, tables.item_start, tables.hot_items, batch, runs,
        max_items, wave,
    )  # fmt: skip
    _place_launch(page_size, levels)(
        (batch, 1, 1), tables.runs, tables.costs, tables.items, batch, runs
    )


@cache
def _sort_launch(page_size: int, levels: int) -> Launch:
    return Launch(sort_pages, PAGE=page_size, LP=levels, BLOCK=PAGES_AT_ONCE, num_warps=SORT_WARPS)


@cache
def _cut_launch(levels: int, runs: int, fewest_pages: int) -> Launch:
    return Launch(
        cut_runs, LP=levels, BP=triton.next_power_of_2(runs), CLEARED=NUMBERS_AT_ONCE,
        FEWEST=fewest_pages, num_warps=CUT_WARPS,
    )  # fmt: skip


@cache
def _place_launch(page_size: int, levels: int) -> Launch:
    return Launch(
        place_items, PAGE=page_size, LP=levels, BLOCK=ITEMS_AT_ONCE, num_warps=PLACE_WARPS
    )
