"""Decode attention over codes on a GPU: planned once per batch, run once per layer.

Every program of the main kernel reads an *item*, consecutive entries (pages) of one row (request,
KV head) with one pair of patterns; the items of a row are merged by their log-sum-exp, those of
each frame after the inverse of their frame. decode/reference.py says what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from ..codec.patterns import FrameKind
from ..codec.slices import SliceLayout
from .kernel import decode_items, frame_queries, merge_items, unframe_sums

FRAMES = (FrameKind.HOT, FrameKind.CALIBRATED)
"""Order of the frames in every table."""

MAX_GROUP = 16
_LOG2_E = 1.4426950408889634
_FEWEST_PAGES = 4  # of an item: below, starting and merging cost more than reading
_OPERAND_BITS = 10  # a float16 is linear in its low 10 bits


@dataclass(frozen=True)
class Tuning:
    """How the main kernel is launched.

    items   programs wanted: as many as run at once, for long splits on few programs hide latency
    stages  pages in flight per program
    warps   per program
    registers  at most, per thread; None leaves it to the compiler
    """

    items: int
    stages: int
    warps: int
    registers: int | None = None


# Best of the sweeps in docs/kernels.md, for 132 multiprocessors: 4 or 8 programs on each.
HOT_TUNING = Tuning(items=528, stages=8, warps=1)
TUNING = Tuning(items=1056, stages=6, warps=1)
WIDE_TUNING = Tuning(items=528, stages=6, warps=2)


@dataclass(frozen=True)
class EntryGroup:
    """Entries with one pair of patterns, sorted by row.

    row_of  int64 [entries], row (request * kv_heads + head) of each entry
    valid   int64 [entries], tokens that exist, the first of the page; only the last entry of a row
            may have fewer than page_size
    """

    keys: SliceLayout
    values: SliceLayout
    row_of: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class ItemRange:
    """The items of one group: [first_item, first_item + num_items) of the plan's."""

    keys: SliceLayout
    values: SliceLayout
    first_item: int
    num_items: int


@dataclass(frozen=True)
class DecodePlan:
    """What a batch reads, the same for all layers.

    items      int32 [items, 4]: row, first entry of the group, end, valid tokens of the last entry
    row_items  int32 [items], items by row and frame
    row_start  int32 [rows * 2 + 1], where those of a (row, frame) start in row_items
    """

    rows: int
    ranges: tuple[ItemRange, ...]
    items: torch.Tensor
    row_items: torch.Tensor
    row_start: torch.Tensor
    tuning: Tuning


@dataclass(frozen=True)
class DecodeFrames:
    """The frames of one layer, float32 and contiguous.

    key_duals, value_duals      [2 (hot, calibrated), kv_heads, d, d], B of each frame
    key_centre, value_centre    [kv_heads, d]
    """

    key_duals: torch.Tensor
    value_duals: torch.Tensor
    key_centre: torch.Tensor
    value_centre: torch.Tensor


def tuning_for(keys: SliceLayout) -> Tuning:
    """The measured tuning for batches that mostly read pages like these."""
    if not keys.calibrated:
        return HOT_TUNING
    return WIDE_TUNING if keys.head_dim > 128 else TUNING


def plan_decode(groups: Sequence[EntryGroup], rows: int, tuning: Tuning = TUNING) -> DecodePlan:
    """Cuts the entries of every group into items of about equal length."""
    device = groups[0].row_of.device
    items, frames, ranges, done = [], [], [], 0
    counts = [torch.bincount(group.row_of, minlength=rows) for group in groups]
    pages = _pages_per_item(torch.cat(counts), tuning.items)
    for group, of_row in zip(groups, counts):
        found = _split_rows(group, of_row, pages)
        items.append(found)
        frame = FRAMES.index(group.keys.pattern.frame)
        frames.append(torch.full((len(found),), frame, device=device))
        ranges.append(ItemRange(group.keys, group.values, done, len(found)))
        done += len(found)
    table = torch.cat(items)
    place = table[:, 0] * len(FRAMES) + torch.cat(frames)
    order = torch.argsort(place, stable=True)
    start = torch.zeros(rows * len(FRAMES) + 1, dtype=torch.int64, device=device)
    start[1:] = torch.bincount(place, minlength=rows * len(FRAMES)).cumsum(0)
    return DecodePlan(rows, tuple(ranges), table.int(), order.int(), start.int(), tuning)


def _pages_per_item(counts: torch.Tensor, items: int) -> int:
    """The fewest entries per item that make no more than `items` of rows with `counts` entries."""
    high = max(1, int(counts.max()))
    low = min(_FEWEST_PAGES, high)
    while low < high:
        middle = (low + high) // 2
        if int(((counts + middle - 1) // middle).sum()) <= items:
            high = middle
        else:
            low = middle + 1
    return low


def _split_rows(group: EntryGroup, counts: torch.Tensor, pages: int) -> torch.Tensor:
    """Items int64 [n, 4] of a group with `counts` [rows] entries, at most `pages` in each."""
    row_of, valid, page_size = group.row_of, group.valid, group.keys.page_size
    if bool((row_of[1:] < row_of[:-1]).any()):
        raise ValueError("row_of: expected entries sorted by row")
    last_of_row = torch.ones_like(row_of, dtype=torch.bool)
    last_of_row[:-1] = row_of[1:] != row_of[:-1]
    if bool(((valid != page_size) & ~last_of_row).any()):
        raise ValueError("valid: only the last entry of a row may be a partial page")
    ends = counts.cumsum(0)
    splits = (counts + pages - 1) // pages
    row = torch.repeat_interleave(torch.arange(len(counts), device=row_of.device), splits)
    rank = torch.arange(len(row), device=row_of.device) - (splits.cumsum(0) - splits)[row]
    # equal shares: rank * count / splits, rounded down
    begin = (ends - counts)[row] + rank * counts[row] // splits[row]
    end = (ends - counts)[row] + (rank + 1) * counts[row] // splits[row]
    return torch.stack([row, begin, end, valid[end - 1]], 1)


def run_decode(
    plan: DecodePlan,
    q: torch.Tensor,
    arena: torch.Tensor,
    entries: Sequence[torch.Tensor],
    frames: DecodeFrames,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one layer over everything planned.

    q        [batch, heads, d]
    arena    uint8, all slices
    entries  of each group, int64 [entries, 2]: byte addresses of key and value slices in `arena`
    scale    the softmax scale
    Returns out [batch, heads, d] like q, lse float32 [batch, heads] (natural log).
    """
    batch, heads, d = q.shape
    kv_heads = frames.key_centre.shape[0]
    group = heads // kv_heads
    if heads % kv_heads or group > MAX_GROUP or batch * kv_heads != plan.rows:
        raise ValueError(
            f"q: expected {plan.rows} rows of at most {MAX_GROUP} heads per KV head, got "
            f"{list(q.shape)} over {kv_heads} KV heads"
        )
    device, width = q.device, max(16, _power_of_two(d))
    f32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    framed = torch.empty(len(FRAMES), batch, heads, d, **f32)
    near = torch.empty(batch, heads, **f32)
    partial = torch.empty(len(plan.items), 2, group, d, **f32)
    partial_lse = torch.empty(len(plan.items), group, **f32)
    merged = torch.empty_like(framed)
    out, lse = torch.empty_like(q), torch.empty(batch, heads, **f32)
    tile: dict[str, Any] = {"D": d, "DP": width, "G": group}
    blocks = {"ROWS": 16 if batch * group <= 16 else 32, "COLUMNS": min(width, 32)}
    grid = -(-batch * group // blocks["ROWS"]) * kv_heads, -(-d // blocks["COLUMNS"])
    frame_queries[*grid, len(FRAMES)](
        q.contiguous(), frames.key_duals, frames.key_centre, framed, near, batch, kv_heads,
        scale * _LOG2_E, **tile, **blocks,
    )  # fmt: skip
    words = arena.view(torch.int16)
    for part, addresses in zip(plan.ranges, entries, strict=True):
        frame = FRAMES.index(part.keys.pattern.frame)
        decode_items[(part.num_items,)](
            words, addresses, plan.items, framed[frame], partial, partial_lse, part.first_item,
            **kernel_constants(part.keys, part.values, group),
            STAGES=plan.tuning.stages, PTX=_has_ptx(device), num_warps=plan.tuning.warps,
            maxnreg=plan.tuning.registers,
        )  # fmt: skip
    merge_items[(batch * heads,)](
        partial, partial_lse, plan.row_items, plan.row_start, near, merged, lse, **tile, BLOCK=16,
        FRAMES=len(FRAMES),
    )  # fmt: skip
    unframe_sums[grid](
        merged, frames.value_duals, frames.value_centre, lse, out, batch, kv_heads,
        **tile, **blocks, FRAMES=len(FRAMES),
    )  # fmt: skip
    return out, lse


def _has_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


def _power_of_two(n: int) -> int:
    return int(triton.next_power_of_2(n))


@cache
def kernel_constants(keys: SliceLayout, values: SliceLayout, group: int) -> dict[str, Any]:
    """What the main kernel is specialised on."""
    sides = _Side.of(keys), _Side.of(values)
    # columns that a small group leaves empty take other bands of the same query heads
    slots = (4 if group <= 2 else 2 if group <= 4 else 1) if keys.calibrated else 1
    words = max(words for side in sides for _, words in side.tiles)
    constants: dict[str, Any] = {
        "D": keys.head_dim,
        "P": keys.page_size,
        "G": group,
        "GP": 8 if group <= 8 else 16,
        "SLOTS": slots,
        "W": max(16, _power_of_two(words)),
        "CW": max(16, _power_of_two(keys.head_dim // 2)),
        "CALIBRATED": keys.calibrated,
        "RADII": keys.radii_offset_bytes // 2,
    }
    for name, side in zip("KV", sides):
        named = {"T": side.tiles, "P": side.parts, "D": side.digits, "B": side.bands}
        constants |= {name + kind: table for kind, table in named.items()}
    return constants


@dataclass(frozen=True)
class _Side:
    """The constant tuples that kernel.py describes."""

    tiles: tuple[tuple[int, int], ...]
    parts: tuple[tuple[int, int, int], ...]
    digits: tuple[tuple[int, int, int, int, int], ...]
    bands: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, layout: SliceLayout) -> _Side:
        places = _places(layout)
        parts: list[tuple[int, int, int]] = []
        digits = []
        for index, tile in enumerate(layout.tiles):
            for digit in tile.digits:
                for run in range(tile.runs):
                    for half in (0, 1):
                        first = digit.band * layout.band_width + run * tile.row_bytes + half
                        part = digit.band, first, tile.row_bytes // 2
                        if part not in parts:
                            parts.append(part)
                        shift = digit.byte_shift + run * digit.bits + 8 * half
                        place = places[digit.band] + digit.code_shift
                        digits.append((index, parts.index(part), shift, digit.bits, place))
        bands = []
        for band, bits in enumerate(layout.pattern.bits):
            unit = 2.0 ** (places.get(band, 0) - 24)
            bands.append(((2**bits - 1) / 2 * unit, 1 / unit) if bits else (0.0, 0.0))
        tiles = tuple((tile.offset_bytes // 2, tile.row_bytes // 2) for tile in layout.tiles)
        return cls(tiles, tuple(parts), tuple(digits), tuple(bands))


def _places(layout: SliceLayout) -> dict[int, int]:
    """Bit at which each band's codes lie in the operand: where most digits need no shift."""
    places = {}
    for tile in layout.tiles:
        for digit in tile.digits:
            if digit.code_shift == 0:
                room = _OPERAND_BITS - layout.pattern.bits[digit.band]
                places[digit.band] = min(digit.byte_shift, room)
    return places
