"""What a policy sees of the tree, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.uint8]
"""Level of each page of a node, [pages]; 0 is hot."""


@dataclass(frozen=True)
class NodeView:
    """A radix node as a policy sees it: only what every tensor-parallel rank agrees on.

    node         the node itself, opaque to the policy
    parent       its parent node
    children     number of its children
    last_access  order of last use, older is smaller
    first_page   pages of the prefix that lie before the node
    levels       of its pages
    """

    node: Any
    parent: Any
    children: int
    last_access: float
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
