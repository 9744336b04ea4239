"""The step's new tokens into hot pages: one launch for the keys and values of a layer.

Nothing is allocated and nothing synchronises, so a CUDA graph may hold the launch: the tensors'
addresses are fixed then, their contents are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from ..codec.frames import hadamard, hadamard_block
from ..codec.slices import SliceLayout
from ..device import Launch
from .kernel import encode_tokens_kernel


@dataclass(frozen=True)
class Tuning:
    """How the kernel is launched: tokens per program, warps per program."""

    rows: int
    warps: int


# Best of the sweep in benchmarks/results/encode_h200.json; one warp, so that no row crosses warps.
SMALL_TUNING = Tuning(rows=2, warps=1)
TUNING = Tuning(rows=8, warps=1)

SMALL_TOKENS = 128
"""Up to so many tokens a launch is a matter of latency, not of bandwidth."""


def rotation_signs(rotation: torch.Tensor) -> torch.Tensor:
    """The signs of a signed Hadamard rotation [d, d], times its scale: float32 [d].

    The kernel multiplies by them and goes on with additions. Made once, not inside a graph.
    Raises ValueError for any other matrix.
    """
    d = rotation.shape[0]
    block = hadamard_block(d)
    first = torch.arange(d, device=rotation.device) // block * block
    signs = rotation[first, torch.arange(d, device=rotation.device)].float().contiguous()
    if not torch.equal(hadamard(d).to(rotation.device) * signs, rotation.float()):
        raise ValueError("rotation: expected a signed Hadamard matrix, as signed_hadamard makes it")
    return signs


@dataclass(frozen=True)
class NewTokens:
    """Keys and values of n tokens, and the hot slices of one layer that they belong into.

    arena        uint8, contiguous
    page_blocks  int32 [num_pages, H], blocks of every page
    loc          int64 [n], page * page_size + place; rows of one place all write, any of them wins
    k, v         [n, kv_heads, d], any float dtype; the last dimension contiguous, any other strides
    places       int32 [kv_heads, 2 (keys, values), 2 (block of the page, byte offset)]
    centre       float32 [2, kv_heads, d], contiguous but for the first dimension
    signs        float32 [d], of `rotation_signs`
    block_bytes  of a block
    layout       of the hot slices, the same for keys and values
    """

    arena: torch.Tensor
    page_blocks: torch.Tensor
    loc: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    places: torch.Tensor
    centre: torch.Tensor
    signs: torch.Tensor
    block_bytes: int
    layout: SliceLayout

    def __post_init__(self) -> None:
        _, kv_heads, d = self.k.shape
        k, v, layout, places, centre = self.k, self.v, self.layout, self.places, self.centre
        if layout.calibrated:
            raise ValueError(f"layout: expected a hot pattern, got {layout.pattern.name}")
        if v.shape != k.shape or d != layout.head_dim or k.stride(2) != 1 or v.stride(2) != 1:
            raise ValueError(
                f"k, v: expected [n, kv_heads, {layout.head_dim}], the last dimension contiguous, "
                f"got {list(k.shape)} and {list(v.shape)}, strides {k.stride()} and {v.stride()}"
            )
        if places.shape != (kv_heads, 2, 2) or centre.shape != (2, kv_heads, d):
            raise ValueError(
                f"places, centre: expected [{kv_heads}, 2, 2] and [2, {kv_heads}, {d}], got "
                f"{list(places.shape)} and {list(centre.shape)}"
            )
        if not centre[0].is_contiguous() or not places.is_contiguous():
            raise ValueError(
                "places, centre: expected contiguous tensors but for centre's first dimension, got "
                f"strides {places.stride()} and {centre.stride()}"
            )

    @property
    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """The kernel's, in its order."""
        k, v = self.k, self.v
        return (
            self.arena, self.page_blocks, self.loc, k, v, self.places, self.centre, self.signs,
            len(k), k.stride(0), k.stride(1), v.stride(0), v.stride(1), self.centre.stride(0),
            self.block_bytes,
        )  # fmt: skip


def encode_tokens(tokens: NewTokens, tuning: Tuning | None = None) -> None:
    """Codes new tokens into their pages."""
    n, kv_heads, _ = tokens.k.shape
    if n == 0:
        return
    if tuning is None:
        tuning = SMALL_TUNING if n <= SMALL_TOKENS else TUNING
    _launch(tokens.layout, tuning, tokens.page_blocks.shape[1])(
        (-(-n // tuning.rows), kv_heads, 2), *tokens.arguments
    )


@cache
def _launch(layout: SliceLayout, tuning: Tuning, blocks: int) -> Launch:
    return Launch(
        encode_tokens_kernel, **kernel_constants(layout), H=blocks, ROWS=tuning.rows,
        num_warps=tuning.warps,
    )  # fmt: skip


@cache
def kernel_constants(layout: SliceLayout) -> dict[str, Any]:
    """What the kernel is specialised on, but for the tuning and the width of the block table."""
    d, (tile,) = layout.head_dim, layout.tiles
    block = hadamard_block(d)
    return {
        "D": d,
        "DP": int(triton.next_power_of_2(d)),
        "BLOCK": block,
        "STAGES": block.bit_length() - 1,
        "BITS": layout.pattern.bits[0],
        "PAGE": layout.page_size,
        "RADII": layout.radii_offset_bytes,
        "TILE": tile.offset_bytes,
    }
