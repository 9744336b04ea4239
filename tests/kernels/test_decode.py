"""The decode kernel against its reference, in Triton's interpreter on shapes of a few pages."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from spherical_kernels.codec.frames import calibrated_frame, signed_hadamard
from spherical_kernels.codec.pages import encode_slices
from spherical_kernels.codec.patterns import PATTERNS, FrameKind, Pattern
from spherical_kernels.codec.slices import SliceLayout, slice_layout
from spherical_kernels.decode.launch import (
    FRAMES,
    DecodeFrames,
    EntryGroup,
    Tuning,
    plan_decode,
    run_decode,
)
from spherical_kernels.decode.reference import CodedSide, attend_entries, empty_state
from spherical_kernels.testing import POISON, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 64
HOT, HOT4 = PATTERNS[0], PATTERNS[1]
WARM = PATTERNS[2], PATTERNS[3]
COLD = PATTERNS[5], PATTERNS[6]


class Case:
    """Random pages of several pattern pairs, with gaps of poison between the slices.

    lengths  tokens of every row by pair of patterns: {(keys, values): [rows]}
    """

    def __init__(
        self,
        lengths: dict[tuple[Pattern, Pattern], list[int]],
        d: int,
        kv_heads: int = 1,
        group: int = 4,
        loudness: float = 1.0,
    ) -> None:
        self.rng = torch.Generator().manual_seed(d + group)
        self.d, self.kv_heads, self.group, self.scale = d, kv_heads, group, 0.8 * d**-0.5
        self.rows = len(next(iter(lengths.values())))
        self.q = self.normal(self.rows // kv_heads, kv_heads * group, d) * loudness
        gain, spread = self.normal(2, kv_heads, d).exp().unbind()
        hot = signed_hadamard(d).expand(kv_heads, d, d)
        matrix, dual = calibrated_frame(gain, spread)
        self.matrices = {FrameKind.HOT: hot, FrameKind.CALIBRATED: matrix}
        duals = torch.stack([hot, dual])
        self.frames = DecodeFrames(duals, duals, self.normal(kv_heads, d), self.normal(kv_heads, d))
        self.groups, self.slices = [], []
        for (keys, values), of_row in lengths.items():
            pages = torch.tensor(of_row).add(PAGE - 1).div(PAGE, rounding_mode="floor")
            row_of = torch.repeat_interleave(torch.arange(self.rows), pages)
            valid = torch.full((len(row_of),), PAGE)
            valid[pages.cumsum(0)[pages > 0] - 1] = (torch.tensor(of_row)[pages > 0] - 1) % PAGE + 1
            sides = slice_layout(keys, PAGE, d), slice_layout(values, PAGE, d)
            self.groups.append(EntryGroup(*sides, row_of, valid))
            self.slices.append(
                [self.encode(side, row_of % kv_heads, i) for i, side in enumerate(sides)]
            )

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def encode(self, layout: SliceLayout, head: torch.Tensor, side: int) -> torch.Tensor:
        x = self.normal(len(head), PAGE, self.d) + self.normal(len(head), 1, self.d)
        centre = (self.frames.key_centre, self.frames.value_centre)[side]
        return encode_slices(layout, x, self.matrices[layout.pattern.frame][head], centre[head])

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q.reshape(self.rows, self.group, self.d) * self.scale
        state = empty_state(q)
        for group, (keys, values) in zip(self.groups, self.slices):
            frame = FRAMES.index(group.keys.pattern.frame)
            sides = [
                CodedSide(layout, slices, duals[frame], centre)
                for layout, slices, duals, centre in (
                    (group.keys, keys, self.frames.key_duals, self.frames.key_centre),
                    (group.values, values, self.frames.value_duals, self.frames.value_centre),
                )
            ]
            state = state.merge(attend_entries(q, *sides, group.row_of, group.valid))
        shape = self.q.shape
        return state.out.view(shape), state.lse.view(shape[:2])

    def actual(self, items: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """What the kernel makes of the slices, scattered over a poisoned arena."""
        total = sum(prod(s.shape) + 64 * len(s) for pair in self.slices for s in pair)
        arena = torch.full((total,), POISON, dtype=torch.uint8)
        places, at = [], 0
        for pair in self.slices:
            columns = []
            for slices in pair:
                stride = slices.shape[1] + 64
                order = torch.randperm(len(slices), generator=self.rng)
                columns.append(at + 32 + order * stride)
                for slot, one in zip(columns[-1].tolist(), slices):
                    arena[slot : slot + len(one)] = one
                at += stride * len(slices)
            places.append(torch.stack(columns, 1).to(DEVICE))
        plan = plan_decode(
            [replace(g, row_of=g.row_of.to(DEVICE), valid=g.valid.to(DEVICE)) for g in self.groups],
            self.rows,
            Tuning(items=items, stages=2, warps=1),
        )
        names = "key_duals", "value_duals", "key_centre", "value_centre"
        frames = DecodeFrames(*(getattr(self.frames, name).to(DEVICE) for name in names))
        out, lse = run_decode(plan, self.q.to(DEVICE), arena.to(DEVICE), places, frames, self.scale)
        return out.cpu(), lse.cpu()

    def check(self, slack: float = 1.0) -> None:
        """Errors are those of float16 queries and weights: 2**-12 of each, on logits of about 1."""
        max_error, rms_error = 4e-3 * slack, 1e-3 * slack
        out, lse = self.actual()
        wanted, wanted_lse = self.expected()
        size = float(wanted.square().mean().sqrt())
        assert_close(
            out, wanted, max_error=max_error * size, rms_error=rms_error * size, name="out"
        )
        assert_close(lse, wanted_lse, max_error=2e-3 * slack, rms_error=1e-3 * slack, name="lse")


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("pair", [(HOT, HOT), WARM, COLD], ids=["hot", "warm", "cold"])
def test_one_tier(pair: tuple[Pattern, Pattern], d: int) -> None:
    Case({pair: [3 * PAGE, PAGE]}, d).check()


@pytest.mark.parametrize("d", [80, 96, 256])
def test_other_head_dims(d: int) -> None:
    Case({WARM: [2 * PAGE], (HOT, HOT): [PAGE + 7]}, d).check()


@pytest.mark.parametrize("group", [1, 2, 3, 8, 9, 16])
def test_any_number_of_query_heads(group: int) -> None:
    Case({WARM: [PAGE, 2 * PAGE], (HOT, HOT): [5, PAGE]}, 64, group=group).check()


def test_tiers_and_frames_merge_over_requests_and_heads() -> None:
    lengths = {
        (HOT, HOT): [PAGE, 1, 2 * PAGE + 3, 17],
        WARM: [2 * PAGE, 0, 4 * PAGE, 0],
        COLD: [0, 3 * PAGE, PAGE, 0],
        (PATTERNS[2], PATTERNS[6]): [PAGE, 0, 0, 0],
        (HOT4, HOT4): [0, 0, PAGE, 0],
    }
    Case(lengths, 64, kv_heads=2, group=3).check()


def test_a_row_without_pages_has_no_attention() -> None:
    case = Case({WARM: [PAGE, 0]}, 64)
    out, lse = case.actual()
    assert bool((out[1] == 0).all()) and bool((lse[1] == -torch.inf).all())
    case.check()


@pytest.mark.parametrize("valid", [1, 16, PAGE - 1])
def test_bytes_of_tokens_that_do_not_exist_change_nothing(valid: int) -> None:
    case = Case({(HOT, HOT): [PAGE + valid]}, 64)
    before = case.actual()
    for layout, slices in zip((case.groups[0].keys, case.groups[0].values), case.slices[0]):
        (tile,) = layout.tiles
        radii = slices[:, layout.radii_offset_bytes : layout.radii_offset_bytes + 2 * PAGE]
        radii[-1, 2 * valid :] = POISON  # float16 NaN
        slices[-1, tile.offset_bytes + valid * tile.row_bytes :] = POISON
    for one, other in zip(before, case.actual()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pair", [(HOT, HOT), WARM], ids=["hot", "warm"])
def test_nan_in_a_radius_or_scale_shows(pair: tuple[Pattern, Pattern]) -> None:
    case = Case({pair: [2 * PAGE]}, 64)
    layout, slices = case.groups[0].values, case.slices[0][1]
    start = layout.scales_offset_bytes if layout.calibrated else layout.radii_offset_bytes
    slices[0, start : start + 2] = POISON
    assert bool(case.actual()[0].isnan().any())


@pytest.mark.parametrize("loudness", [0.0, 1e-4, 10.0])
def test_flat_and_peaked_attention(loudness: float) -> None:
    Case({WARM: [3 * PAGE], (HOT, HOT): [PAGE]}, 64, loudness=loudness).check(max(1, 2 * loudness))


@pytest.mark.parametrize("pair", [(HOT, HOT), WARM], ids=["hot", "warm"])
def test_values_from_tiny_to_huge(pair: tuple[Pattern, Pattern]) -> None:
    """Radii of a page lie 2**10 above those of the page before it, then as far below."""
    case = Case({pair: [5 * PAGE]}, 64)
    layout, slices = case.groups[0].values, case.slices[0][1]
    factors = torch.tensor([2.0**-8, 4.0, 2.0**12, 1.0, 2.0**-10]).half()
    if layout.calibrated:
        at, count = layout.scales_offset_bytes, 5
    else:
        at, count = layout.radii_offset_bytes, PAGE
    slices[:, at : at + 2 * count].view(torch.float16).mul_(factors.unsqueeze(1))
    case.check()


def test_entries_out_of_order_are_refused() -> None:
    case = Case({WARM: [PAGE, PAGE]}, 64)
    group = case.groups[0]
    with pytest.raises(ValueError, match="sorted by row"):
        plan_decode([replace(group, row_of=group.row_of.flip(0))], 2)
    with pytest.raises(ValueError, match="partial page"):
        short = replace(group, row_of=torch.zeros(2).long(), valid=torch.tensor([3, PAGE]))
        plan_decode([short], 2)


def test_items_of_a_plan_cover_every_entry_once() -> None:
    counts = torch.tensor([0, 1, 37, 4, 120])
    row_of = torch.repeat_interleave(torch.arange(5), counts)
    layouts = [slice_layout(p, PAGE, 64) for p in WARM]
    group = EntryGroup(layouts[0], layouts[1], row_of, torch.full((len(row_of),), PAGE))
    for items in (1, 4, 16, 1000):
        plan = plan_decode([group], 5, Tuning(items, 2, 1))
        assert len(plan.items) <= max(items, 4)
        covered = torch.cat([torch.arange(a, b) for _, a, b, _ in plan.items.tolist()])
        assert torch.equal(covered.sort().values, torch.arange(len(row_of)))
        assert all(bool((row_of[a:b] == row).all()) for row, a, b, _ in plan.items.tolist())
