"""Keys and values through the codes of a tier, level by level as the server's pages go.

A page is coded at level 0 when its tokens are written, and every lower level is encoded from the
codes of the level above it. Slices are made by the encoder that writes the server's pages.
"""

from __future__ import annotations

import torch

from sglang_spherical.pool.assignment import Assignment
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import Level, PageLayout
from spherical_kernels.codec.pages import decode_slices, encode_slices
from spherical_kernels.codec.patterns import Pattern
from spherical_kernels.codec.slices import slice_layout

VALUE_BITS_DENSE = 16


class TierCoder:
    """The ladder of levels of a cache, over the frames of its layers and KV heads.

    chosen  kinds of the heads at these levels; None gives all of a level its own pair
    """

    def __init__(
        self, frames: Frames, levels: tuple[Level, ...], chosen: Assignment | None = None
    ) -> None:
        self.frames = frames
        layers, heads = frames.centre.shape[1:3]
        pairs = [level.pair for level in levels]
        self.levels, self.heads = levels, heads
        self.assignment = chosen or Assignment.uniform(pairs, layers * heads)

    def reach(
        self, layer: int, side: int, x: torch.Tensor, level: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read back of x [kv_heads, tokens, d] at level 0, and at `level`, reached from it.

        Tokens are whole pages. Results are float32 of x's shape.
        """
        hot = lowered = self.store(layer, side, x, 0)
        for lower in range(1, level + 1):
            lowered = self.store(layer, side, lowered, lower, above=lower - 1)
        return hot, lowered

    def store(
        self, layer: int, side: int, x: torch.Tensor, level: int, above: int | None = None
    ) -> torch.Tensor:
        """x [kv_heads, tokens, d] in slices of a level, read back: same shape, float32.

        above  the level that x was read from, if any: heads whose patterns are the same there keep
               their slices
        """
        stored = x.float().clone()
        patterns = self._patterns(layer, side, level)
        kept = [None] * self.heads if above is None else self._patterns(layer, side, above)
        for pattern in dict.fromkeys(patterns):
            heads = [h for h in range(self.heads) if patterns[h] == pattern != kept[h]]
            if heads:
                stored[heads] = self._store(layer, side, stored[heads], heads, pattern)
        return stored

    def _patterns(self, layer: int, side: int, level: int) -> list[Pattern]:
        """Of every head."""
        first = layer * self.heads
        return [pair[side] for pair in self.assignment.pairs(level)[first : first + self.heads]]

    def _store(
        self, layer: int, side: int, x: torch.Tensor, heads: list[int], pattern: Pattern
    ) -> torch.Tensor:
        frames, kind = self.frames, pattern.frame
        slices = slice_layout(pattern, frames.page_size, x.shape[-1])
        pages = x.unflatten(1, (-1, frames.page_size))  # [heads, pages, page_size, d]
        count = pages.shape[1]
        matrix = frames.matrices(kind, layer, side)[heads].repeat_interleave(count, 0)
        dual = frames.duals(kind, layer, side)[heads].repeat_interleave(count, 0)
        centre = frames.centre[side, layer, heads].repeat_interleave(count, 0)
        coded = encode_slices(slices, pages.flatten(0, 1), matrix, centre)
        return decode_slices(slices, coded, dual, centre).view(x.shape)


class TierRead:
    """A cache whose pages are hot while new, and then at `level`; for `attention.attend_codes`."""

    def __init__(self, coder: TierCoder, level: int) -> None:
        self.coder = coder
        self.level = level

    @property
    def page_size(self) -> int:
        return self.coder.frames.page_size

    def reach(self, layer: int, side: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TierCoder.reach`."""
        return self.coder.reach(layer, side, x, self.level)


def bits_per_value(layout: PageLayout, level: int) -> float:
    """Bits that a key or value component takes at a level: codes, radii, tables and padding."""
    dense = layout.dense_bytes_per_token(VALUE_BITS_DENSE // 8)
    return layout.bytes_per_token(level) / dense * VALUE_BITS_DENSE
