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
SCALE = 0.1
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
        self.d, self.kv_heads, self.group = d, kv_heads, group
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
        q = self.q.reshape(self.rows, self.group, self.d) * SCALE
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
        out, lse = run_decode(plan, self.q.to(DEVICE), arena.to(DEVICE), places, frames, SCALE)
        return out.cpu(), lse.cpu()

    def check(self, max_error: float = 4e-3, rms_error: float = 1e-3) -> None:
        out, lse = self.actual()
        wanted, wanted_lse = self.expected()
        size = float(wanted.square().mean().sqrt())
        assert_close(
            out, wanted, max_error=max_error * size, rms_error=rms_error * size, name="out"
        )
        assert_close(lse, wanted_lse, max_error=2e-3, rms_error=1e-3, name="lse")


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("pair", [(HOT, HOT), WARM, COLD], ids=["hot", "warm", "cold"])
def test_one_tier(pair: tuple[Pattern, Pattern], d: int) -> None:
    Case({pair: [3 * PAGE, PAGE]}, d).check()
