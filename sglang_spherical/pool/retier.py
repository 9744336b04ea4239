"""Re-encoding pages at another level, in place: by kernels on a GPU, by the codec elsewhere.

A page keeps its first n(level) blocks and gives the others back. Its new slices may overlap old
ones
of layers not yet read, so all layers of a page are encoded before any is written.
"""

from __future__ import annotations

import torch

from sglang_spherical.pool.arena import Arena
from sglang_spherical.pool.frames import Frames
from spherical_kernels.codec.pages import decode_slices, encode_slices
from spherical_kernels.retier.launch import Move, reencode_pages

PAGES_AT_ONCE = 16
"""Bounds the temporary memory: so many pages' slices at the new level, one layer's as floats."""


def lower_pages(
    arena: Arena, frames: Frames, pages: torch.Tensor, old: int, new: int, kernels: bool
) -> torch.Tensor:
    """Re-encodes pages int64 [n] from level `old` to level `new`; all must be full, and the frames
    calibrated.

    Returns the blocks they no longer own, int32 [n * (n(old) - n(new))].
    """
    if kernels:
        reencode_pages(
            arena.bytes, arena.page_blocks, pages, arena.moves(old, new), frames.turns,
            arena.layout.block_bytes,
        )  # fmt: skip
        arena.set_level(pages, new)
    else:
        for some in pages.split(PAGES_AT_ONCE):
            _lower_some(arena, frames, some, old, new)
    kept, owned = arena.layout.blocks[new], arena.layout.blocks[old]
    return arena.page_blocks[pages, kept:owned].flatten()


def _lower_some(arena: Arena, frames: Frames, pages: torch.Tensor, old: int, new: int) -> None:
    _, source = arena.locate(pages)  # [layers, n, kv_heads, 2]
    moves = arena.moves(old, new)
    coded = []
    for move in moves.moves:
        layers, heads = move.slices.long() // source.shape[2], move.slices.long() % source.shape[2]
        for layer in layers.unique().tolist():
            mine = heads[layers == layer]
            addresses = source[layer, :, mine, move.side]
            slices = _reencode(arena, frames, layer, mine, move, addresses)
            coded.append((move, layer, mine, slices))
    arena.set_level(pages, new)
    _, target = arena.locate(pages)
    for move, layer, mine, slices in coded:
        arena.write_slices(move.new, target[layer, :, mine, move.side].flatten(), slices)


def _reencode(
    arena: Arena, frames: Frames, layer: int, heads: torch.Tensor, move: Move,
    addresses: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Slices of some heads of a layer at addresses [n, heads], as they are after a move: uint8
    [n * heads, size_bytes]."""
    found = arena.read_slices(move.old, addresses.flatten())
    if move.old == move.new:
        return found
    count, side = len(addresses), move.side
    centre = frames.centre[side, layer, heads].repeat(count, 1)
    dual = frames.duals(move.old.pattern.frame, layer, side)[heads].repeat(count, 1, 1)
    matrix = frames.matrices(move.new.pattern.frame, layer, side)[heads].repeat(count, 1, 1)
    return encode_slices(move.new, decode_slices(move.old, found, dual, centre), matrix, centre)


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
