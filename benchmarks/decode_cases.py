"""Shapes and random pages for `run.py`: the decode kernel's inputs, and its reference's answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from spherical_kernels.codec.frames import LayerFrames, calibrated_frame, signed_hadamard
from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import SliceLayout, slice_layout
from spherical_kernels.decode.launch import (
    FRAMES,
    DecodeWorkspace,
    LayerPages,
    Tuning,
    run_decode,
    wave_of,
)
from spherical_kernels.decode.reference import (
    AttentionState,
    CodedSide,
    attend_entries,
    empty_state,
)
from spherical_kernels.plan.launch import PlanTables, most_items, page_costs, plan_pages
from spherical_kernels.testing import assert_close

PAGE = 64
Pair = tuple[int, int]
KINDS: Mapping[str, Pair] = {"hot": (0, 0), "warm": (2, 3), "cold": (5, 6)}
"""Patterns of keys and values of every kind of page."""
MAX_ERROR, RMS_ERROR = 4e-3, 1e-3  # of the output, over its rms
FEWEST_ROWS = 16  # that the size of a channel is taken of: of fewer it may be near zero
FEWEST_PAGES = 4
ENTRY_BYTES = 12  # what a page costs beside its slices: its id and its blocks, for every KV head


@dataclass(frozen=True)
class Shape:
    """Requests of equal length; `group` query heads per KV head."""

    batch: int
    context: int
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128

    @property
    def pages(self) -> int:
        """Of a request."""
        return -(-self.context // PAGE)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


SHAPES = {
    "16x32k": (Shape(16, 32768), ("warm", "hot", "cold", "mixed", "random", "heads")),
    "1x8k": (Shape(1, 8192), ("warm",)),
    "1x32k": (Shape(1, 32768), ("warm",)),
    "1x130k": (Shape(1, 131072), ("warm",)),
    "64x2k": (Shape(64, 2048), ("warm",)),
    "256x1k": (Shape(256, 1024), ("warm",)),
    "d64": (Shape(32, 32768, 8, 3, 64), ("warm", "hot", "cold")),
    "group8": (Shape(16, 32768, 8, 8), ("warm",)),
    "d256": (Shape(16, 16384, 8, 4, 256), ("warm",)),
}
"""With the tiers measured. mixed: the first page and the last four of a request are hot; random:
every page is of a random kind; heads: as mixed, but every other KV head is cold where its neighbour
is warm."""


class Batch:
    """Random pages on the GPU: the slices of a page adjacent, the pages in random order."""

    def __init__(
        self, shape: Shape, tier: str, layers: int = 1, kinds: Mapping[str, Pair] = KINDS
    ) -> None:
        """layers: that a page holds, as in a server; `self.pages` are the last one's."""
        self.shape, self.names = shape, list(kinds)
        torch.manual_seed(shape.context + shape.head_dim)
        d, heads = shape.head_dim, shape.kv_heads
        self.q = torch.randn(shape.batch, shape.heads, d, device="cuda").bfloat16()
        gain, spread = torch.randn(2, heads, d).exp().unbind()
        duals = torch.stack(
            [signed_hadamard(d).expand(heads, d, d), calibrated_frame(gain, spread)[1]]
        ).cuda()
        centre = torch.randn(2, heads, d, device="cuda")
        self.frames = LayerFrames.over(duals, duals, centre[0], centre[1])
        self.scale = 0.5 / math.sqrt(d)
        self.kinds = tuple(
            (slice_layout(PATTERNS[k], PAGE, d), slice_layout(PATTERNS[v], PAGE, d))
            for k, v in kinds.values()
        )
        kind_of = torch.arange(len(self.kinds), dtype=torch.int32).unsqueeze(1).repeat(1, heads)
        if tier == "heads":
            kind_of[1, 1::2] = 2
        self.kind_of = kind_of.tolist()  # [levels][kv_heads]
        sizes = torch.tensor([[side.size_bytes for side in kind] for kind in self.kinds])
        by_head = sizes[kind_of.long()]  # [levels, kv_heads, 2 (sides)]
        pairs = by_head.sum((1, 2)).tolist()
        self.costs = page_costs([pair / heads for pair in pairs], 2 * PAGE * d)
        self.level = self._levels(tier).flatten()  # of every page, request by request
        self.page_ids = torch.randperm(len(self.level), device="cuda")
        self.page_level = torch.empty(len(self.level), dtype=torch.uint8, device="cuda")
        self.page_level[self.page_ids] = self.level
        counts = torch.bincount(self.level.long(), minlength=len(pairs)).tolist()
        bytes_of = sum(n * pair for n, pair in zip(counts, pairs))
        self.bytes = bytes_of + ENTRY_BYTES * heads * len(self.level)
        layer_bytes = max(pair for pair, n in zip(pairs, counts) if n)
        block_bytes = layers * layer_bytes
        places = torch.zeros(len(pairs), heads, 2, 2, dtype=torch.int32)
        ends = by_head.flatten(1).cumsum(1).view_as(by_head)
        places[..., 1] = ends - by_head
        blocks = torch.arange(len(self.level), dtype=torch.int32, device="cuda").unsqueeze(1)
        size = len(self.level) * block_bytes
        arena = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
        self.pages = LayerPages(arena, blocks, places.cuda(), kind_of.cuda(), block_bytes)
        step = torch.tensor([0, layer_bytes], dtype=torch.int32)
        places_of = [(places + layer * step).cuda() for layer in range(layers)]
        self.layers: list[LayerPages] = []
        for layer in range(layers):
            self.pages = replace(self.pages, places=places_of[layer])
            for level, kinds in enumerate(self.kind_of):
                for head, kind in enumerate(kinds):
                    for side, layout in enumerate(self.kinds[kind]):
                        self._write_radii(layout, self._places(level, head, side))
            self.layers.append(self.pages)

    def _levels(self, tier: str) -> torch.Tensor:
        shape = self.shape.batch, self.shape.pages
        if tier == "random":
            return torch.randint(0, 3, shape, dtype=torch.uint8, device="cuda")
        level = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        if tier in ("mixed", "heads"):
            level[:, 1:-4] = 1
        else:
            level += self.names.index(tier)
        return level

    def _places(self, level: int, head: int, side: int) -> torch.Tensor:
        """Byte addresses of a head's slices in the pages of a level: int64 [pages]."""
        ids = (self.page_level == level).nonzero().flatten()
        return ids * self.pages.block_bytes + self.pages.places[level, head, side, 1]

    def _write_radii(self, layout: SliceLayout, places: torch.Tensor) -> None:
        """Radii that make values of about 1, and the header's scales."""
        if layout.calibrated:
            scales = torch.rand(len(places), layout.scales, device="cuda") * 0.5 + 0.5
            scales *= torch.tensor([0.5] + [0.01] * (layout.scales - 1), device="cuda")
            self._put(places + layout.scales_offset_bytes, scales.half())
        else:
            radii = torch.rand(len(places), PAGE, device="cuda") * 3 + 1
            radii *= layout.head_dim**-0.25 * 2.0**-8
            self._put(places + layout.radii_offset_bytes, radii.half())

    def _put(self, places: torch.Tensor, rows: torch.Tensor) -> None:
        rows = rows.view(torch.uint8).view(torch.int64)
        words = torch.arange(rows.shape[1], device="cuda")
        self.pages.arena.view(torch.int64)[(places // 8).unsqueeze(1) + words] = rows

    def plan(self, tuning: Tuning | None = None) -> Decode:
        """Everything a run takes, planned for a tuning."""
        return Decode(self, tuning)

    def expected(self, requests: list[int]) -> AttentionState:
        """The reference's attention of some requests."""
        shape, heads = self.shape, self.shape.kv_heads
        q = self.q[requests].float().view(-1, shape.group, shape.head_dim) * self.scale
        state = empty_state(q)
        for place, request in enumerate(requests):
            mine = slice(request * shape.pages, (request + 1) * shape.pages)
            for level, kinds in enumerate(self.kind_of):
                ids = self.page_ids[mine][self.level[mine] == level]
                for head, kind in enumerate(kinds):
                    for part in ids.split(2048):
                        row_of = torch.full_like(part, place * heads + head)
                        sides = [self._side(level, head, kind, side, part) for side in range(2)]
                        valid = torch.full_like(row_of, PAGE)
                        state = state.merge(attend_entries(q, *sides, row_of, valid))
        return state

    def _side(self, level: int, head: int, kind: int, side: int, ids: torch.Tensor) -> CodedSide:
        layout, frames = self.kinds[kind][side], self.frames
        places = ids * self.pages.block_bytes + self.pages.places[level, head, side, 1]
        offsets = torch.arange(layout.size_bytes, device="cuda")
        slices = self.pages.arena[places.unsqueeze(1) + offsets]
        duals = (frames.key_duals, frames.value_duals)[side]
        centre = (frames.key_centre, frames.value_centre)[side]
        return CodedSide(layout, slices, duals[FRAMES.index(layout.pattern.frame)], centre)


class Decode:
    """A batch planned for a tuning."""

    def __init__(self, batch: Batch, tuning: Tuning | None) -> None:
        self.batch, self.tuning, shape = batch, tuning, batch.shape
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        self.wave = wave_of(batch.kinds, shape.group, shape.kv_heads, processors, tuning)
        items = most_items(self.wave, shape.batch, len(batch.kinds))
        self.tables = PlanTables.allocate(
            shape.batch, shape.pages, batch.costs, items, torch.device("cuda")
        )
        self.workspace = DecodeWorkspace.allocate(
            shape.batch, items, shape.heads, shape.head_dim, "cuda"
        )
        ids = batch.page_ids.view(shape.batch, shape.pages, 1).int()
        self.table = (ids * PAGE + torch.arange(PAGE, device="cuda", dtype=torch.int32)).flatten(1)
        self.slots = torch.arange(shape.batch, device="cuda")
        self.lengths = torch.full_like(self.slots, shape.context)
        self.out = torch.empty_like(batch.q)
        self.lse = torch.empty(batch.q.shape[:2], dtype=torch.float32, device="cuda")
        self.plan()

    def plan(self) -> None:
        plan_pages(
            self.tables, self.table, self.slots, self.lengths, self.batch.page_level, PAGE,
            FEWEST_PAGES, self.wave,
        )  # fmt: skip

    def run(self, q: torch.Tensor | None = None, out: torch.Tensor | None = None) -> None:
        batch = self.batch
        q, out = batch.q if q is None else q, self.out if out is None else out
        run_decode(
            self.tables, batch.kinds, q, batch.pages, batch.frames, batch.scale, self.workspace,
            out, self.lse, self.tuning,
        )  # fmt: skip

    def check(self) -> tuple[float, float]:
        """Largest and rms error of a float32 output, over the larger of the number itself and the
        rms of its channel (channels differ as their frame does); raises where they are large."""
        shape = self.batch.shape
        requests = sorted({0, shape.batch // 2, shape.batch - 1})
        outs, wanted = [], []
        for _ in range(-(-FEWEST_ROWS // (len(requests) * shape.group))):
            self.batch.q.normal_()
            q = self.batch.q.float()
            out = torch.full_like(q, float("nan"))
            self.run(q, out)
            expected = self.batch.expected(requests)
            outs.append(out[requests])
            wanted.append(expected.out.view(len(requests), -1, shape.head_dim))
            wanted_lse = expected.lse.view(len(requests), -1)
            lse_bounds = {"max_error": 2e-3, "rms_error": 1e-3, "name": "lse"}
            assert_close(self.lse[requests], wanted_lse, **lse_bounds)
        whole = torch.cat(wanted)
        by_head = whole.unflatten(1, (shape.kv_heads, shape.group))
        size = by_head.square().mean((0, 2), keepdim=True).sqrt()
        size = size.expand_as(by_head).flatten(1, 2)
        error = (torch.cat(outs) - whole) / torch.maximum(whole.abs(), size)
        bounds = {"max_error": MAX_ERROR, "rms_error": RMS_ERROR}
        assert_close(error, torch.zeros_like(error), **bounds, name="out")
        return float(error.abs().max()), float(error.square().mean().sqrt())
