"""Which pages to lower, and which nodes to drop.

Pure functions of metadata that every tensor-parallel rank shares: no tensors, no clocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_spherical.retention.ladder import BOTTOM, Ladder
from sglang_spherical.retention.nodes import ROOT, NodeTable
from sglang_spherical.retention.operations import (
    SINK_PAGES,
    Drop,
    Levels,
    Lower,
    NodeView,
    Operation,
)
from sglang_spherical.retention.worth import worth

SORTED_AT_FIRST = 256
"""Steps that are put in order before more are looked at."""


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
    path: Sequence[NodeView],
    budget: int,
    end_page: int,
    hot_tails: Mapping[int, int],
    most_pages: int,
) -> tuple[list[Operation], int]:
    """Gives a prefix its budget: everything before `end_page` that is finer goes to level `budget`.

    hot_tails   by id of a node: its first page (index) that requests read hot
    most_pages  to lower now; the first ones of the prefix, which most requests share, come first
    Returns the operations and how many pages they lower.
    """
    operations: list[Operation] = []
    left = most_pages
    for view in path:
        pages = lowerable(view.levels, view.first_page, budget, end_page)
        pages = pages[pages < hot_tails.get(id(view.node), len(view.levels))][:left]
        if len(pages):
            operations.append(Lower(view.node, pages, budget))
            left -= len(pages)
    return operations, most_pages - left


@dataclass(frozen=True)
class _Steps:
    """What could be done, cheapest loss first; all [steps].

    row    of the table
    level  that the pages leave, or BOTTOM for dropping the node
    pages  that take the step
    gain   hot-token equivalents freed
    """

    row: NDArray[np.int64]
    level: NDArray[np.int64]
    pages: NDArray[np.int64]
    gain: NDArray[np.int64]


def relieve(
    table: NodeTable,
    need_tokens: int,
    ladder: Ladder,
    *,
    drops: bool = True,
    most_pages: int | None = None,
) -> list[Operation]:
    """Frees at least `need_tokens` hot-token equivalents from unlocked nodes, if they hold so many.

    Takes the steps whose loss, worth times distortion, is least for what they free, and of the last
    one only as many pages as are needed, from the end of the node. With `drops` false nothing is
    dropped, and at most `most_pages` pages are lowered: then less may be freed.
    """
    rows = table.unlocked()
    if need_tokens <= 0 or not len(rows):
        return []
    steps = _sorted_steps(table, rows, need_tokens, ladder, drops)
    whole, partial = _cut(steps, need_tokens, ladder, most_pages)
    return _operations(table, ladder, steps, whole, partial)


def _cut(
    steps: _Steps, need_tokens: int, ladder: Ladder, most_pages: int | None
) -> tuple[int, int]:
    """How many steps are taken whole, and how many pages take the one after them."""
    gained = np.cumsum(steps.gain)
    whole = int(np.searchsorted(gained, need_tokens))
    partial = 0
    if whole < len(gained):
        level, missing = steps.level[whole], need_tokens - int(gained[whole] - steps.gain[whole])
        if level == BOTTOM:
            whole += 1
        else:
            partial = -(-missing // int(ladder.gain[level]))
    if most_pages is not None:
        moved = np.cumsum(steps.pages)
        fitting = int(np.searchsorted(moved, most_pages, "right"))
        if fitting < whole or (fitting == whole and fitting < len(moved)):
            left = most_pages - int(moved[fitting] - steps.pages[fitting])
            partial = left if fitting < whole else min(partial, left)
            whole = fitting
    return whole, partial


def _sorted_steps(
    table: NodeTable, rows: NDArray[np.int64], need_tokens: int, ladder: Ladder, drops: bool
) -> _Steps:
    """The cheapest steps of the nodes in `rows` [n], as many as are needed or more, in order."""
    value = worth(table.reuses[rows], table.age(rows), len(table))
    held = table.pages[rows]
    width = held.shape[1] + 1  # a column for every level, and the last one for dropping the node
    pages, gain = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    loss = np.empty((len(rows), width))
    pages[:, :-1] = held @ ladder.passes
    gain[:, :-1] = pages[:, :-1] * ladder.gain
    loss[:, :-1] = value[:, None] * ladder.slope
    if drops:
        cost = held @ ladder.cost_tokens + table.sinks[rows] * ladder.cost_tokens[0]
        gain[:, -1] = cost - gain[:, :-1].sum(1)
        loss[:, -1] = _after_children(table, rows, value * ladder.drop_slope)
    chosen = _cheapest(loss.ravel(), gain.ravel(), need_tokens)
    own, column = np.divmod(chosen, width)
    row, last = rows[own], column == width - 1
    # At equal loss: lower before dropping, leaves before parents, old nodes before new ones.
    keys = row, table.used[row], -table.first_page[row], last, loss.ravel()[chosen]
    order = np.lexsort(keys)
    level = np.where(last, BOTTOM, column)
    return _Steps(
        row[order], level[order], pages.ravel()[chosen][order], gain.ravel()[chosen][order]
    )


def _cheapest(
    loss: NDArray[np.float64], gain: NDArray[np.int64], need_tokens: int
) -> NDArray[np.int64]:
    """Steps (indices) that free enough and cost no more than any other; all, if that is too little.

    Sorting them all would take most of the time where few are needed.
    """
    useful = np.flatnonzero(gain)
    losses, count = loss[useful], SORTED_AT_FIRST
    while count < len(useful):
        chosen = useful[losses <= np.partition(losses, count)[count]]
        if gain[chosen].sum() >= need_tokens:
            return chosen
        count *= 8
    return useful


def _after_children(
    table: NodeTable, rows: NDArray[np.int64], loss: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Losses of dropping nodes, those of parents raised to their children's, which go first."""
    place = np.full(len(table.parent), ROOT)
    place[rows] = np.arange(len(rows))
    parent = table.parent[rows]
    parent = np.where(parent == ROOT, ROOT, place[parent])  # a locked one is not among the rows
    child = np.flatnonzero(parent != ROOT)
    while True:  # once more than worth is out of order along a path, which it hardly ever is
        raised = loss.copy()
        np.maximum.at(raised, parent[child], loss[child])
        if np.array_equal(raised, loss):
            return loss
        loss = raised


def _operations(
    table: NodeTable, ladder: Ladder, steps: _Steps, whole: int, partial: int
) -> list[Operation]:
    """The first `whole` steps as operations, and the next one for `partial` of its pages."""
    taken: dict[int, NDArray[np.bool_]] = {}  # by row: the levels that its pages leave
    dropped: dict[int, None] = {}
    for row, level in zip(steps.row[:whole].tolist(), steps.level[:whole].tolist()):
        if level == BOTTOM:
            dropped[row] = None
        else:
            taken.setdefault(row, np.zeros(len(ladder.slope), np.bool_))[level] = True
    some = int(steps.row[whole]) if partial else None
    if some is not None:
        taken.setdefault(some, np.zeros(len(ladder.slope), np.bool_))
    operations: list[Operation] = [Drop(table.node[row]) for row in dropped]
    for row in [row for row in taken if row not in dropped]:
        node, sinks = table.node[row], int(table.sinks[row])
        after = ladder.targets(taken[row])[node.levels]
        if row == some:
            leaving = np.flatnonzero(after[sinks:] == steps.level[whole]) + sinks
            after[leaving[-partial:]] = ladder.next_level[steps.level[whole]]
        after[:sinks] = node.levels[:sinks]
        operations += _lowers(node, after)
    return operations


def _lowers(node: Any, after: Levels) -> list[Operation]:
    """What brings a node's pages to the levels `after` [pages]."""
    changed = np.flatnonzero(after != node.levels)
    return [
        Lower(node, changed[after[changed] == level], int(level))
        for level in np.unique(after[changed])
    ]
