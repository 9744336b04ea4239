"""Re-encoding pages at another level, in place: by kernels on a GPU, by the codec elsewhere.

A page keeps its first n(level) blocks and gives the others back. Its new slices may overlap old
ones
of layers not yet read, so all layers of a page are encoded before any is written.
"""

from __future__ import annotations

import torch

from sglang_spherical.pool.arena import KEYS, VALUES, Arena
from sglang_spherical.pool.frames import Frames
from spherical_kernels.codec.pages import decode_slices, encode_slices
from spherical_kernels.retier.launch import reencode_pages

PAGES_AT_ONCE = 16
"""Bounds the temporary memory: so many pages' slices at the new level, one layer's as floats."""


def lower_pages(
    arena: Arena, frames: Frames, pages: torch.Tensor, old: int, new: int, kernels: bool
) -> torch.Tensor:
    """Re-encodes pages int64 [n] from level `old` to level `new`; all must be full and uniform.

    Returns the blocks they no longer own, int32 [n * (n(old) - n(new))].
    """
    frames.calibrate()
    if kernels:
        reencode_pages(
            arena.bytes, arena.page_blocks, pages, arena.kinds[old], arena.kinds[new],
            arena.places[old], arena.places[new], frames.turns, arena.layout.block_bytes,
        )  # fmt: skip
        arena.set_level(pages, new)
    else:
        for some in pages.split(PAGES_AT_ONCE):
            _lower_some(arena, frames, some, old, new)
    kept, owned = arena.layout.blocks[new], arena.layout.blocks[old]
    return arena.page_blocks[pages, kept:owned].flatten()


def _lower_some(arena: Arena, frames: Frames, pages: torch.Tensor, old: int, new: int) -> None:
    _, source = arena.locate(pages)  # [layers, n, kv_heads, 2]
    encoded = [
        [
            _reencode(arena, frames, layer, side, source[layer, :, :, side], old, new)
            for side in (KEYS, VALUES)
        ]
        for layer in range(arena.layout.layers)
    ]
    arena.set_level(pages, new)
    _, target = arena.locate(pages)
    layouts = arena.layout.side_layouts(new)
    for layer, sides in enumerate(encoded):
        for side, slices in enumerate(sides):
            arena.write_slices(layouts[side], target[layer, :, :, side].flatten(), slices)


def _reencode(
    arena: Arena, frames: Frames, layer: int, side: int, addresses: torch.Tensor, old: int, new: int
) -> torch.Tensor:
    """Slices of one layer and side at addresses [n, kv_heads], coded anew: uint8 [n * kv_heads,
    size_bytes]."""
    before, after = arena.layout.side_layouts(old)[side], arena.layout.side_layouts(new)[side]
    count = len(addresses)
    centre = frames.centre[side, layer].repeat(count, 1)
    dual = frames.duals(before.pattern.frame, layer, side).repeat(count, 1, 1)
    matrix = frames.matrices(after.pattern.frame, layer, side).repeat(count, 1, 1)
    x = decode_slices(before, arena.read_slices(before, addresses.flatten()), dual, centre)
    return encode_slices(after, x, matrix, centre)


def recentre_pages(
    arena: Arena, frames: Frames, layer: int, pages: torch.Tensor, centre: torch.Tensor
) -> None:
    """Moves the hot slices of one layer of pages int64 [n] onto a new centre [2, kv_heads, d].

    Needed once, when a layer's centre is frozen while shorter prompts are already in the cache.
    """
    for some in pages.split(PAGES_AT_ONCE):
        _, addresses = arena.locate(some, layer)
        for side, layout in enumerate(arena.layout.side_layouts(0)):
            at, count = addresses[..., side].flatten(), len(some)
            dual = frames.duals(layout.pattern.frame, layer, side).repeat(count, 1, 1)
            matrix = frames.matrices(layout.pattern.frame, layer, side).repeat(count, 1, 1)
            before, after = (c.repeat(count, 1) for c in (frames.centre[side, layer], centre[side]))
            x = decode_slices(layout, arena.read_slices(layout, at), dual, before)
            arena.write_slices(layout, at, encode_slices(layout, x, matrix, after))
