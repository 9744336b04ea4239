"""Pages re-encoded at a lower level, in place, without a host synchronisation.

A page keeps its first blocks, so its new slices may overlap old ones of layers not yet read: all
slices of some pages are coded into scratch memory first, then copied to their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import triton

from ..codec.pages import GAUSSIAN_STEP
from ..codec.slices import SliceLayout
from ..device import Launch, has_ptx
from .kernel import copy_slices, reencode_slices

SCRATCH_BYTES = 48 << 20
"""Most that the scratch memory takes, where a page is not larger: what stays in an H200's L2."""


@dataclass(frozen=True)
class Tuning:
    """How the coding kernel is launched.

    programs   wanted per launch: a program reads its matrix once for all its pages
    stages     pages in flight per program
    warps      per program
    registers  at most, per thread; None leaves it to the compiler
    """

    programs: int
    stages: int
    warps: int
    registers: int | None = None


# Best of the sweep in benchmarks/results/encode_h200.json.
TUNING = Tuning(programs=1024, stages=2, warps=4)
WIDE_TUNING = Tuning(programs=1024, stages=1, warps=8)
"""For head dimensions above 128, whose slices do not fit into the registers of four warps."""


def tuning_for(head_dim: int) -> Tuning:
    return TUNING if head_dim <= 128 else WIDE_TUNING


@dataclass(frozen=True)
class Turns:
    """From hot levels into the calibrated frames, made once per calibration.

    matrices  float16 [2, layers, kv_heads, d (new), d (old)], scaled by a power of two
    scales    float32 [2, layers, kv_heads], what undoes it
    """

    matrices: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def between(cls, rotation: torch.Tensor, matrix: torch.Tensor) -> Turns:
        """From the hot rotation [d, d] to the calibrated frames A [2, layers, kv_heads, d, d].

        What float16 loses is a 2**-12 of each element, far below a step of any code.
        """
        turn = matrix @ rotation.T  # the rotation is its own dual
        peak = turn.abs().amax((-1, -2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = torch.exp2(torch.floor(torch.log2(peak)) - 7)
        return cls((turn / scale).half().contiguous(), scale.squeeze((-1, -2)).contiguous())


@dataclass(frozen=True)
class Move:
    """Slices that change from one pattern to another, or keep theirs.

    side    0: keys, 1: values
    slices  int32 [n], (layer, KV head)s of them, counted through the layers
    """

    side: int
    old: SliceLayout
    new: SliceLayout
    slices: torch.Tensor


@dataclass(frozen=True)
class Moves:
    """What becomes of a page that goes from one level to a lower one, made once for both.

    moves       of all its slices
    kept        int32 [n], slices of unchanged patterns, as 2 * (layer, KV head) + side
    whole       int32 [2 * layers * kv_heads], all slices, counted in the same way
    offsets     int32 [2 * layers * kv_heads + 1], bytes of the page's new slices before each
    old_places, new_places  int32 [layers, kv_heads, 2 (keys, values), 2 (block of the page, byte
                offset)]
    page_bytes  of all new slices of a page
    most_bytes  of one of them
    """

    moves: tuple[Move, ...]
    kept: torch.Tensor
    whole: torch.Tensor
    offsets: torch.Tensor
    old_places: torch.Tensor
    new_places: torch.Tensor
    page_bytes: int
    most_bytes: int

    @classmethod
    def over(
        cls,
        moves: Sequence[Move],
        old_places: torch.Tensor,
        new_places: torch.Tensor,
        new_bytes: Sequence[int],
    ) -> Moves:
        """new_bytes: sizes of the new slices in order layer, head, side."""
        device = old_places.device
        kept = [2 * move.slices + move.side for move in moves if move.old == move.new]
        offsets = list(accumulate(new_bytes, initial=0))
        return cls(
            tuple(moves),
            torch.cat([torch.empty(0, dtype=torch.int32, device=device), *kept]),
            torch.arange(len(new_bytes), dtype=torch.int32, device=device),
            torch.tensor(offsets, dtype=torch.int32, device=device),
            old_places.contiguous(),
            new_places.contiguous(),
            offsets[-1],
            max(new_bytes),
        )


def reencode_pages(
    arena: torch.Tensor,
    page_blocks: torch.Tensor,
    pages: torch.Tensor,
    moves: Moves,
    turns: Turns,
    block_bytes: int,
    tuning: Tuning | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> None:
    """Re-encodes full pages from one level to a lower one, whose slices are all calibrated.

    arena        uint8, contiguous
    page_blocks  int32 [num_pages, H]; a page keeps its first blocks
    pages        int64 [n], each named once
    turns        of this calibration; slices that are calibrated already stay in their frame
    """
    layers, kv_heads = moves.old_places.shape[:2]
    d, page_size = moves.moves[0].old.head_dim, moves.moves[0].old.page_size
    for move in moves.moves:
        if not move.new.calibrated:
            raise ValueError(f"moves: expected calibrated patterns, got {move.new.pattern.name}")
    if page_size & (page_size - 1):
        raise ValueError(f"page_size: expected a power of two, got {page_size}")
    if turns.matrices.shape != (2, layers, kv_heads, d, d):
        raise ValueError(
            f"turns: expected matrices [2, {layers}, {kv_heads}, {d}, {d}], got "
            f"{list(turns.matrices.shape)}"
        )
    at_once = min(len(pages), max(1, scratch_bytes // moves.page_bytes))
    scratch = torch.empty(at_once * moves.page_bytes, dtype=torch.uint8, device=arena.device)
    pages = pages.contiguous()
    columns, tuning = page_blocks.shape[1], tuning or tuning_for(d)
    slices = layers * kv_heads
    copies = {into: _copy_launch(moves.most_bytes, columns, into) for into in (False, True)}
    for first in range(0, len(pages), at_once):
        count = min(at_once, len(pages) - first)
        for move in moves.moves:
            if move.old == move.new:
                continue
            splits = min(count, -(-tuning.programs // len(move.slices)))
            _code_launch(move.old, move.new, move.side, columns, tuning, has_ptx(arena.device))(
                (len(move.slices), splits, 1),
                arena, page_blocks, pages, move.slices, moves.old_places, moves.offsets,
                turns.matrices, turns.scales, scratch, first, count, slices, block_bytes,
                moves.page_bytes,
            )  # fmt: skip
        for into, places, which in (
            (False, moves.old_places, moves.kept),
            (True, moves.new_places, moves.whole),
        ):
            if len(which):
                copies[into](
                    (len(which), count, 1),
                    arena, page_blocks, pages, which, places, moves.offsets, scratch, first,
                    block_bytes, moves.page_bytes,
                )  # fmt: skip


@cache
def _code_launch(
    old: SliceLayout, new: SliceLayout, side: int, columns: int, tuning: Tuning, ptx: bool
) -> Launch:
    return Launch(
        reencode_slices, SIDE=side, H=columns, STAGES=tuning.stages, PTX=ptx,
        **kernel_constants(old, new), num_warps=tuning.warps, maxnreg=tuning.registers,
    )  # fmt: skip


@cache
def _copy_launch(most_bytes: int, columns: int, into_pages: bool) -> Launch:
    block = int(triton.next_power_of_2(most_bytes // 8))
    return Launch(copy_slices, H=columns, BLOCK=block, INTO_PAGES=into_pages)


@cache
def kernel_constants(old: SliceLayout, new: SliceLayout) -> dict[str, Any]:
    """What the coding kernel is specialised on, but for tuning, side and table width."""
    constants: dict[str, Any] = {
        "PAGE": new.page_size,
        "D": new.head_dim,
        "DP": int(triton.next_power_of_2(new.head_dim)),
        "WIDTH": new.band_width,
        "PADDED": max(16, int(triton.next_power_of_2(new.band_width))),
        "HOT_BITS": 0 if old.calibrated else old.pattern.bits[0],
        "OLD_SCALES": old.scales,
        "NEW_SCALES": new.scales,
        "SIZE": new.size_bytes,
    }
    for name, layout in (("O", old), ("N", new)):
        constants[name + "T"] = tuple((tile.offset_bytes, tile.row_bytes) for tile in layout.tiles)
        constants[name + "D"] = tuple(
            (i, digit.band, digit.bits, digit.byte_shift, digit.code_shift, tile.runs)
            for i, tile in enumerate(layout.tiles)
            for digit in tile.digits
        )
        constants[name + "B"] = tuple((bits, GAUSSIAN_STEP[bits]) for bits in layout.pattern.bits)
    return constants
