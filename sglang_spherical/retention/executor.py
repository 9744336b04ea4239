"""Carries a policy's operations out: bytes first, then the tree's books."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_spherical.pool.order import to_device
from sglang_spherical.retention.operations import Drop, Operation

if TYPE_CHECKING:
    from sglang_spherical.radix.tree import SphericalRadixCache


def execute(tree: SphericalRadixCache, operations: Iterable[Operation]) -> int:
    """Applies operations in order, each in the books before the next is asked for, and re-encodes
    all pages at the end: a page may be lowered once, and its node not be dropped after that.
    Returns the hot-token equivalents that became free."""
    before = tree.allocator.available_size()
    lowered: dict[tuple[int, int], list[tuple[Any, NDArray[np.int64]]]] = {}
    for operation in operations:
        if isinstance(operation, Drop):
            tree.drop(operation.node)
            continue
        levels = operation.node.levels[operation.pages]
        for old in np.unique(levels):
            chosen = operation.pages[levels == old]
            lowered.setdefault((int(old), operation.level), []).append((operation.node, chosen))
        tree.record_levels(operation.node, operation.pages, operation.level)
    for (old, new), parts in lowered.items():
        tree.allocator.lower(_page_ids(tree, parts), old, new)
    return tree.allocator.available_size() - before


def _page_ids(
    tree: SphericalRadixCache, parts: Iterable[tuple[Any, NDArray[np.int64]]]
) -> torch.Tensor:
    """Page ids int64 [n] of some pages (indices) of some nodes, by few calls to the device."""
    indices, before = [], 0
    for node, pages in parts:
        indices.append(before + pages)
        before += len(node.levels)
    first_tokens = torch.cat([node.value[:: tree.page_size] for node, _ in parts])
    chosen = to_device(np.concatenate(indices), first_tokens.device)
    return first_tokens[chosen] // tree.page_size
