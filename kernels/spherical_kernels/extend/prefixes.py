# mypy: ignore-errors
"""Triton bodies that find the pages of prefixes: by level, and where their slices lie."""

from __future__ import annotations

import triton
import triton.language as tl

from ..plan.kernel import read_pages


@triton.jit(do_not_specialize_on_alignment=["Slots"])
def sort_prefixes(
    ReqToToken, Slots, First, PageLevel, Pages, Levels, Runs, stride,
    PAGE: tl.constexpr, LEVELS: tl.constexpr, LP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pages of one request by every program, in order of level, stable.

    ReqToToken  int32 [slots, stride], token locations; Slots int [requests]
    First       int32 [requests + 1], where the pages of every request start in `Pages`
    PageLevel   uint8 [num_pages], the level of each page
    Pages       int32 [n]; Levels uint8 [n], of each
    Runs        int32 [requests * LEVELS + 1], where those of (request, level) start in `Pages`
    LP          more than LEVELS, a power of two
    """
    request = tl.program_id(0)
    first = tl.load(First + request)
    count = tl.load(First + request + 1) - first
    row = ReqToToken + tl.load(Slots + request).to(tl.int64) * stride
    levels = tl.arange(0, LP)

    total = tl.zeros([LP], tl.int32)
    for start in range(0, count, BLOCK):
        _, _, _, mine = read_pages(row, start, count, PageLevel, PAGE, LP, BLOCK)
        total += tl.sum(mine, 0)
    base = first + tl.cumsum(total, 0) - total
    # the end of the last level is where the next request starts
    tl.store(Runs + request * LEVELS + levels, base, mask=levels <= LEVELS)

    for start in range(0, count, BLOCK):
        index, page, level, mine = read_pages(row, start, count, PageLevel, PAGE, LP, BLOCK)
        rank = tl.cumsum(mine, 0) - mine + base[None, :]
        place = tl.sum(mine * rank, 1)
        tl.store(Pages + place, page, mask=index < count)
        tl.store(Levels + place, level.to(tl.uint8), mask=index < count)
        base += tl.sum(mine, 0)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["Places"])
def locate_slices(
    Pages, Levels, PageBlocks, Places, Entries, n, level_stride, block_bytes,
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Byte addresses of the slices of a layer and KV head in BLOCK pages.

    Pages, Levels  int32, uint8 [n]; PageBlocks int32 [num_pages, H]
    Places         int32 [levels, layers * kv_heads, 2, 2], levels level_stride apart: block of the
                   page and byte offset of keys and values
    Entries        int64 [layers * kv_heads, n, 2]
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    page = tl.load(Pages + i, mask=i < n, other=0)
    level = tl.load(Levels + i, mask=i < n, other=0).to(tl.int32)
    side = tl.arange(0, 2)[None, :]
    place = Places + level[:, None] * level_stride + which * 4 + 2 * side
    block = tl.load(PageBlocks + page[:, None] * H + tl.load(place))
    address = block.to(tl.int64) * block_bytes + tl.load(place + 1)
    target = Entries + (which.to(tl.int64) * n + i[:, None]) * 2 + side
    tl.store(target, address, mask=(i < n)[:, None])
