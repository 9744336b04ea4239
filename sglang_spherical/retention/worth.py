"""What the pages of a node are worth: the uses to be expected of them.

The evidence is the same on every tensor-parallel rank: how often independent requests came back to
the node, and how many accesses of the tree ago it was last used. Both are counted; no clock is
read. Only IEEE's own operations are used, so that ranks agree to the last bit on any machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]

NEVER_REUSED = 0.5
"""Uses to be expected of a prefix that nobody has come back to, where one reuse counts 1: a shared
prefix is worth at least three private ones of its age."""

HALF_LIFE = 1.0
"""Age at which worth is halved, in turns of the cache: as many accesses as the tree has nodes. A
working set that is used evenly, however large, thus keeps even worth."""


def halving(age: ArrayLike, half_life: float) -> Numbers:
    """2 ** (-age / half_life), drawn straight between whole half-lives."""
    turns = np.minimum(np.asarray(age, np.float64) / half_life, 1000.0)
    whole = np.floor(turns)
    return np.ldexp(1.0 - (turns - whole) / 2.0, -whole.astype(np.int32))


def worth(reuses: Numbers, age: ArrayLike, nodes: int) -> Numbers:
    """Worth of a page of each node [n], in uses to be expected.

    reuses  by independent requests, those long ago counting less
    age     accesses of the tree since the last use
    nodes   of the tree
    """
    return (reuses + NEVER_REUSED) * halving(age, HALF_LIFE * max(nodes, 1))
