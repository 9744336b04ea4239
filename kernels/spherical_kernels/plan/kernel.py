"""Pages of every request sorted by level, then cut into items that keep the device evenly busy.

A *run* is the pages of one request and one level; runs are numbered request * LP + level. `Runs`
has int32 numbers per run in planes of `runs` numbers:

    0  pages            3  the first item after those of the run
    1  first page       4  large items
    2  valid tokens of  5  pages of its small items
       the last page

A *share* is what one of the items that the device runs at once has to do: the cost of all pages by
their number. Every run gets as many large items as it has shares, rounded so that all runs together
have one for each; what they leave is cut smaller. Items start in order of cost, the dearest first.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPARED = tl.constexpr(0.06)  # share of the work that small items do, which end the step evenly
SPARED_FROM = tl.constexpr(32.0)  # cost of a share of the device below which none is spared
OVER = tl.constexpr(2.0)  # cost by which a large item may then exceed a share
SMALL = tl.constexpr(7.0)  # cost of a small item: starting it costs about three
MOST_SMALL = tl.constexpr(10)  # small items that a share of the device makes at most
ROUNDING = tl.constexpr(1e-3)  # of float32 numbers of pages
ITEM_NUMBERS = tl.constexpr(5)


@triton.jit
def read_pages(row, start, count, PageLevel, PAGE: tl.constexpr, LP: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Pages [start, start + BLOCK) of a row of token locations, of which there are `count`: index,
    id, level, and whether it is of each level, int32 [BLOCK, LP]."""
    index = start + tl.arange(0, BLOCK)
    page = tl.load(row + index * PAGE, mask=index < count, other=0) // PAGE
    level = tl.load(PageLevel + page, mask=index < count, other=LP).to(tl.int32)
    return index, page, level, (level[:, None] == tl.arange(0, LP)[None, :]).to(tl.int32)


@triton.jit
def sort_pages(
    ReqToToken, Slots, Lengths, PageLevel, Pages, Runs, stride, max_pages, runs,
    PAGE: tl.constexpr, LP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One request per program: its pages in order of level, stable, and its runs.

    ReqToToken  int32 [slots, stride], token locations
    Slots       int [batch], Lengths int [batch]
    PageLevel   uint8 [num_pages], the level of each page
    Pages       int32 [max_batch, max_pages]
    LP          levels, a power of two
    """
    request = tl.program_id(0)
    length = tl.load(Lengths + request).to(tl.int32)
    count = tl.minimum((length + PAGE - 1) // PAGE, max_pages)
    row = ReqToToken + tl.load(Slots + request).to(tl.int64) * stride
    levels = tl.arange(0, LP)

    total = tl.zeros([LP], tl.int32)
    for start in range(0, count, BLOCK):
        _, _, _, mine = read_pages(row, start, count, PageLevel, PAGE, LP, BLOCK)
        total += tl.sum(mine, 0)
    first = tl.cumsum(total, 0) - total

    base = first
    for start in range(0, count, BLOCK):
        index, page, _, mine = read_pages(row, start, count, PageLevel, PAGE, LP, BLOCK)
        rank = tl.cumsum(mine, 0) - mine + base[None, :]
        place = tl.sum(mine * rank, 1)
        tl.store(Pages + request.to(tl.int64) * max_pages + place, page, mask=index < count)
        base += tl.sum(mine, 0)

    last = tl.load(row + tl.maximum(count - 1, 0) * PAGE) // PAGE
    partial = length - (count - 1) * PAGE
    valid = tl.where(levels == tl.load(PageLevel + last).to(tl.int32), partial, PAGE)
    run = Runs + request * LP + levels
    tl.store(run, total)
    tl.store(run + runs, first)
    tl.store(run + 2 * runs, valid)


@triton.jit(do_not_specialize=["batch", "max_items"])  # one binary for all batches
def cut_runs(
    Runs, Costs, Items, ItemStart, HotItems, batch, runs, max_items, wave,
    LP: tl.constexpr, BP: tl.constexpr, CLEARED: tl.constexpr, FEWEST: tl.constexpr,
):  # fmt: skip
    """One program: how many items every run is cut into, large and small ones; clears the items.

    Costs      float32 [LP], of a page of each level, about 1; an item's is that of its pages
    Items      int32 [max_items, ITEM_NUMBERS], as in `place_items`
    ItemStart  int32 [runs / LP + 1], HotItems int32 [runs / LP]
    wave       items that the device runs at once
    BP         runs, padded to a power of two
    CLEARED    numbers of items that are cleared together
    FEWEST     cost of a share at least
    """
    for first in range(0, max_items * ITEM_NUMBERS, CLEARED):
        number = first + tl.arange(0, CLEARED)
        tl.store(Items + number, 0, mask=number < max_items * ITEM_NUMBERS)
    run = tl.arange(0, BP)
    request, level = run // LP, run % LP
    exists = run < runs
    count = tl.load(Runs + run, mask=request < batch, other=0)
    cost = tl.load(Costs + level)
    whole = count.to(tl.float32)
    share = tl.maximum(tl.sum(whole * cost, 0) / wave, FEWEST)
    spared = tl.where(share < SPARED_FROM, 0.0, SPARED)
    over = tl.where(share < SPARED_FROM, OVER / share, 0.0)
    shares = whole * cost / share
    after = tl.cumsum(shares, 0) + 0.5
    large = tl.minimum(tl.floor(after) - tl.floor(after - shares), whole)
    size = (1 - spared) * tl.minimum(1 + over, shares / tl.maximum(large, 1)) * share / cost
    left = whole - large * tl.ceil(size - ROUNDING)
    left = tl.where((large > 0) & (left * cost < SMALL / 2), 0.0, left)
    # what a share has left where the run's pages go into one large item more than it has shares:
    # room for all that this run leaves, or for two of its small items
    beside = share * (1 - shares / (tl.floor(shares) + 1))
    beside = tl.where(left * cost > beside + OVER, beside / 2, beside)
    piece = tl.maximum(tl.maximum(beside, share / MOST_SMALL), SMALL)
    small = tl.where(left > 0, tl.maximum(tl.ceil(left * cost / piece - 0.25), 1), 0.0)
    small = tl.minimum(small, left)
    # rarely too many: then what a run leaves is one item, in small tables all of the run
    small = tl.where(tl.sum(large + small, 0) <= max_items, small, tl.minimum(left, 1))
    fits = tl.sum(large + small, 0) <= max_items
    large = tl.where(fits, large, 0.0).to(tl.int32)
    left = tl.where(fits, left, whole).to(tl.int32)
    small = tl.where(fits, small, tl.minimum(whole, 1)).to(tl.int32)
    splits = large + small
    end_of_run = tl.cumsum(splits, 0)
    tl.store(Runs + 3 * runs + run, end_of_run, mask=exists)
    tl.store(Runs + 4 * runs + run, large, mask=exists)
    tl.store(Runs + 5 * runs + run, left, mask=exists)
    tl.store(ItemStart + run * 0, 0, mask=run == 0)
    tl.store(ItemStart + request + 1, end_of_run, mask=exists & (level == LP - 1))
    tl.store(HotItems + request, splits, mask=exists & (level == 0))


@triton.jit
def parts_of(Runs, Costs, run, known, runs, LP: tl.constexpr):
    """Of runs: large and small items, the pages of both, and what one of each costs."""
    pages = tl.load(Runs + run, mask=known, other=0)
    end = tl.load(Runs + 3 * runs + run, mask=known, other=0)
    start = tl.load(Runs + 3 * runs + run - 1, mask=known & (run > 0), other=0)
    large = tl.load(Runs + 4 * runs + run, mask=known, other=0)
    left = tl.load(Runs + 5 * runs + run, mask=known, other=0)
    cost = tl.load(Costs + run % LP)
    small = end - start - large
    of_large = (pages - left).to(tl.float32) * cost / tl.maximum(large, 1)
    return start, large, small, pages, left, of_large, left * cost / tl.maximum(small, 1)


@triton.jit
def ahead_of(own_cost, own_place, cost, place, items):
    """How many of so many items [C] of each cost start before those of a cost [R]: that cost more,
    or as much and lie before: int32 [R]."""
    dearer = cost[None, :] > own_cost[:, None]
    as_dear = (cost[None, :] == own_cost[:, None]) & (place[None, :] < own_place[:, None])
    return tl.sum(tl.where(dearer | as_dear, items[None, :], 0), 1)


@triton.jit
def of_level(x, mine):
    """x [LP] of the level that each row of mine [n, LP] marks."""
    return tl.sum(tl.where(mine, x[None, :], 0), 1)


@triton.jit(do_not_specialize=["batch"])
def place_items(
    Runs, Costs, Items, batch, runs,
    PAGE: tl.constexpr, LP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The items of one request by every program, in their places by cost.

    Items  int32 [max_items, ITEM_NUMBERS], in the order in which they start: level << 16 | request,
           first, end, valid tokens of page end - 1, and the item's number: those of a request and
           level follow each other
    BLOCK  runs and items that are looked at together
    """
    request = tl.program_id(0)
    level = tl.arange(0, LP)
    own = request * LP + level
    start, large, small, pages, left, of_large, of_small = parts_of(
        Runs, Costs, own, level < LP, runs, LP
    )
    large_at, small_at = tl.zeros([LP], tl.int32), tl.zeros([LP], tl.int32)
    for first in range(0, batch * LP, BLOCK):
        run = first + tl.arange(0, BLOCK)
        _, its_large, its_small, _, _, cost_large, cost_small = parts_of(
            Runs, Costs, run, run < batch * LP, runs, LP
        )
        large_at += ahead_of(of_large, 2 * own, cost_large, 2 * run, its_large)
        large_at += ahead_of(of_large, 2 * own, cost_small, 2 * run + 1, its_small)
        small_at += ahead_of(of_small, 2 * own + 1, cost_large, 2 * run, its_large)
        small_at += ahead_of(of_small, 2 * own + 1, cost_small, 2 * run + 1, its_small)

    first_page = tl.load(Runs + runs + own)
    valid = tl.load(Runs + 2 * runs + own)
    end = tl.max(start + large + small, 0)
    for first in range(tl.min(start, 0), end, BLOCK):
        item = first + tl.arange(0, BLOCK)
        mine = (item[:, None] >= start[None, :]) & (
            item[:, None] < (start + large + small)[None, :]
        )
        rank = item - of_level(start, mine)
        its_large, its_left = of_level(large, mine), of_level(left, mine)
        is_large = rank < its_large
        part = tl.where(is_large, rank, rank - its_large)
        parts = tl.maximum(tl.where(is_large, its_large, of_level(small, mine)), 1)
        in_large = of_level(pages, mine) - its_left
        of_kind = tl.where(is_large, in_large, its_left)
        base = of_level(first_page, mine) + tl.where(is_large, 0, in_large)
        ends_run = item + 1 == of_level(start + large + small, mine)
        place = tl.where(is_large, of_level(large_at, mine), of_level(small_at, mine)) + part
        out = Items + place * ITEM_NUMBERS
        inside = item < end
        tl.store(out, of_level(level, mine) << 16 | request, mask=inside)
        tl.store(out + 1, base + part * of_kind // parts, mask=inside)
        tl.store(out + 2, base + (part + 1) * of_kind // parts, mask=inside)
        tl.store(out + 3, tl.where(ends_run, of_level(valid, mine), PAGE), mask=inside)
        tl.store(out + 4, item, mask=inside)
