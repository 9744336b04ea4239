"""Chooses which pair of patterns each (layer, KV head) has at each level: rate against distortion.

A level's blocks are a budget of bytes, the pairs of all levels below hot what it can be spent on:
where errors weigh little a page is coarser than its level, where they weigh much it is finer.
"""

from __future__ import annotations

import torch

from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.assignment import Assignment, Kind, pack_mixed
from sglang_spherical.pool.layout import PageLayout

STEPS = 100
"""Halvings in the search for the price of a byte."""

LESS = 1 / 256
"""By how much of its bytes a budget is cut where the slices chosen under it do not fit."""


def choose_kinds(layout: PageLayout, distortion: torch.Tensor) -> Assignment:
    """The kinds of least distortion whose slices fit into the blocks of each level.

    layout      of this rank, all heads of a level alike
    distortion  float [2, layers, kv_heads, choices]: the loss expected of keys and of values coded
                in each pattern of `frame_file.CHOICES`
    Where nothing better than a level's own pair can be packed, it stays, but for heads that are
    coarser at the level above. The result is the same wherever the arguments are.
    """
    slices = layout.layers * layout.kv_heads
    expected = 2, layout.layers, layout.kv_heads, len(CHOICES[0])
    if distortion.shape != expected:
        raise ValueError(f"distortion: expected {list(expected)}, got {list(distortion.shape)}")
    uniform = layout.assignment
    lower = [level.pair for level in layout.levels[1:]]
    loss = torch.stack([_of_pair(distortion.double().cpu(), pair) for pair in lower], -1)
    loss = loss.flatten(0, 1)
    pairs = [layout.side_layouts(level) for level in range(1, len(layout.levels))]
    sizes = torch.tensor([[side.size_bytes for side in pair] for pair in pairs])
    kinds = torch.tensor([uniform.of[level][0] for level in range(1, len(layout.levels))])
    chosen, above = [uniform.of[0]], torch.zeros(slices, dtype=torch.long)
    rows = torch.arange(len(pairs))
    for level in range(1, len(layout.levels)):
        allowed = torch.where(rows < above.unsqueeze(1), torch.inf, loss)
        own = above.clamp_min(level - 1)
        picked = above = _fitting(layout, level, allowed, sizes, own)
        chosen.append(tuple(kinds[picked].tolist()))
    return Assignment(uniform.kinds, tuple(chosen))


def expected_change(layout: PageLayout, distortion: torch.Tensor) -> tuple[float, ...]:
    """By how much the kinds of a layout change the loss of each level below hot, against its own
    pair for all heads: -0.3 is 30 % less. Arguments as of `choose_kinds`."""
    changes = []
    for level in range(1, len(layout.levels)):
        pairs = [layout.levels[level].pair] * layout.layers * layout.kv_heads
        own, chosen = (
            sum(float(_of_pair(distortion, pair).flatten()[i]) for i, pair in enumerate(its))
            for its in (pairs, layout.assignment.pairs(level))
        )
        changes.append(chosen / own - 1 if own else 0.0)
    return tuple(changes)


def _of_pair(distortion: torch.Tensor, pair: Kind) -> torch.Tensor:
    """[layers, kv_heads], of a pair of patterns."""
    keys, values = (side.index(pattern) for side, pattern in zip(CHOICES, pair))
    return distortion[KEYS, ..., keys] + distortion[VALUES, ..., values]


def _fitting(
    layout: PageLayout,
    level: int,
    loss: torch.Tensor,
    sizes: torch.Tensor,
    own: torch.Tensor,
) -> torch.Tensor:
    """Rows of `sizes` [pairs, 2] for every slice of loss [slices, pairs] that can be packed into
    the blocks of a level; `own` where nothing better can be."""
    blocks = layout.blocks[level]
    budget = whole = float(blocks * layout.block_bytes)
    while budget > whole / 2:
        picked = _under_budget(loss, sizes.sum(1).double(), budget)
        if _sum(loss, picked) >= _sum(loss, own):
            break
        if pack_mixed(sizes[picked].flatten().tolist(), blocks, layout.block_bytes) is not None:
            return picked
        budget -= whole * LESS
    return own


def _sum(loss: torch.Tensor, picked: torch.Tensor) -> float:
    return float(loss.gather(1, picked.unsqueeze(1)).sum())


def _under_budget(loss: torch.Tensor, sizes: torch.Tensor, budget: float) -> torch.Tensor:
    """The choice [slices] of least loss whose sizes sum up to at most `budget`, or nearly so: the
    Lagrangian's, whose price of a byte is the lowest that keeps the budget."""
    low, high = 0.0, float(loss[loss.isfinite()].max()) + 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if float(sizes[(loss + middle * sizes).argmin(1)].sum()) > budget:
            low = middle
        else:
            high = middle
    return (loss + high * sizes).argmin(1)
