"""Extending over coded prefixes against the references, in Triton's interpreter on a few pages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
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
from spherical_kernels.extend.launch import FRAMES, ExtendWorkspace, run_extend, tuning_for
from spherical_kernels.extend.reference import attend_new_tokens
from spherical_kernels.extend.tables import ExtendTables, build_tables, locate_entries
from spherical_kernels.testing import POISON, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOT = PATTERNS[0], PATTERNS[0]
HOT4 = PATTERNS[1], PATTERNS[1]
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

    def arena(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Poisoned bytes with the slices, every page's on two blocks; page_blocks, block_of,
        offset_of, block_bytes."""
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
        return memory, blocks, block_of, offset_of, block_bytes

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
            tile_rows=tile_rows or tuning_for(self.d).tile_rows, most_items=most_items,
            present=self.present or range(len(self.tiers)),
        )  # fmt: skip

    def actual(
        self, tile_rows: int | None = None, most_items: int = 3
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tables = self.tables(tile_rows, most_items)
        memory, *places, block_bytes = self.arena()
        places = [place.to(DEVICE) for place in places]
        entries = locate_entries(tables, *places, block_bytes)
        q, k, v = (x.to(DEVICE) for x in (self.q, self.k, self.v))
        names = "key_duals", "value_duals", "key_centre", "value_centre"
        frames = LayerFrames.over(*(getattr(self.frames, name).to(DEVICE) for name in names))
        tuning = replace(tuning_for(self.d), tile_rows=tables.tile_rows)
        work = ExtendWorkspace.allocate(
            tables, self.sides, q.shape[1], k.shape[1], memory.to(DEVICE).device, tuning
        )
        for buffer in (work.framed, work.scales, work.near, work.partial, work.lse):
            buffer.fill_(torch.nan)
        kind_of = torch.tensor(self.kind_of)
        ends = [
            torch.stack([(kind_of < kind).sum(0), (kind_of <= kind).sum(0)], -1)
            for kind in range(len(self.tiers))
        ]
        out, lse = run_extend(
            tables, q, k, v, memory.to(DEVICE), entries, torch.stack(ends).int().to(DEVICE), frames,
            self.scale, work,
        )  # fmt: skip
        return out.float().cpu(), lse.cpu()

    def check(self, slack: float = 1.0, **cut: int) -> None:
        out, lse = self.actual(**cut)
        wanted, wanted_lse = self.expected()
        size = float(wanted.square().mean().sqrt())
        bounds = {"max_error": MAX_ERROR * slack * size, "rms_error": RMS_ERROR * slack * size}
        assert_close(out, wanted, **bounds, name="out")
        assert_close(lse, wanted_lse, max_error=2e-3 * slack, rms_error=1e-3 * slack, name="lse")


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("level", ["0", "1", "2"], ids=["hot", "warm", "cold"])
def test_one_level(level: str, d: int) -> None:
    Case([Request(level * 3, 9)], d).check()


@pytest.mark.parametrize("d", [80, 96, 256])
def test_other_head_dims(d: int) -> None:
    Case([Request("0120", 5, partial=7)], d).check()


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_any_number_of_query_heads(group: int) -> None:
    Case([Request("0110", 9, partial=33)], group=group, kv_heads=2).check()


@pytest.mark.parametrize("page_size", [16, 32])
def test_other_page_sizes(page_size: int) -> None:
    Case([Request("01120", 9, partial=3)], page_size=page_size).check()


@pytest.mark.parametrize("tiers", [(HOT4, THREE), (HOT, FROZEN), (HOT, UNCODED), (HOT,)], ids=str)
def test_other_patterns(tiers: tuple[tuple[Pattern, Pattern], ...]) -> None:
    levels = "01100" if len(tiers) > 1 else "000"
    Case([Request(levels, 9, partial=20)], tiers=tiers).check()


def test_mixed_levels_of_several_requests() -> None:
    requests = [
        Request("0112201", 3),
        Request("", 19),
        Request("0", 1, partial=1),
        Request("11111110", 17, partial=63),
        Request("2102", 16),
    ]
    Case(requests, kv_heads=2, group=3).check(slack=2, most_items=9)  # few tokens: no averaging


def test_patterns_that_differ_between_heads() -> None:
    requests = [Request("0112201", 3), Request("3210", 5, partial=1), Request("2332", 16)]
    kind_of = (0, 0, 0), (1, 1, 1), (1, 2, 3), (2, 3, 3)
    tiers = HOT, WARM, THREE, COLD
    Case(requests, kv_heads=3, group=2, tiers=tiers, kind_of=kind_of).check(most_items=9)


@pytest.mark.parametrize("present", [{1, 2}, {2}, {0, 2}], ids=str)
def test_only_kinds_that_may_be_there_are_launched(present: set[int]) -> None:
    Case([Request("".join(map(str, present)) * 2, 5)], present=present).check()


def test_one_new_token() -> None:
    Case([Request("0120", 1, partial=40)]).check()


def test_no_prefix_at_all() -> None:
    Case([Request("", 70), Request("", 3)]).check()


@pytest.mark.parametrize(("tile_rows", "most_items"), [(64, 1), (64, 50), (128, 2)])
def test_any_cut(tile_rows: int, most_items: int) -> None:
    requests = [Request("01210", 33, partial=5), Request("12", 2)]
    Case(requests).check(tile_rows=tile_rows, most_items=most_items)


def test_more_pages_than_a_block_of_centroids() -> None:
    Case([Request("1" * 19, 6)], page_size=16).check(most_items=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_in_and_out(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    Case([Request("0110", 9, partial=2)], dtype=dtype).check(1 if dtype == torch.float16 else 6)


@pytest.mark.parametrize("loudness", [0.0, 1e-4, 10.0])
def test_flat_and_peaked_attention(loudness: float) -> None:
    Case([Request("0110", 9, partial=2)], loudness=loudness).check(max(1, loudness))


@pytest.mark.parametrize("valid", [1, 16, 63])
def test_bytes_of_tokens_that_do_not_exist_change_nothing(valid: int) -> None:
    case = Case([Request("10", 9, partial=valid)])
    before = case.actual()
    for layout, slices in zip(case.sides[0], case.slices[0]):
        (tile,) = layout.tiles
        radii = slices[1, :, layout.radii_offset_bytes : layout.radii_offset_bytes + 128]
        radii[..., 2 * valid :] = POISON  # float16 NaN
        slices[1, :, tile.offset_bytes + valid * tile.row_bytes :] = POISON
    for one, other in zip(before, case.actual()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("level", [0, 1])
def test_nan_in_a_radius_or_unit_shows(level: int) -> None:
    case = Case([Request(f"{level}" * 2, 3)])
    layout, slices = case.sides[level][1], case.slices[level][1]
    start = layout.scales_offset_bytes if layout.calibrated else layout.radii_offset_bytes
    slices[0, :, start : start + 2] = POISON
    assert bool(case.actual()[0].isnan().any())


def test_a_page_of_equal_tokens() -> None:
    """No spread: all radii are zero, the centroid says everything."""
    case = Case([Request("111", 5)])
    for side, layout in enumerate(case.sides[1]):
        centre = (case.frames.key_centre, case.frames.value_centre)[side]
        x = case.normal(1, 1, case.d).expand(1, 64, case.d)
        coded = encode_slices(layout, x, case.matrices[FrameKind.CALIBRATED], centre)
        case.slices[1][side][1] = coded
    case.check()
