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
WARM = PATTERNS[2], PATTERNS[3]
COOL = PATTERNS[4], PATTERNS[4]
COLD = PATTERNS[5], PATTERNS[6]
Kinds = tuple[tuple[Pattern, Pattern], ...]


class Case:
    """Random pages of several kinds, in blocks of a poisoned arena.

    tokens  of every request by kind; whole pages but of kind 0
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
    ) -> None:
        self.page = page
        self.rng = torch.Generator().manual_seed(d + group)
        self.d, self.kv_heads, self.group, self.scale = d, kv_heads, group, 0.8 * d**-0.5
        self.lengths = [sum(of_request) for of_request in tokens]
        self.q = self.normal(len(tokens), kv_heads * group, d) * loudness
        gain, spread = self.normal(2, kv_heads, d).exp().unbind()
        hot = signed_hadamard(d).expand(kv_heads, d, d)
        matrix, dual = calibrated_frame(gain, spread)
        self.matrices = {FrameKind.HOT: hot, FrameKind.CALIBRATED: matrix}
        duals = torch.stack([hot, dual])
        self.frames = LayerFrames(duals, duals, self.normal(kv_heads, d), self.normal(kv_heads, d))
        self.kinds = tuple((slice_layout(k, page, d), slice_layout(v, page, d)) for k, v in kinds)
        # pages of a request in any order, but a partial one last
        self.levels: list[list[int]] = []
        for of_request in tokens:
            counts = [-(-n // self.page) for n in of_request]
            order = torch.tensor([kind for kind, n in enumerate(counts) for _ in range(n)])
            order = order[torch.randperm(len(order), generator=self.rng)].tolist()
            if of_request[0] % self.page:
                order.remove(0)
                order.append(0)
            self.levels.append([int(kind) for kind in order])
        self.slices = [self.encode_kind(kind) for kind in range(len(kinds))]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def pages_of(self, kind: int) -> list[tuple[int, int]]:
        """(request, place in it) of every page of a kind."""
        return [
            (request, place)
            for request, levels in enumerate(self.levels)
            for place, level in enumerate(levels)
            if level == kind
        ]

    def encode_kind(self, kind: int) -> list[torch.Tensor]:
        """Slices uint8 [pages * kv_heads, size_bytes] of keys and of values."""
        return [
            self.encode(layout, len(self.pages_of(kind)), i)
            for i, layout in enumerate(self.kinds[kind])
        ]

    def encode(self, layout: SliceLayout, pages: int, side: int) -> torch.Tensor:
        head = torch.arange(self.kv_heads).repeat(pages)
        x = self.normal(len(head), self.page, self.d) + self.normal(len(head), 1, self.d)
        centre = (self.frames.key_centre, self.frames.value_centre)[side]
        return encode_slices(layout, x, self.matrices[layout.pattern.frame][head], centre[head])

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q.reshape(-1, self.group, self.d) * self.scale
        state = empty_state(q)
        for kind, ((keys, values), slices) in enumerate(zip(self.kinds, self.slices)):
            frame = FRAMES.index(keys.pattern.frame)
            frames = self.frames
            sides = [
                CodedSide(keys, slices[0], frames.key_duals[frame], frames.key_centre),
                CodedSide(values, slices[1], frames.value_duals[frame], frames.value_centre),
            ]
            pages = self.pages_of(kind)
            request = torch.tensor([page[0] for page in pages]).long()
            valid = [min(self.page, self.lengths[i] - place * self.page) for i, place in pages]
            row_of = request.repeat_interleave(self.kv_heads) * self.kv_heads
            row_of += torch.arange(self.kv_heads).repeat(len(pages))
            valid = torch.tensor(valid).long().repeat_interleave(self.kv_heads)
            state = state.merge(attend_entries(q, *sides, row_of, valid))
        return state.out.view(self.q.shape), state.lse.view(self.q.shape[:2])

    def place_pages(self) -> tuple[LayerPages, list[list[int]], torch.Tensor]:
        """The arena and its tables; ids of the pages of every request; levels of all pages."""
        ids = (torch.randperm(sum(map(len, self.levels)), generator=self.rng) + 1).split(
            [len(levels) for levels in self.levels]
        )
        strides = [[side.size_bytes + GAP for side in kind] for kind in self.kinds]
        block_bytes = 32 + self.kv_heads * max(max(pair) for pair in strides)
        num_pages = 1 + sum(map(len, self.levels))
        blocks = torch.randperm(2 * num_pages, generator=self.rng).view(num_pages, 2)
        arena = torch.full((2 * num_pages, block_bytes), POISON, dtype=torch.uint8)
        places = torch.zeros(len(self.kinds), 3, self.kv_heads, 2, 2, dtype=torch.int32)
        page_level = torch.zeros(num_pages, dtype=torch.uint8)
        for kind in range(len(self.kinds)):
            for i, (request, place) in enumerate(self.pages_of(kind)):
                page = int(ids[request][place])
                page_level[page] = kind
                for side in range(2):
                    for head in range(self.kv_heads):
                        offset = 32 + head * strides[kind][side]
                        places[kind, 1, head, side] = torch.tensor([1 - side, offset])
                        one = self.slices[kind][side][i * self.kv_heads + head]
                        arena[blocks[page, 1 - side], offset : offset + len(one)] = one
        pages = LayerPages(
            arena.view(-1).to(DEVICE), blocks.int().to(DEVICE), places.to(DEVICE)[:, 1], block_bytes
        )
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
        max_items = (batch + 1) * len(self.kinds) + items
        tables = PlanTables.allocate(batch + 1, most, len(self.kinds), max_items, DEVICE)
        for name in ("items", "item_start", "hot_items", "pages"):
            poison(getattr(tables, name))
        lengths = torch.tensor(self.lengths, device=DEVICE)
        plan_pages(
            tables, table.to(DEVICE), torch.arange(batch, device=DEVICE), lengths,
            page_level.to(DEVICE), self.page, 1, max_items,
        )  # fmt: skip
        names = "key_duals", "value_duals", "key_centre", "value_centre"
        frames = LayerFrames(*(getattr(self.frames, name).to(DEVICE) for name in names))
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

    def check(self, slack: float = 1.0) -> None:
        """Errors are those of float16 weights, 2**-12 of each, and of 15-bit queries."""
        max_error, rms_error = 4e-3 * slack, 1e-3 * slack
        out, lse = self.actual()
        wanted, wanted_lse = self.expected()
        size = float(wanted.square().mean().sqrt())
        assert_close(
            out, wanted, max_error=max_error * size, rms_error=rms_error * size, name="out"
        )
        assert_close(lse, wanted_lse, max_error=2e-3 * slack, rms_error=1e-3 * slack, name="lse")
