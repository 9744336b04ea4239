"""Which patterns the slices of a page have: one pair per level, or one for every (layer, KV head).

A *kind* is a pair of patterns, of keys and of values. Whatever it assigns, a level owns the blocks
that its own pair takes: what a page costs is the same on every rank, what fills it need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spherical_kernels.codec.patterns import Pattern

Kind = tuple[Pattern, Pattern]
"""Patterns of the keys and of the values of a (layer, KV head)."""


@dataclass(frozen=True)
class Assignment:
    """The kind of every (layer, KV head) at every level.

    kinds   finest first; kind 0 is hot
    of      [levels][layers * kv_heads] places in `kinds`. Going down the levels a head's never
            become finer: its pages of one kind are then a run among pages in order of level.
    """

    kinds: tuple[Kind, ...]
    of: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for upper, lower in zip(self.of, self.of[1:]):
            if any(finer > coarser for finer, coarser in zip(upper, lower, strict=True)):
                raise ValueError("of: a (layer, KV head) has a finer kind at a lower level")
        if any(self.of[0]):
            raise ValueError("of: expected kind 0 everywhere at level 0")

    @classmethod
    def uniform(cls, pairs: Sequence[Kind], slices: int) -> Assignment:
        """All `slices` (layers * kv_heads) alike: at every level its own pair."""
        kinds = tuple(dict.fromkeys(pairs))
        return cls(kinds, tuple((kinds.index(pair),) * slices for pair in pairs))

    def pairs(self, level: int) -> list[Kind]:
        """Of every (layer, KV head) at a level."""
        return [self.kinds[kind] for kind in self.of[level]]

    def at(self, levels: Sequence[int]) -> Assignment:
        """That of a ladder with these levels alone, the first of them hot."""
        return Assignment(self.kinds, tuple(self.of[level] for level in levels))

    def moves(self, old: int, new: int) -> dict[tuple[int, Pattern, Pattern], list[int]]:
        """What one level's slices become at a lower one: (layer, KV head)s, counted through the
        layers, by side (0: keys, 1: values), pattern at level `old` and pattern at level `new`."""
        found: dict[tuple[int, Pattern, Pattern], list[int]] = {}
        for index, pairs in enumerate(zip(self.pairs(old), self.pairs(new))):
            for side, (before, after) in enumerate(zip(*pairs)):
                found.setdefault((side, before, after), []).append(index)
        return found


def pack_alike(sizes: tuple[int, int], count: int, block_bytes: int) -> list[tuple[int, int]]:
    """(block, offset) of `count` key and `count` value slices, in order key, value, key, value, ...

    A block takes the side that lags behind, or the other one where only that still fits.
    """
    places: list[list[tuple[int, int]]] = [[], []]
    block, used = 0, 0
    while len(places[0]) < count or len(places[1]) < count:
        lagging = 0 if len(places[0]) <= len(places[1]) else 1
        for side in (lagging, 1 - lagging):
            if len(places[side]) < count and used + sizes[side] <= block_bytes:
                places[side].append((block, used))
                used += sizes[side]
                break
        else:
            block, used = block + 1, 0
    return [place for pair in zip(*places, strict=True) for place in pair]


def pack_mixed(sizes: Sequence[int], blocks: int, block_bytes: int) -> list[tuple[int, int]] | None:
    """(block, offset) of slices of these sizes, in their order; None where they do not fit.

    The largest first, each into the first block with room.
    """
    used = [0] * blocks
    places = [(0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        block = next((b for b in range(blocks) if used[b] + sizes[index] <= block_bytes), None)
        if block is None:
            return None
        places[index] = block, used[block]
        used[block] += sizes[index]
    return places
