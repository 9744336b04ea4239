"""Small batches of extends over coded prefixes: what a launch makes of them, and what it should."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from spherical_kernels.codec.frames import LayerFrames, calibrated_frame, signed_hadamard
from spherical_kernels.codec.pages import encode_slices
from spherical_kernels.codec.patterns import PATTERNS, FrameKind, Pattern
from spherical_kernels.codec.slices import SliceLayout, slice_layout
from spherical_kernels.decode.reference import (
    AttentionState,
    CodedSide,
    attend_entries,
    empty_state,
)
from spherical_kernels.extend.launch import (
    FRAMES,
    ExtendWorkspace,
    Tuning,
    run_extend,
    tuning_for,
)
from spherical_kernels.extend.new_tokens import LOG2_E
from spherical_kernels.extend.reference import attend_new_tokens
from spherical_kernels.extend.tables import ExtendTables, build_tables, locate_entries
from spherical_kernels.testing import POISON, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOT = PATTERNS[0], PATTERNS[0]
HOT4 = PATTERNS[1], PATTERNS[1]
FINE = PATTERNS[8], PATTERNS[9]
WARM = PATTERNS[2], PATTERNS[3]
COLD = PATTERNS[5], PATTERNS[6]
THREE = PATTERNS[4], PATTERNS[4]
FROZEN = PATTERNS[7], PATTERNS[6]
UNCODED = Pattern(FrameKind.CALIBRATED, (4, 2, 2, 0)), PATTERNS[7]
DEFAULT = HOT, WARM, COLD
MAX_ERROR, RMS_ERROR = 2e-3, 5e-4  # of out, over its rms


@dataclass
class Request:
    """levels: of every page, in order; the last one has `partial` tokens, if not None."""

    levels: str
    new: int
    partial: int | None = None


@dataclass
class Case:
    """tiers: kinds of slices; kind_of [levels][kv_heads], at level i kind i if not given."""

    requests: list[Request]
    d: int = 64
    kv_heads: int = 1
    group: int = 4
    page_size: int = 64
    tiers: tuple[tuple[Pattern, Pattern], ...] = DEFAULT
    loudness: float = 1.0
    dtype: torch.dtype = torch.float32
    present: set[int] | None = None
    kind_of: tuple[tuple[int, ...], ...] = ()
    slices: list[list[torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.kind_of = self.kind_of or tuple((i,) * self.kv_heads for i in range(len(self.tiers)))
        self.rng = torch.Generator().manual_seed(self.d + self.group)
        self.scale = 0.8 * self.d**-0.5
        heads, d = self.kv_heads, self.d
        gain, spread = (self.normal(2, heads, d) / 2).exp().unbind()
        hot = signed_hadamard(d).expand(heads, d, d)
        self.matrices, duals = {FrameKind.HOT: hot}, []
        matrix, dual = calibrated_frame(gain, spread)
        self.matrices[FrameKind.CALIBRATED] = matrix
        duals = torch.stack([hot, dual])
        self.frames = LayerFrames.over(duals, duals, self.normal(heads, d), self.normal(heads, d))
        tokens = sum(request.new for request in self.requests)
        self.q = (self.normal(tokens, heads * self.group, d) * self.loudness).to(self.dtype)
        self.k, self.v = (self.normal(tokens, heads, d).to(self.dtype) for _ in range(2))
        self.levels = torch.tensor([int(c) for r in self.requests for c in r.levels]).long()
        self.sides = tuple(
            tuple(slice_layout(pattern, self.page_size, d) for pattern in tier)
            for tier in self.tiers
        )
        # slices[kind][side]: uint8 [pages, heads, size_bytes], for every page in every kind
        self.slices = [[self.encode(side, i) for i, side in enumerate(pair)] for pair in self.sides]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def encode(self, layout: SliceLayout, side: int) -> torch.Tensor:
        pages, heads = len(self.levels), self.kv_heads
        head = torch.arange(heads).repeat(pages)
        x = self.normal(pages * heads, self.page_size, self.d)
        x += self.normal(pages * heads, 1, self.d)
        centre = (self.frames.key_centre, self.frames.value_centre)[side]
        matrix = self.matrices[layout.pattern.frame]
        coded = encode_slices(layout, x, matrix[head], centre[head])
        return coded.view(pages, heads, layout.size_bytes)

    @property
    def prefixes(self) -> list[int]:
        return [
            len(r.levels) * self.page_size - (self.page_size - r.partial if r.partial else 0)
            for r in self.requests
        ]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        outs, lses, page, token = [], [], 0, 0
        for request, prefix in zip(self.requests, self.prefixes):
            part = slice(token, token + request.new)
            token += request.new
            rows = self.q[part].float().unflatten(1, (self.kv_heads, -1)).permute(1, 2, 0, 3)
            rows = rows * self.scale
            keys, values = (x[part].float().transpose(0, 1) for x in (self.k, self.v))
            state = attend_new_tokens(rows, keys, values)
            state = state.merge(self._prefix(rows.flatten(1, 2), page, prefix))
            page += len(request.levels)
            outs.append(state.out.unflatten(1, (-1, request.new)).permute(2, 0, 1, 3).flatten(1, 2))
            lses.append(state.lse.unflatten(1, (-1, request.new)).permute(2, 0, 1).flatten(1, 2))
        return torch.cat(outs), torch.cat(lses)

    def _prefix(self, rows: torch.Tensor, first: int, prefix: int) -> AttentionState:
        state = empty_state(rows)
        for index in range(-(-prefix // self.page_size)):
            page = first + index
            valid = min(self.page_size, prefix - index * self.page_size)
            for head, kind in enumerate(self.kind_of[int(self.levels[page])]):
                frame = FRAMES.index(self.sides[kind][0].pattern.frame)
                keys, values = (
                    CodedSide(layout, slices[page, head : head + 1], duals[frame], centre)
                    for layout, slices, duals, centre in (
                        (self.sides[kind][0], self.slices[kind][0],
                         self.frames.key_duals, self.frames.key_centre),
                        (self.sides[kind][1], self.slices[kind][1],
                         self.frames.value_duals, self.frames.value_centre),
                    )
                )  # fmt: skip
                row, tokens = torch.tensor([head]), torch.tensor([valid])
                state = state.merge(attend_entries(rows, keys, values, row, tokens))
        return state

    def arena(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Poisoned bytes with the slices, every page's on two blocks; page_blocks, places of
        one layer, block_bytes."""
        levels, heads = len(self.kind_of), self.kv_heads
        block_of = torch.zeros(levels, heads, 2, dtype=torch.int64)
        offset_of = torch.zeros_like(block_of)
        used = [[32, 32] for _ in range(levels)]
        for level, kinds in enumerate(self.kind_of):
            for head, kind in enumerate(kinds):
                for side, layout in enumerate(self.sides[kind]):
                    block = (head + side) % 2
                    block_of[level, head, side] = block
                    offset_of[level, head, side] = used[level][block]
                    used[level][block] += layout.size_bytes + 32
        block_bytes = max(max(two) for two in used)
        pages = len(self.levels)
        blocks = torch.randperm(2 * pages, generator=self.rng).view(pages, 2).int()
        memory = torch.full((max(1, 2 * pages) * block_bytes,), POISON, dtype=torch.uint8)
        for page, level in enumerate(self.levels.tolist()):
            for head in range(heads):
                for side in range(2):
                    at = int(blocks[page, block_of[level, head, side]]) * block_bytes
                    at += int(offset_of[level, head, side])
                    one = self.slices[self.kind_of[level][head]][side][page, head]
                    memory[at : at + len(one)] = one
        places = torch.stack((block_of, offset_of), -1).int().unsqueeze(1)
        return memory, blocks, places, block_bytes

    def tuning(self, tile_rows: int | None = None) -> Tuning:
        """What serving launches on this device; with other rows of a tile, the kernel that takes
        any."""
        best = tuning_for(self.d, self.page_size, torch.device(DEVICE))
        if tile_rows in (None, best.tile_rows):
            return best
        return replace(tuning_for(self.d), tile_rows=tile_rows)

    def tables(self, tile_rows: int | None = None, most_items: int = 3) -> ExtendTables:
        width = max(1, max(len(r.levels) for r in self.requests)) * self.page_size
        req_to_token = torch.full((len(self.requests) + 2, width), 1 << 30, dtype=torch.int32)
        slots = torch.arange(len(self.requests)).flip(0) + 1
        first = 0
        for slot, request in zip(slots.tolist(), self.requests):
            tokens = torch.arange(len(request.levels) * self.page_size).int()
            req_to_token[slot, : len(tokens)] = first * self.page_size + tokens
            first += len(request.levels)
        return build_tables(
            req_to_token.to(DEVICE), slots.to(DEVICE), self.levels.to(torch.uint8).to(DEVICE),
            self.prefixes, [r.new for r in self.requests], page_size=self.page_size,
            group=self.group, levels=len(self.kind_of),
            tile_rows=self.tuning(tile_rows).tile_rows, most_items=most_items,
            present=self.present or range(len(self.tiers)),
        )  # fmt: skip

    def actual(
        self, tile_rows: int | None = None, most_items: int = 3
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tables = self.tables(tile_rows, most_items)
        memory, blocks, places, block_bytes = self.arena()
        (entries,) = locate_entries(tables, blocks.to(DEVICE), places.to(DEVICE), block_bytes)
        joined = torch.cat([self.q, self.k, self.v], 1).to(DEVICE)  # as a model's layer has them
        q, k, v = joined.split([self.q.shape[1], self.k.shape[1], self.k.shape[1]], 1)
        names = "key_duals", "value_duals", "key_centre", "value_centre"
        frames = LayerFrames.over(*(getattr(self.frames, name).to(DEVICE) for name in names))
        work = ExtendWorkspace.allocate(
            tables, self.sides, q.shape[1], k.shape[1], q.device, q.dtype, self.tuning(tile_rows)
        )
        for buffer in vars(work).values():
            if isinstance(buffer, torch.Tensor):
                buffer.fill_(torch.nan)
        kind_of = torch.tensor(self.kind_of)
        ends = [
            torch.stack([(kind_of < kind).sum(0), (kind_of <= kind).sum(0)], -1)
            for kind in range(len(self.tiers))
        ]
        out, lse = run_extend(
            tables, q, k, v, memory.to(DEVICE).view(torch.int32), entries,
            torch.stack(ends).int().to(DEVICE), frames, self.scale, work,
        )  # fmt: skip
        return out.float().cpu(), lse.cpu() / LOG2_E

    def check(self, slack: float = 1.0, **cut: int) -> None:
        out, lse = self.actual(**cut)
        wanted, wanted_lse = self.expected()
        size = float(wanted.square().mean().sqrt())
        bounds = {"max_error": MAX_ERROR * slack * size, "rms_error": RMS_ERROR * slack * size}
        assert_close(out, wanted, **bounds, name="out")
        assert_close(lse, wanted_lse, max_error=2e-3 * slack, rms_error=1e-3 * slack, name="lse")
