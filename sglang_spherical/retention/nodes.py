"""What every tensor-parallel rank knows of the tree's nodes, as columns.

A policy looks at all nodes each time memory is short. In columns that takes a few numpy calls,
however many nodes there are, and each event of the tree changes a few numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_spherical.retention.operations import Levels, sinks_of
from sglang_spherical.retention.worth import HALF_LIFE, halving

ROOT = -1
"""In place of a row: the root has none."""

FIRST_ROWS = 64


class NodeTable:
    """The nodes of a tree but its root. Rows are handed out alike wherever events are alike.

    clock       accesses: insertions of whole prefixes, by which ages are counted
    node        [rows], the nodes, opaque; None where the row is free
    parent      [rows], row of the parent, or ROOT
    first_page  [rows], pages of the prefix before the node
    pages       [rows, levels], pages at each level, sinks left out
    sinks       [rows], pages that stay hot
    locked      [rows], whether requests hold the node
    reuses      [rows], by independent requests, halved by age when counted anew
    counted     [rows], clock when they were
    used        [rows], clock of the last use
    """

    def __init__(self, levels: int) -> None:
        self._levels = levels
        self.clear()

    def clear(self) -> None:
        """No nodes, and the clock at 0."""
        self.clock = 0
        self.node: list[Any] = []
        self._free: list[int] = []
        self._allocate(FIRST_ROWS)

    def _allocate(self, rows: int) -> None:
        self.parent = np.full(rows, ROOT)
        self.first_page = np.zeros(rows, np.int64)
        self.pages = np.zeros((rows, self._levels), np.int64)
        self.sinks = np.zeros(rows, np.int64)
        self.alive = np.zeros(rows, np.bool_)
        self.locked = np.zeros(rows, np.bool_)
        self.reuses = np.zeros(rows)
        self.counted = np.zeros(rows, np.int64)
        self.used = np.zeros(rows, np.int64)

    def __len__(self) -> int:
        return len(self.node) - len(self._free)

    def unlocked(self) -> NDArray[np.int64]:
        """Rows of the nodes that no request holds."""
        return np.flatnonzero(self.alive & ~self.locked)

    def age(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Accesses since the nodes were last used."""
        return self.clock - self.used[rows]

    # --- events ---

    def add(self, node: Any, parent: int, first_page: int, levels: Levels) -> int:
        """A new node, unlocked and just used; returns its row."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self.node[row] = node
        self.parent[row], self.first_page[row] = parent, first_page
        self.alive[row], self.locked[row] = True, False
        self.reuses[row], self.counted[row], self.used[row] = 0.0, self.clock, self.clock
        self.recount(row, levels)
        return row

    def _grow(self) -> None:
        rows = len(self.node)
        if rows == len(self.parent):
            before = dict(vars(self))
            self._allocate(2 * rows)
            for name, column in before.items():
                if isinstance(column, np.ndarray):
                    getattr(self, name)[:rows] = column
        self.node.append(None)
        self._free.append(rows)

    def split(self, row: int, upper: Any, upper_levels: Levels, levels: Levels) -> int:
        """The node in `row` keeps `levels`; `upper`, with the pages before, is its new parent.

        Returns the row of the new parent, whose past is the node's own.
        """
        parent, first = int(self.parent[row]), int(self.first_page[row])
        new = self.add(upper, parent, first, upper_levels)
        for column in (self.locked, self.reuses, self.counted, self.used):
            column[new] = column[row]
        self.parent[row], self.first_page[row] = new, first + len(upper_levels)
        self.recount(row, levels)
        return new

    def remove(self, row: int) -> None:
        """A leaf is gone."""
        self.node[row], self.alive[row] = None, False
        self._free.append(row)

    def recount(self, row: int, levels: Levels) -> None:
        """The node's pages are now at `levels`."""
        sinks = sinks_of(int(self.first_page[row]), len(levels))
        self.sinks[row] = sinks
        self.pages[row] = np.bincount(levels[sinks:], minlength=self._levels)

    def touch(self, rows: list[int]) -> None:
        """Nodes were used, or are about to be."""
        self.used[rows] = self.clock

    def count_reuse(self, row: int, weight: float) -> None:
        """An independent request came back to a node."""
        age = self.clock - self.counted[row]
        self.reuses[row] *= halving(age, HALF_LIFE * len(self))
        self.reuses[row] += weight
        self.counted[row] = self.clock
