"""The steps that a page may take downwards, and what each costs in distortion for what it frees.

A page goes from its level to the next one on the lower convex hull of (cost, distortion), whose
last point is to be dropped, so that every step frees its memory more dearly than the one before.
Levels above the hull, and those whose pages cost no less than a finer one's (small pages round up),
are never gone to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

BOTTOM = -1
"""In place of a next level: from here a page can only be dropped."""


@dataclass(frozen=True)
class Ladder:
    """Steps between levels, finest first; arrays are [levels].

    cost_tokens  hot-token equivalents of a page
    next_level   where a page goes from each level, or BOTTOM
    slope        distortion that this step adds, per hot-token equivalent freed; 0 at the bottom
    drop_slope   the same of dropping a page that is at the bottom
    """

    cost_tokens: NDArray[np.int64]
    next_level: NDArray[np.int64]
    slope: NDArray[np.float64]
    drop_slope: float

    @classmethod
    def over(
        cls, cost_tokens: Sequence[int], distortion: Sequence[float], drop_distortion: float
    ) -> Ladder:
        """The ladder over levels of these costs and distortions.

        Raises ValueError when dropping a page would distort less than keeping it at some level.
        """
        costs, levels = np.asarray(cost_tokens, np.int64), len(cost_tokens)
        if not max(distortion) < drop_distortion:
            raise ValueError(
                f"drop_distortion: expected more than any level's {max(distortion)}, "
                f"got {drop_distortion}"
            )
        next_level, slope = np.full(levels, BOTTOM), np.zeros(levels)
        drop_slopes = [(drop_distortion - distortion[i]) / int(costs[i]) for i in range(levels)]
        for level in range(levels):
            steps = [
                ((distortion[to] - distortion[level]) / int(costs[level] - costs[to]), -to)
                for to in range(level + 1, levels)
                if costs[to] < costs[level]
            ]
            if steps and min(steps)[0] <= drop_slopes[level]:
                slope[level], next_level[level] = min(steps)
                next_level[level] *= -1
        bottom = _end(next_level)
        next_level[bottom:], slope[bottom:] = BOTTOM, 0.0
        return cls(costs, next_level, slope, drop_slopes[bottom])

    @classmethod
    def of_drops(cls, cost_tokens: Sequence[int]) -> Ladder:
        """Without steps: while nothing can be re-encoded, pages can only be dropped."""
        levels = len(cost_tokens)
        costs, none = np.asarray(cost_tokens, np.int64), np.full(levels, BOTTOM)
        return cls(costs, none, np.zeros(levels), 1.0)

    @cached_property
    def gain(self) -> NDArray[np.int64]:
        """Hot-token equivalents that the step from each level frees, 0 at the bottom."""
        return np.where(self.next_level == BOTTOM, 0, self.cost_tokens - self._cost_of_next)

    @cached_property
    def _cost_of_next(self) -> NDArray[np.int64]:
        return self.cost_tokens[self.next_level]

    @cached_property
    def passes(self) -> NDArray[np.int64]:
        """[levels, levels]: 1 where a page at the first level is, or comes, at the second."""
        passes = np.eye(len(self.cost_tokens), dtype=np.int64)
        for level in range(len(passes) - 2, -1, -1):
            if self.next_level[level] != BOTTOM:
                passes[level] |= passes[self.next_level[level]]
        return passes

    def targets(self, taken: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Where pages of every level end when the steps from levels `taken` [levels] are taken."""
        targets = np.arange(len(taken), dtype=np.uint8)
        for level in np.flatnonzero(taken)[::-1]:
            targets[level] = targets[self.next_level[level]]
        return targets


def _end(next_level: NDArray[np.int64]) -> int:
    level = 0
    while next_level[level] != BOTTOM:
        level = int(next_level[level])
    return level
