"""What a policy sees of a node, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SINK_PAGES = 1
"""First pages of a prefix, which hold the attention sinks: they stay hot until they are dropped."""

Levels = NDArray[np.uint8]
"""Level of each page of a node, [pages]; 0 is hot."""


@dataclass(frozen=True)
class NodeView:
    """A radix node on the path of a prefix.

    node        the node itself, opaque to the policy
    first_page  pages of the prefix that lie before the node
    levels      of its pages
    """

    node: Any
    first_page: int
    levels: Levels


@dataclass(frozen=True)
class Lower:
    """Re-encode pages `pages` (indices into the node) at the coarser level `level`."""

    node: Any
    pages: NDArray[np.int64]
    level: int


@dataclass(frozen=True)
class Drop:
    """Remove a leaf and free its pages."""

    node: Any


Operation = Lower | Drop


def sinks_of(first_page: int, pages: int) -> int:
    """Pages of a node that hold sinks: its first ones, where the prefix begins."""
    return max(0, min(SINK_PAGES - first_page, pages))
