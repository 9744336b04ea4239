"""Carries a policy's operations out: bytes first, then the tree's books."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_spherical.pool.order import to_device
from sglang_spherical.retention.operations import Drop, Lower, Operation

if TYPE_CHECKING:
    from sglang_spherical.radix.tree import SphericalRadixCache


def execute(tree: SphericalRadixCache, operations: Iterable[Operation]) -> int:
    """Applies operations in order; returns the hot-token equivalents that became free."""
    before = tree.allocator.available_size()
    lowers: list[Lower] = []
    for operation in operations:
        if isinstance(operation, Drop):
            tree.drop(operation.node)
        else:
            lowers.append(operation)
    _lower(tree, lowers)
    return tree.allocator.available_size() - before


def _lower(tree: SphericalRadixCache, lowers: list[Lower]) -> None:
    """All pages of one (old, new) pair of levels are re-encoded together."""
    batches: dict[tuple[int, int], list[torch.Tensor]] = {}
    for lower in lowers:
        levels = lower.node.levels[lower.pages]
        pages = tree.page_ids(lower.node)
        for old in np.unique(levels):
            chosen = to_device(lower.pages[levels == old], pages.device)
            batches.setdefault((int(old), lower.level), []).append(pages[chosen])
        tree.record_levels(lower.node, lower.pages, lower.level)
    for (old, new), pages_of in batches.items():
        tree.allocator.lower(torch.cat(pages_of), old, new)
