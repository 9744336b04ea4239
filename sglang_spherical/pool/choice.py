"""Chooses which pair of patterns each (layer, KV head) has at each level: rate against distortion.

A level's blocks are a budget of bytes, the pairs below hot what it can be spent on: where errors
weigh little a page is coarser than its level, where they weigh much it is finer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.assignment import Assignment, Kind, pack_mixed
from sglang_spherical.pool.layout import PageLayout, kind_layouts

Loss = NDArray[np.float64]
"""[slices, pairs], expected of every (layer, KV head); infinite where it may not have the pair."""

Rows = NDArray[np.int64]

STEPS = 100
"""Halvings in the search for the price of a byte."""

LESS = 1 / 256
"""By how much of its bytes a budget is cut where the slices chosen under it do not fit."""


def choose_kinds(layout: PageLayout, distortion: torch.Tensor, finer: bool = True) -> Assignment:
    """The kinds of least distortion whose slices fit into the blocks of each level.

    layout      of this rank, all heads of a level alike
    distortion  float [2, layers, kv_heads, choices]: the loss expected of keys and of values coded
                in each pattern of `frame_file.CHOICES`
    finer       whether heads may have what no level has: gradients know which need it, an estimate
                takes bits from the others for nothing (docs/retention.md)
    Where nothing better than a level's own pair can be packed, it stays, but for heads that are
    coarser at the level above. The result is the same wherever the arguments are.
    """
    expected = 2, layout.layers, layout.kv_heads, len(CHOICES[0])
    if distortion.shape != expected:
        raise ValueError(f"distortion: expected {list(expected)}, got {list(distortion.shape)}")
    uniform = layout.assignment
    pairs = layout.choices if finer else uniform.kinds[1:]
    loss = _loss(distortion, pairs)
    sides = [kind_layouts(pair, layout.page_size, layout.head_dim) for pair in pairs]
    sizes = np.array([[side.size_bytes for side in pair] for pair in sides])
    chosen, above = [uniform.of[0]], np.zeros(len(loss), np.int64)
    for level, rung in enumerate(layout.levels[1:], 1):
        allowed = np.where(np.arange(len(pairs)) < above[:, None], np.inf, loss)
        above = _fitting(layout, level, allowed, sizes, np.maximum(above, pairs.index(rung.pair)))
        chosen.append(tuple((1 + above).tolist()))
    return Assignment((uniform.kinds[0], *pairs), tuple(chosen))


def expected_change(layout: PageLayout, distortion: torch.Tensor) -> tuple[float, ...]:
    """By how much the kinds of a layout change the loss of each level below hot, against its own
    pair for all heads: -0.3 is 30 % less. Arguments as of `choose_kinds`."""
    pairs = layout.assignment.kinds[1:]
    loss = _loss(distortion, pairs)
    changes = []
    for level, rung in enumerate(layout.levels[1:], 1):
        own = float(loss[:, pairs.index(rung.pair)].sum())
        kinds = np.array(layout.assignment.of[level]) - 1
        changes.append(float(loss[np.arange(len(loss)), kinds].sum()) / own - 1 if own else 0.0)
    return tuple(changes)


def _loss(distortion: torch.Tensor, pairs: Sequence[Kind]) -> Loss:
    """Of every (layer, KV head) in each of these pairs of patterns."""
    sides = distortion.double().cpu().flatten(1, 2).numpy()
    keys, values = ([its.index(pair[i]) for pair in pairs] for i, its in enumerate(CHOICES))
    total: Loss = sides[0][:, keys] + sides[1][:, values]
    return total


def _fitting(layout: PageLayout, level: int, loss: Loss, sizes: Rows, own: Rows) -> Rows:
    """Pairs [slices], rows of sizes [pairs, 2], that can be packed into the blocks of a level;
    `own` where nothing better can be."""
    blocks, every = layout.blocks[level], np.arange(len(loss))
    budget = whole = float(blocks * layout.block_bytes)
    while budget > whole / 2:
        picked = under_budget(loss, sizes.sum(1, keepdims=True).T, budget)
        if loss[every, picked].sum() >= loss[every, own].sum():
            break
        if pack_mixed(sizes[picked].flatten().tolist(), blocks, layout.block_bytes) is not None:
            return picked
        budget -= whole * LESS
    return own


def under_budget(loss: Loss, sizes: Rows, budget: float) -> Rows:
    """The choices [slices] of least loss [slices, choices] whose sizes sum up to at most `budget`,
    or nearly so: the Lagrangian's, whose price of a byte is the lowest that keeps the budget.

    sizes  [slices or 1, choices] in bytes
    """
    low, high = 0.0, float(loss[np.isfinite(loss)].max()) + 1.0
    each = np.broadcast_to(sizes, loss.shape)
    for _ in range(STEPS):
        middle = (low + high) / 2
        picked = (loss + middle * sizes).argmin(1)
        if np.take_along_axis(each, picked[:, None], 1).sum() > budget:
            low = middle
        else:
            high = middle
    return (loss + high * sizes).argmin(1)
