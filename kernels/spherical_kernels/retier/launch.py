"""Pages re-encoded at a lower level, in place, without a host synchronisation.

A page keeps its first blocks, so its new slices may overlap old ones of layers not yet read: all
slices of some pages are coded into scratch memory first, then copied to their places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from ..codec.pages import GAUSSIAN_STEP
from ..codec.slices import SliceLayout
from ..device import Launch, has_ptx
from .kernel import place_slices, reencode_slices

SIDES = 0, 1  # keys, values
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


def reencode_pages(
    arena: torch.Tensor,
    page_blocks: torch.Tensor,
    pages: torch.Tensor,
    old: tuple[SliceLayout, SliceLayout],
    new: tuple[SliceLayout, SliceLayout],
    old_places: torch.Tensor,
    new_places: torch.Tensor,
    turns: Turns,
    block_bytes: int,
    tuning: Tuning | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> None:
    """Re-encodes full, uniform pages from one level to a lower, calibrated one.

    arena        uint8, contiguous
    page_blocks  int32 [num_pages, H]; a page keeps its first blocks
    pages        int64 [n], each named once
    old, new     slice layouts of keys and values at both levels
    old_places, new_places  int32 [layers, kv_heads, 2 (keys, values), 2 (block of the page, byte
                 offset)]
    turns        of this calibration; pages that are calibrated already stay in their frame
    """
    d, page_size = old[0].head_dim, old[0].page_size
    for name, side in (("new[0]", new[0]), ("new[1]", new[1])):
        if not side.calibrated:
            raise ValueError(f"{name}: expected a calibrated pattern, got {side.pattern.name}")
    if page_size & (page_size - 1):
        raise ValueError(f"page_size: expected a power of two, got {page_size}")
    slices = old_places.shape[0] * old_places.shape[1]
    if turns.matrices.shape != (2, *old_places.shape[:2], d, d):
        raise ValueError(
            f"turns: expected matrices [2, {old_places.shape[0]}, {old_places.shape[1]}, {d}, {d}],"
            f" got {list(turns.matrices.shape)}"
        )
    page_bytes = [slices * side.size_bytes for side in new]
    at_once = min(len(pages), max(1, scratch_bytes // sum(page_bytes)))
    scratch = [
        torch.empty(at_once * size, dtype=torch.uint8, device=arena.device) for size in page_bytes
    ]
    pages = pages.contiguous()
    columns, tuning = page_blocks.shape[1], tuning or tuning_for(d)
    for first in range(0, len(pages), at_once):
        count = min(at_once, len(pages) - first)
        splits = min(count, -(-tuning.programs // slices))
        for which in SIDES:
            _code_launch(old[which], new[which], which, columns, tuning, has_ptx(arena.device))(
                (slices, splits, 1),
                arena, page_blocks, pages, old_places, turns.matrices, turns.scales, scratch[which],
                first, count, block_bytes,
            )  # fmt: skip
        for which in SIDES:
            _place_launch(new[which].size_bytes, which, columns)(
                (slices, count, 1),
                arena, page_blocks, pages, new_places, scratch[which], first, block_bytes,
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
def _place_launch(size: int, side: int, columns: int) -> Launch:
    block = int(triton.next_power_of_2(size // 8))
    return Launch(place_slices, SIDE=side, H=columns, SIZE=size, BLOCK=block)


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
