"""Which pages to lower, and which to drop, by age alone.

Pure functions of tree metadata: no tensors, no clocks, the same answer on every rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sglang_spherical.retention.operations import Drop, Levels, Lower, NodeView, Operation

SINK_PAGES = 1
"""First pages of a prefix, which hold the attention sinks: they stay hot until they are dropped."""


def lowerable(
    levels: Levels, first_page: int, level: int, end_page: int | None = None
) -> NDArray[np.int64]:
    """Pages of a node (indices) finer than `level`, after the sinks and before page `end_page` of
    the prefix."""
    index = np.arange(first_page, first_page + len(levels))
    chosen = (levels < level) & (index >= SINK_PAGES)
    if end_page is not None:
        chosen &= index < end_page
    return np.flatnonzero(chosen)


def settle(
    path: Sequence[NodeView], budget: int, end_page: int, hot_tails: Mapping[int, int]
) -> list[Operation]:
    """Gives a prefix its budget: everything before `end_page` that is finer goes to level `budget`.

    hot_tails  by id of a node: its first page (index) that another request reads hot
    """
    operations: list[Operation] = []
    for view in path:
        pages = lowerable(view.levels, view.first_page, budget, end_page)
        pages = pages[pages < hot_tails.get(id(view.node), len(view.levels))]
        if len(pages):
            operations.append(Lower(view.node, pages, budget))
    return operations


def relieve(
    views: Sequence[NodeView], need_tokens: int, cost_tokens: Sequence[int], coldest: int
) -> list[Operation]:
    """Frees at least `need_tokens` hot-token equivalents from unlocked nodes, if they hold so many.

    Lowers to level `coldest` first, oldest nodes first and each from its end; drops the oldest
    leaves only when lowering everything is not enough.
    """
    costs = np.asarray(cost_tokens)
    lowered: dict[int, Lower] = {}
    gained = 0
    oldest_first = sorted(views, key=lambda view: view.last_access)
    for view in oldest_first:
        if gained >= need_tokens:
            return list(lowered.values())
        pages = lowerable(view.levels, view.first_page, coldest)[::-1]
        gains = np.cumsum(costs[view.levels[pages]] - costs[coldest])
        count = int(np.searchsorted(gains, need_tokens - gained)) + 1
        if len(pages):
            gained += int(gains[min(count, len(pages)) - 1])
            lowered[id(view.node)] = Lower(view.node, pages[:count], coldest)
    drops: list[Operation] = []
    for view in _leaves_by_age(views):
        if gained >= need_tokens:
            break
        lower = lowered.pop(id(view.node), None)
        levels = view.levels.copy()
        if lower is not None:
            levels[lower.pages] = coldest
        gained += int(costs[levels].sum())
        drops.append(Drop(view.node))
    return [*drops, *lowered.values()]


def _leaves_by_age(views: Sequence[NodeView]) -> list[NodeView]:
    """The order in which nodes can be dropped: oldest leaf first, a parent once its children are
    gone."""
    children = {id(view.node): view.children for view in views}
    by_node = {id(view.node): view for view in views}
    heap = [(view.last_access, i, view) for i, view in enumerate(views) if not view.children]
    heapq.heapify(heap)
    order = []
    while heap:
        _, i, view = heapq.heappop(heap)
        order.append(view)
        parent = by_node.get(id(view.parent))
        if parent is not None:
            children[id(parent.node)] -= 1
            if not children[id(parent.node)]:
                heapq.heappush(heap, (parent.last_access, len(views) + i, parent))
    return order
