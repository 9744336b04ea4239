"""Random pages for the decode kernel, and what its reference makes of them."""

from __future__ import annotations

import torch

from spherical_kernels.codec.frames import LayerFrames, calibrated_frame, signed_hadamard
from spherical_kernels.codec.pages import encode_slices
from spherical_kernels.codec.patterns import PATTERNS, FrameKind, Pattern
from spherical_kernels.codec.slices import SliceLayout, slice_layout
from spherical_kernels.decode.launch import (
    FRAMES,
    DecodeWorkspace,
    LayerPages,
    Tuning,
    run_decode,
)
from spherical_kernels.decode.reference import CodedSide, attend_entries, empty_state
from spherical_kernels.plan.launch import PlanTables, plan_pages
from spherical_kernels.testing import POISON, assert_close, poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE, GAP = 64, 64
HOT, HOT4 = (PATTERNS[0], PATTERNS[0]), (PATTERNS[1], PATTERNS[1])
FINE = PATTERNS[8], PATTERNS[9]
WARM = PATTERNS[2], PATTERNS[3]
COOL = PATTERNS[4], PATTERNS[4]
COLD = PATTERNS[5], PATTERNS[6]
FROZEN = PATTERNS[7], PATTERNS[6]
UNCODED = Pattern(FrameKind.CALIBRATED, (4, 2, 2, 0)), PATTERNS[7]
"""Keys without codes in a band, values with digits of one bit: no level has them."""

Kinds = tuple[tuple[Pattern, Pattern], ...]


class Case:
    """Random pages of several levels, in blocks of a poisoned arena.

    tokens   of every request by level; whole pages but of level 0
    kind_of  [levels][kv_heads], the kind of every head; at level i kind i if not given
    A page has two blocks, its keys in one and its values in the other; heads lie GAP bytes apart.
    """

    def __init__(
        self,
        kinds: Kinds,
        tokens: list[tuple[int, ...]],
        d: int,
        kv_heads: int = 1,
        group: int = 4,
        loudness: float = 1.0,
        page: int = PAGE,
        kind_of: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:
        self.page = page
        self.kind_of = kind_of or tuple((kind,) * kv_heads for kind in range(len(kinds)))
        self.rng = torch.Generator().manual_seed(d + group)
        self.d, self.kv_heads, self.group, self.scale = d, kv_heads, group, 0.8 * d**-0.5
        self.lengths = [sum(of_request) for of_request in tokens]
        self.q = self.normal(len(tokens), kv_heads * group, d) * loudness
        gain, spread = self.normal(2, kv_heads, d).exp().unbind()
        hot = signed_hadamard(d).expand(kv_heads, d, d)
        matrix, dual = calibrated_frame(gain, spread)
        self.matrices = {FrameKind.HOT: hot, FrameKind.CALIBRATED: matrix}
        duals = torch.stack([hot, dual])
        self.frames = LayerFrames.over(
            duals, duals, self.normal(kv_heads, d), self.normal(kv_heads, d)
        )
        self.kinds = tuple((slice_layout(k, page, d), slice_layout(v, page, d)) for k, v in kinds)
        # pages of a request in any order, but a partial one last
        self.levels: list[list[int]] = []
        for of_request in tokens:
            counts = [-(-n // self.page) for n in of_request]
            order = torch.tensor([level for level, n in enumerate(counts) for _ in range(n)])
            order = order[torch.randperm(len(order), generator=self.rng)].tolist()
            if of_request[0] % self.page:
                order.remove(0)
                order.append(0)
            self.levels.append([int(level) for level in order])
        self.slices = [self.encode_level(level) for level in range(len(self.kind_of))]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def pages_of(self, level: int) -> list[tuple[int, int]]:
        """(request, place in it) of every page of a level."""
        return [
            (request, place)
            for request, levels in enumerate(self.levels)
            for place, its in enumerate(levels)
            if its == level
        ]

    def encode_level(self, level: int) -> list[list[torch.Tensor]]:
        """Slices uint8 [pages, size_bytes] of keys and of values, by KV head."""
        pages = len(self.pages_of(level))
        return [
            [
                self.encode(self.kinds[kind][side], pages, side, head)
                for head, kind in enumerate(self.kind_of[level])
            ]
            for side in range(2)
        ]

    def encode(self, layout: SliceLayout, pages: int, side: int, head: int) -> torch.Tensor:
        x = self.normal(pages, self.page, self.d) + self.normal(pages, 1, self.d)
        centre = (self.frames.key_centre, self.frames.value_centre)[side][head]
        matrix = self.matrices[layout.pattern.frame][head]
        return encode_slices(layout, x, matrix.expand(pages, -1, -1), centre.expand(pages, -1))

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q.reshape(-1, self.group, self.d) * self.scale
        state = empty_state(q)
        for level, kinds in enumerate(self.kind_of):
            pages = self.pages_of(level)
            request = torch.tensor([page[0] for page in pages]).long()
            valid = [min(self.page, self.lengths[i] - place * self.page) for i, place in pages]
            for head, kind in enumerate(kinds):
                keys, values = self.kinds[kind]
                frame = FRAMES.index(keys.pattern.frame)
                frames, slices = self.frames, [side[head] for side in self.slices[level]]
                sides = [
                    CodedSide(keys, slices[0], frames.key_duals[frame], frames.key_centre),
                    CodedSide(values, slices[1], frames.value_duals[frame], frames.value_centre),
                ]
                row_of = request * self.kv_heads + head
                state = state.merge(attend_entries(q, *sides, row_of, torch.tensor(valid).long()))
        return state.out.view(self.q.shape), state.lse.view(self.q.shape[:2])

    def place_pages(self) -> tuple[LayerPages, list[list[int]], torch.Tensor]:
        """The arena and its tables; ids of the pages of every request; levels of all pages."""
        ids = (torch.randperm(sum(map(len, self.levels)), generator=self.rng) + 1).split(
            [len(levels) for levels in self.levels]
        )
        stride = max(side.size_bytes for kind in self.kinds for side in kind) + GAP
        block_bytes = 32 + self.kv_heads * stride
        num_pages = 1 + sum(map(len, self.levels))
        blocks = torch.randperm(2 * num_pages, generator=self.rng).view(num_pages, 2)
        arena = torch.full((2 * num_pages, block_bytes), POISON, dtype=torch.uint8)
        levels = len(self.kind_of)
        places = torch.zeros(levels, 3, self.kv_heads, 2, 2, dtype=torch.int32)
        kind_of = torch.full((levels, 3, self.kv_heads), POISON, dtype=torch.int32)
        kind_of[:, 1] = torch.tensor(self.kind_of)
        page_level = torch.zeros(num_pages, dtype=torch.uint8)
        for level in range(levels):
            for i, (request, place) in enumerate(self.pages_of(level)):
                page = int(ids[request][place])
                page_level[page] = level
                for side in range(2):
                    for head in range(self.kv_heads):
                        offset = 32 + head * stride
                        places[level, 1, head, side] = torch.tensor([1 - side, offset])
                        one = self.slices[level][side][head][i]
                        arena[blocks[page, 1 - side], offset : offset + len(one)] = one
        pages = LayerPages(
            arena.view(-1).to(DEVICE), blocks.int().to(DEVICE), places.to(DEVICE)[:, 1],
            kind_of.to(DEVICE)[:, 1], block_bytes,
        )  # fmt: skip
        return pages, [mine.tolist() for mine in ids], page_level

    def actual(self, items: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """What the kernel makes of it, with `items` more than the least, in a larger batch's
        tables."""
        pages, ids, page_level = self.place_pages()
        batch, most = len(self.levels), max(map(len, self.levels)) + 2
        table = torch.zeros(batch, most * self.page, dtype=torch.int32)
        for row, mine in zip(table, ids):
            loc = torch.tensor(mine).long().unsqueeze(1) * self.page + torch.arange(self.page)
            row[: loc.numel()] = loc.flatten().int()
        levels = len(self.kind_of)
        max_items = (batch + 1) * levels + items
        tables = PlanTables.allocate(batch + 1, most, [1.0] * levels, max_items, DEVICE)
        for name in ("items", "item_start", "hot_items", "pages"):
            poison(getattr(tables, name))
        lengths = torch.tensor(self.lengths, device=DEVICE)
        plan_pages(
            tables, table.to(DEVICE), torch.arange(batch, device=DEVICE), lengths,
            page_level.to(DEVICE), self.page, 1, max_items,
        )  # fmt: skip
        names = "key_duals", "value_duals", "key_centre", "value_centre"
        frames = LayerFrames.over(*(getattr(self.frames, name).to(DEVICE) for name in names))
        q = self.q.to(DEVICE)
        workspace = DecodeWorkspace.allocate(batch + 1, max_items, q.shape[1], self.d, DEVICE)
        out, lse = (
            torch.empty(q.shape, dtype=q.dtype, device=DEVICE),
            torch.empty(q.shape[:2], device=DEVICE),
        )
        for tensor in (*vars(workspace).values(), out, lse):
            poison(tensor)
        run_decode(
            tables, self.kinds, q, pages, frames, self.scale, workspace, out, lse,
            Tuning(programs=1, stages=2),
        )  # fmt: skip
        return out.cpu(), lse.cpu()

    def check(self, slack: float = 1.0, items: int = 3) -> None:
        """Errors are those of float16 weights, 2**-12 of each, and of 16-bit queries."""
        max_error, rms_error = 4e-3 * slack, 1e-3 * slack
        out, lse = self.actual(items)
        wanted, wanted_lse = self.expected()
        size = float(wanted.square().mean().sqrt())
        assert_close(
            out, wanted, max_error=max_error * size, rms_error=rms_error * size, name="out"
        )
        assert_close(lse, wanted_lse, max_error=2e-3 * slack, rms_error=1e-3 * slack, name="lse")
