"""Attention of new tokens over coded prefixes on a GPU, straight from the codes.

Per layer: dense attention among the new tokens, queries into the frames, one launch of the main
kernel for every kind of page, and a last kernel that joins shares of the prefix, takes the sums out
of their frames and merges all by their log-sum-exps. From the second on a launch starts before the
one before it ends (programmatic dependent launch), and waits for it where it must.
decode/reference.py and reference.py say what is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from ..codec.frames import LayerFrames
from ..codec.pages import GAUSSIAN_STEP
from ..codec.patterns import FrameKind
from ..codec.slices import SliceLayout
from ..device import Launch, has_dependent_launch, has_ptx, has_wgmma, launch_options
from .ends import finish_rows, frame_rows
from .kernel import extend_pages
from .new_tokens import LOG2_E, attend_new_tokens, columns_of
from .tables import ExtendTables

logger = logging.getLogger(__name__)

SHRUNK, UNITS = 8.0, 4096.0  # of operands (kernel.py)
_FRAME_ROWS = 64
_BLOCK_PAGES = 16  # whose centroids meet the queries together
FRAME_WARPS = 8

Kind = tuple[SliceLayout, SliceLayout]
"""Layouts of the keys and of the values of a page."""


FRAMES = (FrameKind.HOT, FrameKind.CALIBRATED)
"""Order of the frames in every table."""


@dataclass(frozen=True)
class Tuning:
    """How the main kernel is launched.

    tile_rows  rows of a tile, a power of two
    warps      per program
    stages     of the loop over pages, addresses read before pages: below 5 a page is asked for only
               when the one before it is done
    programs   per multiprocessor at once
    registers  at most, per thread; None leaves it to the compiler
    hopper     whether the main kernel is hopper.py's, for which tile_rows, warps (of each role) and
               programs are as in HOPPER_TUNING
    """

    tile_rows: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None
    hopper: bool = False


TUNING = Tuning(tile_rows=64, warps=4, stages=6, programs=2)
"""Of those measured it was within 9 % of the best from 64 to 32,768 rows."""

WIDE_TUNING = Tuning(tile_rows=128, warps=8, stages=6, programs=1)
"""For head dimensions above 128: pages fill most of a multiprocessor's shared memory, so that the
warps of its one program share them. Chosen by what the compiler says, not measured."""

HOPPER_TUNING = Tuning(tile_rows=128, warps=4, stages=4, programs=1, hopper=True)
"""Where `hopper_serves`. A multiprocessor's registers and shared memory are its one program's."""

HOPPER_TRITON = "3.6."
"""Releases that hopper.py is written for: Gluon is experimental, and 3.7 has other names."""

MULTIPROCESSORS = 132
"""Of the GPU that the tuning is for."""


def tuning_for(
    head_dim: int, page_size: int | None = None, device: torch.device | None = None
) -> Tuning:
    """Without page size and device: what runs everywhere."""
    if page_size is not None and device is not None and hopper_serves(head_dim, page_size, device):
        return HOPPER_TUNING
    return TUNING if head_dim <= 128 else WIDE_TUNING


@cache
def hopper_serves(head_dim: int, page_size: int, device: torch.device) -> bool:
    """Whether hopper.py's kernel reads such pages; everything else is kernel.py's."""
    if page_size != 64 or head_dim not in (64, 128) or not has_wgmma(device):
        return False
    fits = triton.__version__.startswith(HOPPER_TRITON)
    if not fits:
        message = "Triton %s: prefills use the kernel for all GPUs; Hopper's faster one needs %sx"
        logger.warning(message, triton.__version__, HOPPER_TRITON)
    return fits


@dataclass(frozen=True)
class PageReads:
    """The reads of all pages of one kind.

    launch          of extend_pages
    order           0: the earliest of all; 1: the first of its frame; 2: joins the others of it
    framed, scales, partial, logs  its parts of the workspace's
    """

    launch: Launch
    order: int
    framed: torch.Tensor
    scales: torch.Tensor
    partial: torch.Tensor
    logs: torch.Tensor


@dataclass(frozen=True)
class ExtendWorkspace:
    """What is the same for all layers of a forward pass: what launches are specialised on, and the
    memory between them.

    planes   frames of the pages present (places in FRAMES)
    framed   float16 [present, kv_heads, rows, columns], queries in the frames, at most 2**8
    scales   float32 [present, kv_heads, rows], what a unit of them stands for
    near     float32 [kv_heads, rows], q.centre, base 2
    partial  float32 [planes, items, kv_heads, tile_rows, columns], of every item, in its frame
    logs     float32 [planes, items, kv_heads, tile_rows], base 2, q.centre left out
    out      [tokens, heads, d], lse float32 [tokens, heads], base 2: the result, until the next
             layer's
    present  kinds that are read, four bits each, the first in the lowest
    frame    the launch of frame_rows
    pages    of every kind that is read
    finish   the launch of finish_rows
    """

    planes: tuple[int, ...]
    framed: torch.Tensor
    scales: torch.Tensor
    near: torch.Tensor
    partial: torch.Tensor
    logs: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    present: int
    frame: Launch
    pages: tuple[PageReads, ...]
    finish: Launch

    @classmethod
    def allocate(
        cls,
        tables: ExtendTables,
        kinds: tuple[Kind, ...],
        heads: int,
        kv_heads: int,
        device: torch.device,
        dtype: torch.dtype,
        tuning: Tuning,
    ) -> ExtendWorkspace:
        """For `heads` query heads of `dtype`; arguments as of `run_extend`."""
        d, group = kinds[0][0].head_dim, heads // kv_heads
        plane_of = {kind: FRAMES.index(kinds[kind][0].pattern.frame) for kind in tables.present}
        planes = tuple(sorted(set(plane_of.values())))
        rows, columns, items = tables.tokens * group, columns_of(d), len(tables.items)
        pdl, ptx = has_dependent_launch(device), has_ptx(device)
        f32: dict[str, Any] = {"dtype": torch.float32, "device": device}
        present = len(plane_of), kv_heads, rows
        framed = torch.empty(*present, columns, dtype=torch.float16, device=device)
        scales = torch.empty(present, **f32)
        partial = torch.empty(len(planes), items, kv_heads, tables.tile_rows, columns, **f32)
        logs = torch.empty(len(planes), items, kv_heads, tables.tile_rows, **f32)
        pages, started = [], set[int]()
        for i, (kind, plane) in enumerate(plane_of.items()):
            order, place = 2 if plane in started else min(i, 1), planes.index(plane)
            launch = _page_launch(
                kinds, kind, tables.levels, group, tables.tile_rows, tuning, ptx, pdl
            )
            mine = framed[i], scales[i], partial[place], logs[place]
            pages.append(PageReads(launch, order, *mine))
            started.add(plane)
        few = len(tables.tiles) * kv_heads <= MULTIPROCESSORS
        return cls(
            planes, framed, scales, torch.empty(kv_heads, rows, **f32), partial, logs,
            torch.empty(tables.tokens, heads, d, dtype=dtype, device=device),
            torch.empty(tables.tokens, heads, **f32),
            sum(kind << (4 * i) for i, kind in enumerate(plane_of)),
            _frame_launch(kinds, group, pdl), tuple(pages),
            _finish_launch(d, few, group, tables.tile_rows, planes, pdl),
        )  # fmt: skip


def run_extend(
    tables: ExtendTables,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    words: torch.Tensor,
    entries: torch.Tensor,
    levels: torch.Tensor,
    frames: LayerFrames,
    scale: float,
    workspace: ExtendWorkspace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one layer: of new tokens to their prefixes and to each other.

    q          [tokens, q_heads, d], request by request; k, v [tokens, kv_heads, d]; copied
               where their strides are not those of parts of one tensor [tokens, heads, d]
    words      int32, all slices: the arena
    entries    int64 [kv_heads, n, 2]: byte addresses of the slices of tables.pages in there
    levels     int32 [kinds, kv_heads, 2]: levels [first, end) at which a head has each kind
    scale      the softmax scale
    workspace  allocated for `tables`, the kinds of pages (kind 0, hot, first) and the tuning that
               `tables` were built for: its rows per tile, and as many items at once as
               MULTIPROCESSORS * programs // kv_heads
    Returns the workspace's out [tokens, q_heads, d] and lse.
    """
    tokens, heads, d = q.shape
    kv_heads = frames.key_centre.shape[0]
    if heads % kv_heads or tokens != tables.tokens or k.shape[:2] != (tokens, kv_heads):
        raise ValueError(
            f"q, k: expected {tables.tokens} tokens and a multiple of {kv_heads} query heads, got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    if q.stride()[1:] != (d, 1):
        q = q.contiguous()
    if k.stride()[1:] != (d, 1) or v.stride() != k.stride():
        k, v = k.contiguous(), v.contiguous()
    attend_new_tokens(tables, q, k, v, scale, workspace.out, workspace.lse)
    if tables.items.shape[0]:
        _frame(q, frames, scale, workspace)
        _attend_prefix(tables, words, entries, levels, workspace)
        _finish(tables, frames, workspace)
    return workspace.out, workspace.lse


def _frame(q: torch.Tensor, frames: LayerFrames, scale: float, work: ExtendWorkspace) -> None:
    kv_heads, rows = work.near.shape
    work.frame(
        (-(-rows // work.frame.constants["ROWS"]), kv_heads, len(work.pages)),
        q, frames.key_duals, frames.key_centre, work.framed, work.scales, work.near, q.shape[0],
        q.stride(0), kv_heads, scale * LOG2_E, work.present,
    )  # fmt: skip


def _attend_prefix(
    tables: ExtendTables,
    words: torch.Tensor,
    entries: torch.Tensor,
    levels: torch.Tensor,
    work: ExtendWorkspace,
) -> None:
    kv_heads, rows = work.near.shape
    grid, pages = (tables.items.shape[0], kv_heads, 1), entries.shape[1]
    for kind in work.pages:
        kind.launch(
            grid,
            words, entries, tables.items, tables.requests, tables.runs, levels, kind.framed,
            kind.scales, kind.partial, kind.logs, rows, pages, kind.order,
        )  # fmt: skip


def _finish(tables: ExtendTables, frames: LayerFrames, work: ExtendWorkspace) -> None:
    kv_heads, rows = work.near.shape
    parts = tables.tile_rows // work.finish.constants["ROWS"]
    work.finish(
        (tables.tiles.shape[0] * parts, kv_heads, 1),
        work.partial, work.logs, tables.tiles, tables.requests, frames.value_duals,
        frames.value_centre, work.near, work.out, work.lse, rows, tables.items.shape[0], kv_heads,
    )  # fmt: skip


@cache
def _frame_launch(kinds: tuple[Kind, ...], group: int, pdl: bool) -> Launch:
    constants = frame_constants([keys for keys, _ in kinds], group)
    return Launch(frame_rows, **constants, PDL=pdl, num_warps=FRAME_WARPS, **launch_options(pdl))


@cache
def _page_launch(
    kinds: tuple[Kind, ...], kind: int, levels: int, group: int, rows: int, tuning: Tuning,
    ptx: bool, pdl: bool,
) -> Launch:  # fmt: skip
    if tuning.hopper:
        from .hopper import extend_pages_hopper  # other Triton releases may not import it

        return Launch(
            extend_pages_hopper, **kernel_constants(*kinds[kind], group), M=rows, KIND=kind,
            LEVELS=levels, STAGES=tuning.stages, PDL=pdl, num_warps=tuning.warps,
            **launch_options(pdl),
        )  # fmt: skip
    return Launch(
        extend_pages, **kernel_constants(*kinds[kind], group), M=rows, KIND=kind, LEVELS=levels,
        STAGES=tuning.stages, PTX=ptx, PDL=pdl, num_warps=tuning.warps, maxnreg=tuning.registers,
        **launch_options(pdl),
    )  # fmt: skip


@cache
def _finish_launch(
    head_dim: int, few: bool, group: int, rows: int, planes: tuple[int, ...], pdl: bool
) -> Launch:
    constants, warps = finish_constants(head_dim, few)
    return Launch(
        finish_rows, **constants, G=group, M=rows, PLANES=planes, BANDS=_bands(planes),
        PDL=pdl, num_warps=warps, **launch_options(pdl),
    )  # fmt: skip


def finish_constants(head_dim: int, few: bool) -> tuple[dict[str, Any], int]:
    """What finish_rows is specialised on, but for the frames, and its warps. Few tiles wait for
    their splits, all columns at once; of many a block of columns, so that more programs fit."""
    columns = columns_of(head_dim)
    wide = columns > 128
    whole = few and not wide
    constants = {"D": head_dim, "DC": columns, "ROWS": 16 if whole else 32}
    constants["BLOCK"] = columns if whole else min(64, columns)
    return constants, 8 if whole or wide else 4


def _bands(planes: tuple[int, ...]) -> tuple[int, ...]:
    """Bands of frames of FRAMES."""
    return tuple((1, 4)[plane] for plane in planes)


def frame_constants(keys: Sequence[SliceLayout], group: int) -> dict[str, Any]:
    """What frame_rows is specialised on, for keys of these kinds. Frames come in blocks: with whole
    ones registers leave room for one program, and wide ones, in three terms, exceed shared memory.
    """
    columns = columns_of(keys[0].head_dim)
    wide = columns > 128
    return {
        "D": keys[0].head_dim, "DC": columns, "STEPS": tuple(steps_of_bands(side) for side in keys),
        "PLANES": tuple(FRAMES.index(side.pattern.frame) for side in keys), "G": group,
        "ROWS": _FRAME_ROWS // (2 if wide else 1), "BLOCK": 32,
    }  # fmt: skip


@cache
def kernel_constants(keys: SliceLayout, values: SliceLayout, group: int) -> dict[str, Any]:
    """What the main kernel is specialised on."""
    columns = columns_of(keys.head_dim)
    constants: dict[str, Any] = {
        "D": keys.head_dim,
        "DC": columns,
        "P": keys.page_size,
        "G": group,
        "W": columns // (4 * keys.bands),
        "WORDS": keys.band_width // 4,
        "CALIBRATED": keys.calibrated,
        "RADII": keys.radii_offset_bytes // 4,
        "BLOCK": _BLOCK_PAGES,
        "CB": tuple((0, 127.5, 1.0, band, 0, 8, 0, 0, 0, 0, 0, 0) for band in range(keys.bands)),
    }
    for name, side in (("K", keys), ("V", values)):
        constants |= {f"{name}T": _tiles(side), f"{name}B": _band_table(side)}
    constants["VS"] = steps_of_bands(values)
    constants["KC"] = tuple(1 / step for step in steps_of_bands(keys))
    constants["VC"] = tuple(1 / (step * UNITS) for step in steps_of_bands(values))
    return constants


def _tiles(layout: SliceLayout) -> tuple[tuple[int, int, int, int], ...]:
    return tuple(
        (tile.offset_bytes // 4, tile.row_bytes // 4, *_run(tile.runs, tile.row_bytes))
        for tile in layout.tiles
    )


def _run(runs: int, row_bytes: int) -> tuple[int, int]:
    return (8 // runs, row_bytes) if runs > 1 else (0, 0)


def _band_table(layout: SliceLayout) -> tuple[tuple[float, ...], ...]:
    """The constants BANDS that kernel.py describes."""
    table = []
    for band, bits in enumerate(layout.pattern.bits):
        digits = [
            (index, digit.byte_shift, digit.bits, digit.code_shift)
            for index, tile in enumerate(layout.tiles)
            for digit in tile.digits
            if digit.band == band
        ]
        digits += [(0, 0, 0, 0)] * (2 - len(digits))
        _, byte_shift, _, code_shift = digits[0]
        place = max(0, byte_shift - code_shift)
        factor = 2.0 ** (9 - place) / SHRUNK
        if layout.calibrated:
            factor = 2.0 ** (24 - place) / UNITS
        offset = (2**bits - 1) / 2
        table.append((place, offset, factor, *digits[0], *digits[1], int(layout.calibrated)))
    return tuple(table)


def steps_of_bands(layout: SliceLayout) -> tuple[float, ...]:
    """What the kernel's operands leave out, by band: the step of a radius of one unit."""
    if not layout.calibrated:
        return (1.0,)
    return tuple(GAUSSIAN_STEP[bits] or 1.0 for bits in layout.pattern.bits)
