"""Decode attention over codes on a GPU: planned once per batch (plan/), run once per layer.

Three launches per layer: queries into the frames, beside the step's tokens into their pages; one
program per item and KV head; and the merge of the items with the way out of their frames. Nothing
is allocated and nothing waits for the device, so that the launches can be captured.
decode/reference.py says what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from ..codec.frames import LayerFrames, hadamard_block
from ..codec.patterns import BANDS, FrameKind
from ..codec.slices import SliceLayout
from ..device import Launch, has_dependent_launch, has_ptx, launch_options
from ..encode.launch import SMALL_TUNING, NewTokens
from ..encode.launch import kernel_constants as encode_constants
from ..plan.launch import PlanTables
from .framing import encode_and_frame, frame_queries
from .kernel import decode_pages
from .merge import merge_rows
from .operands import SIGNS
from .tables import key_tables, value_tables

FRAMES = (FrameKind.HOT, FrameKind.CALIBRATED)
"""Order of the frames in every table."""

SETS = 3
"""Forms of a query: in the hot frame, in the calibrated one by bands, in that one as a whole."""

LOG2_E = 1.4426950408889634
MOST_HEADS = 8
"""Query heads of a KV head that one program serves; more take more programs."""

SHARED_BYTES, RESERVED_BYTES = 228 << 10, 1 << 10
"""Shared memory of a multiprocessor, and what the system takes of it for every program."""

_LOADED = 4  # float32 numbers by a lane at once

MERGE_WARPS = 1
"""Of a program of `merge_rows`, so that none waits for another."""

LANE_NUMBERS, BESIDE = 128, 64
"""Of items, that a lane of the merge holds at once: in one tile, and in one of calibrated items
beside one of hot ones."""

FRAME_ROWS, FRAME_WARPS = 4, 1
"""Queries of a program of `frame_queries`, and its warps."""

Kind = tuple[SliceLayout, SliceLayout]
"""Layouts of the keys and of the values of a page."""


@dataclass(frozen=True)
class Tuning:
    """How the main kernel is launched.

    programs   per multiprocessor at once: how many items a plan should make
    stages     at most: pages of a kind in flight per program, but for one
    warps      per program
    registers  at most, per thread; None leaves it to the compiler
    """

    programs: int
    stages: int = 4
    warps: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class Merge:
    """How `merge_rows` is cut: a warp for every query head of a request.

    items  of the request that it holds at once, as far as registers go
    bands  of the output that it makes: all, or one
    """

    items: int
    bands: int = BANDS


MERGES = {
    1: Merge(64, bands=1),
    64: Merge(32),
    512: Merge(8),
    2048: Merge(4),
}
"""By the fewest pairs of a request and a KV head that they are for. The device runs as many items
whatever the batch: few pairs have more each, and leave more programs to be had."""


@dataclass(frozen=True)
class LayerPages:
    """Where the slices of one layer lie.

    arena        uint8, all slices
    page_blocks  int32 [num_pages, blocks of a page]
    places       int32 [levels, kv_heads, 2 (keys, values), 2]: block of the page, offset in bytes
    kind_of      int32 [levels, kv_heads], the kind of a head's slices
    block_bytes  of a block
    """

    arena: torch.Tensor
    page_blocks: torch.Tensor
    places: torch.Tensor
    kind_of: torch.Tensor
    block_bytes: int


@dataclass(frozen=True)
class DecodeWorkspace:
    """What a run writes between its launches, for any layer.

    parts        int8 [SETS, max_batch, heads, 2, d], queries in the key frames as integers
    units        float32 [SETS, max_batch, heads, BANDS], what an integer stands for
    near         float32 [max_batch, heads], q . centre
    partial      float32 [max_items, heads, d], in the value frames
    partial_lse  float32 [max_items, heads]
    """

    parts: torch.Tensor
    units: torch.Tensor
    near: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor

    @classmethod
    def allocate(
        cls, max_batch: int, max_items: int, heads: int, head_dim: int, device: torch.device | str
    ) -> DecodeWorkspace:
        """For `heads` query heads of this rank."""

        def table(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            table(SETS, max_batch, heads, 2, head_dim, dtype=torch.int8),
            table(SETS, max_batch, heads, BANDS), table(max_batch, heads),
            table(max_items, heads, head_dim), table(max_items, heads),
        )  # fmt: skip


def tuning_for(kinds: Sequence[Kind], group: int) -> Tuning:
    """The measured tuning for pages of these kinds."""
    wide = kinds[0][0].head_dim > 128
    return Tuning(programs=4 if wide else 8)


def wave_of(
    kinds: Sequence[Kind],
    group: int,
    kv_heads: int,
    multiprocessors: int,
    tuning: Tuning | None = None,
) -> int:
    """How many items the device runs at once."""
    tuning = tuning or tuning_for(kinds, group)
    programs = kv_heads * -(-group // MOST_HEADS)
    return max(1, tuning.programs * multiprocessors // programs)


def run_decode(
    tables: PlanTables,
    kinds: tuple[Kind, ...],
    q: torch.Tensor,
    pages: LayerPages,
    frames: LayerFrames,
    scale: float,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    lse: torch.Tensor,
    tuning: Tuning | None = None,
    new: NewTokens | None = None,
) -> None:
    """Attention of one layer over everything planned.

    kinds         layouts of every kind of slices; kind 0 is hot, level 0's alone, or all are
                  calibrated
    q             [batch, heads, d], contiguous but for the first dimension
    scale         the softmax scale
    out           [batch, heads, d] contiguous, and lse float32 [batch, heads] (natural log), are
                  written
    new           the step's tokens, to be coded before their pages are read
    """
    batch, heads, d = q.shape
    kv_heads = frames.key_centre.shape[0]
    _, max_batch, most_heads, _, _ = workspace.parts.shape
    if heads % kv_heads or heads != most_heads or batch > max_batch or q.stride()[1:] != (d, 1):
        raise ValueError(
            f"q: expected at most {max_batch} rows of {most_heads} heads over {kv_heads} KV heads, "
            f"each contiguous, got {list(q.shape)}, strides {q.stride()}"
        )
    group = heads // kv_heads
    tuning = tuning or tuning_for(kinds, group)
    pdl = has_dependent_launch(q.device)
    queries = workspace.parts, workspace.units
    framing = (
        q, frames.key_picks.channel, frames.key_picks.weight, frames.key_centre, *queries,
        workspace.near, batch, q.stride(0), kv_heads, max_batch * heads, scale * LOG2_E,
    )  # fmt: skip
    programs = -(-batch * group // FRAME_ROWS) * kv_heads * len(FRAMES)
    if new is None:
        _frame_launch(d, group, has_ptx(q.device), pdl)((programs, 1, 1), *framing)
    else:
        encoding = -(-len(new.k) // SMALL_TUNING.rows) * kv_heads * 2
        blocks = new.page_blocks.shape[1]
        _first_launch(new.layout, blocks, group, has_ptx(q.device), pdl)(
            (encoding + programs, 1, 1), *new.arguments, *framing, encoding
        )
    max_items, max_pages = len(tables.items), tables.pages.shape[1]
    _page_launch(kinds, group, tuning, has_ptx(q.device), pdl)(
        (kv_heads, -(-group // MOST_HEADS), max_items),
        SIGNS, pages.arena.view(torch.int8), tables.items, tables.pages, pages.page_blocks,
        pages.places, pages.kind_of,
        *queries, workspace.partial, workspace.partial_lse, max_pages,
        pages.page_blocks.shape[1], pages.block_bytes, pages.kind_of.stride(0), kv_heads,
        max_batch * heads,
    )  # fmt: skip
    merge = merge_of(batch * kv_heads)
    _merge_launch(kinds, merge, kv_heads, group, pdl)(
        (batch * kv_heads, BANDS // merge.bands, group),
        workspace.partial, workspace.partial_lse, tables.item_start,
        tables.hot_items, frames.value_picks.channel, frames.value_picks.weight,
        frames.value_centre, workspace.near, out, lse,
    )  # fmt: skip


@cache
def _frame_launch(head_dim: int, group: int, ptx: bool, pdl: bool) -> Launch:
    return Launch(
        frame_queries, **_tile(head_dim, group), ROWS=FRAME_ROWS, PTX=ptx, PDL=pdl,
        num_warps=FRAME_WARPS,
    )  # fmt: skip


@cache
def _first_launch(layout: SliceLayout, blocks: int, group: int, ptx: bool, pdl: bool) -> Launch:
    return Launch(
        encode_and_frame, **first_constants(layout, blocks, group), PTX=ptx, PDL=pdl,
        num_warps=FRAME_WARPS,
    )  # fmt: skip


@cache
def first_constants(layout: SliceLayout, blocks: int, group: int) -> dict[str, int]:
    """What `encode_and_frame` is specialised on: both of its parts take one warp a program."""
    coded = encode_constants(layout)
    own = {"CODED": coded["DP"], "H": blocks, "TOKENS": SMALL_TUNING.rows, "ROWS": FRAME_ROWS}
    return coded | own | _tile(layout.head_dim, group)


@cache
def _page_launch(
    kinds: tuple[Kind, ...], group: int, tuning: Tuning, ptx: bool, pdl: bool
) -> Launch:
    return Launch(
        decode_pages, **kernel_constants(kinds, group, tuning), PTX=ptx, PDL=pdl,
        num_warps=tuning.warps, maxnreg=tuning.registers, **launch_options(pdl),
    )  # fmt: skip


@cache
def _merge_launch(
    kinds: tuple[Kind, ...], merge: Merge, kv_heads: int, group: int, pdl: bool
) -> Launch:
    head_dim = kinds[0][0].head_dim
    return Launch(
        merge_rows, **merge_constants(merge, head_dim, kv_heads, group),
        HOT=not kinds[0][0].calibrated, CALIBRATED=kinds[-1][0].calibrated, PDL=pdl,
        num_warps=MERGE_WARPS, **launch_options(pdl),
    )  # fmt: skip


def _tile(head_dim: int, group: int) -> dict[str, int]:
    return {
        "D": head_dim,
        "DP": padded_dim(head_dim),
        "G": group,
        "HOT_BLOCK": hadamard_block(head_dim),
        "BAND_BLOCK": hadamard_block(head_dim // BANDS),
    }


def padded_dim(head_dim: int) -> int:
    """Channels of a tile: a product takes 16 of a band at least."""
    return max(16 * BANDS, _power_of_two(head_dim))


def merge_of(pairs: int) -> Merge:
    """How the merge for so many pairs of a request and a KV head is cut."""
    return MERGES[max(fewest for fewest in MERGES if fewest <= pairs)]


def merge_constants(merge: Merge, head_dim: int, kv_heads: int, group: int) -> dict[str, int]:
    """What `merge_rows` is specialised on, besides the frames."""
    row = padded_dim(head_dim)
    own = row * merge.bands // BANDS
    apart = merge.bands < BANDS or head_dim < row  # hot items are loaded on their own
    constants = {"KV_HEADS": kv_heads, "TAKEN": merge.bands}
    constants |= _rounds(merge.items, own, BESIDE if apart else LANE_NUMBERS)
    hot = _rounds(merge.items, row, LANE_NUMBERS)
    return _tile(head_dim, group) | constants | {f"HOT_{name}": n for name, n in hot.items()}


def _rounds(items: int, row: int, lane_numbers: int) -> dict[str, int]:
    """How many items of rows of so many channels each load of a warp takes, and how many loads."""
    items = min(items, 32 * lane_numbers // row)
    abreast = max(1, min(items, 32 * _LOADED // row))
    return {"ROUNDS": items // abreast, "ABREAST": abreast}


def _power_of_two(n: int) -> int:
    return int(triton.next_power_of_2(n))


@cache
def kernel_constants(kinds: tuple[Kind, ...], group: int, tuning: Tuning) -> dict[str, Any]:
    """What the main kernel is specialised on."""
    head_dim = kinds[0][0].head_dim
    return {
        "D": head_dim,
        "P": kinds[0][0].page_size,
        "G": group,
        "HEADS": 4 if group <= 4 else MOST_HEADS,
        "DP": max(16, _power_of_two(head_dim)),
        "KINDS": tuple(_constants(keys, values, tuning) for keys, values in kinds),
    }


def _constants(keys: SliceLayout, values: SliceLayout, tuning: Tuning) -> tuple[Any, ...]:
    fold = 2 if keys.band_width == 16 else 1  # tokens in a row
    value_tiles = tuple(
        (tile.offset_bytes // 2, fold * tile.row_bytes // 2) for tile in values.tiles
    )
    *sums, centroid_words = value_tables(values, fold)
    key_row = max(32, _power_of_two(keys.band_width))
    value_row = max(16, _power_of_two(max(words for _, words in value_tiles)))
    # what a page takes in shared memory: padded tiles, radii, centroids
    rows = keys.page_size // fold
    page = rows * (len(keys.tiles) * key_row + len(value_tiles) * 2 * value_row + 4 * fold)
    page += (1 if keys.head_dim > 64 else 16) * _power_of_two(keys.head_dim) + 64
    page += len(centroid_words) * 32 * value_row
    room = SHARED_BYTES // tuning.programs - RESERVED_BYTES
    if any(tile.runs > 1 for tile in keys.tiles):  # these codes change lanes through shared memory
        room -= keys.page_size * key_row
    return (
        keys.calibrated, keys.radii_offset_bytes // 2, key_row, value_row, *key_tables(keys),
        value_tiles, *sums, min(tuning.stages, max(2, 1 + room // page)),
        fold,
        centroid_words,
    )  # fmt: skip
