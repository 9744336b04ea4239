"""Keys and values through the codes of a tier, level by level as the server's pages go.

A page is coded at level 0 when its tokens are written, and every lower level is encoded from the
codes of the level above it. Slices are made by the encoder that writes the server's pages.
"""

from __future__ import annotations

import torch

from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import Level, PageLayout, level_sides
from spherical_kernels.codec.pages import decode_slices, encode_slices

VALUE_BITS_DENSE = 16


class TierCoder:
    """The ladder of levels of a cache, over the frames of its layers and KV heads."""

    def __init__(self, frames: Frames, levels: tuple[Level, ...]) -> None:
        self.frames = frames
        self.levels = levels

    def reach(
        self, layer: int, side: int, x: torch.Tensor, level: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read back of x [kv_heads, tokens, d] at level 0, and at `level`, reached from it.

        Tokens are whole pages. Results are float32 of x's shape.
        """
        hot = lowered = self.store(layer, side, x, 0)
        for lower in range(1, level + 1):
            lowered = self.store(layer, side, lowered, lower)
        return hot, lowered

    def store(self, layer: int, side: int, x: torch.Tensor, level: int) -> torch.Tensor:
        """x [kv_heads, tokens, d] in slices of a level, read back: same shape, float32."""
        frames, heads = self.frames, len(x)
        slices = level_sides(self.levels[level], frames.page_size, x.shape[-1])[side]
        pages = x.float().unflatten(1, (-1, frames.page_size))  # [kv_heads, pages, page_size, d]
        count, kind = pages.shape[1], slices.pattern.frame
        matrix = frames.matrices(kind, layer, side).repeat_interleave(count, 0)
        dual = frames.duals(kind, layer, side).repeat_interleave(count, 0)
        centre = frames.centre[side, layer].repeat_interleave(count, 0)
        coded = encode_slices(slices, pages.flatten(0, 1), matrix, centre)
        return decode_slices(slices, coded, dual, centre).view(heads, -1, x.shape[-1])


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
