"""Pages of every request sorted by level, then cut into items of about equal length.

A *run* is the pages of one request and one level; runs are numbered request * LP + level. `Runs`
has four int32 numbers per run in planes of `runs` numbers: pages, first page, valid tokens of the
last page, and the first item after those of the run.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST_WAVES = tl.constexpr(3)
START_PAGES = tl.constexpr(4)  # what an item costs beside its pages, in pages


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
def cut_items(
    Runs, Items, ItemStart, HotItems, batch, runs, max_items, wave,
    PAGE: tl.constexpr, LP: tl.constexpr, BP: tl.constexpr, ITEMS: tl.constexpr,
    FEWEST: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: how many pages an item has at most, and the items.

    The device runs `wave` items at once. Of the fewest pages that make one, two or MOST_WAVES such
    waves of items, those are chosen whose waves take the least time.

    Items      int32 [max_items, 4]: level << 16 | request, first, end, valid tokens of page end - 1
    ItemStart  int32 [runs / LP + 1], HotItems int32 [runs / LP]
    BP         runs, ITEMS: items, padded to powers of two
    STEPS      halvings that search as many pages, or as many runs
    """
    run = tl.arange(0, BP)
    request, level = run // LP, run % LP
    exists = run < runs
    count = tl.load(Runs + run, mask=request < batch, other=0)
    longest = tl.maximum(tl.max(count, 0), 1)
    needed = tl.sum((count > 0).to(tl.int32), 0)
    best, least = longest, 0x7FFFFFFF
    for waves in range(1, MOST_WAVES + 1):
        most = tl.minimum(tl.maximum(waves * wave, needed), max_items)
        high = longest
        low = tl.minimum(high, FEWEST)
        for _ in range(STEPS):
            middle = (low + high) // 2
            fits = (tl.sum((count + middle - 1) // middle, 0) <= most) | (low >= high)
            high = tl.where(fits, middle, high)
            low = tl.where(fits, low, middle + 1)
        items = tl.sum((count + high - 1) // high, 0)
        time = (items + wave - 1) // wave * (high + START_PAGES)
        best = tl.where(time < least, high, best)
        least = tl.minimum(time, least)
    splits = (count + best - 1) // best
    end_of_run = tl.cumsum(splits, 0)
    tl.store(Runs + 3 * runs + run, end_of_run, mask=exists)
    tl.store(ItemStart + run * 0, 0, mask=run == 0)
    tl.store(ItemStart + request + 1, end_of_run, mask=exists & (level == LP - 1))
    tl.store(HotItems + request, splits, mask=exists & (level == 0))
    tl.debug_barrier()

    item = tl.arange(0, ITEMS)
    low = tl.zeros([ITEMS], tl.int32)  # the first run that ends after the item
    high = low + runs
    for _ in range(STEPS):
        middle = (low + high) // 2
        after = tl.load(Runs + 3 * runs + middle, mask=middle < runs, other=0x7FFFFFFF) > item
        high = tl.where(after, middle, high)
        low = tl.where(after | (low >= high), low, middle + 1)
    used = (low < runs) & (item < max_items)
    mine = Runs + low
    pages = tl.load(mine, mask=used, other=0)
    first_page = tl.load(mine + runs, mask=used, other=0)
    valid = tl.load(mine + 2 * runs, mask=used, other=0)
    end = tl.load(mine + 3 * runs, mask=used, other=1)
    start = tl.load(mine + 3 * runs - 1, mask=used & (low > 0), other=0)
    parts = tl.maximum(end - start, 1)
    rank = item - start
    first = first_page + rank * pages // parts
    last = first_page + (rank + 1) * pages // parts
    out = Items + item * 4
    inside = item < max_items
    tl.store(out, tl.where(used, (low % LP) << 16 | (low // LP), 0), mask=inside)
    tl.store(out + 1, tl.where(used, first, 0), mask=inside)
    tl.store(out + 2, tl.where(used, last, 0), mask=inside)
    tl.store(out + 3, tl.where(used, tl.where(rank == parts - 1, valid, PAGE), 0), mask=inside)
