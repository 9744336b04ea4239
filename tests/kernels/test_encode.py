"""New tokens coded into hot pages, against the codec, in Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

from spherical_kernels.codec.frames import signed_hadamard
from spherical_kernels.codec.pages import code_directions
from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import SliceLayout, pack_digits, slice_layout
from spherical_kernels.encode.launch import TUNING, NewTokens, encode_tokens, rotation_signs
from spherical_kernels.testing import POISON, poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE, HEADS, PAGES, SLOTS, GUARD = 64, 2, 4, 3, 32


class Pages:
    """A poisoned arena of hot pages in shuffled blocks, guards between the slices."""

    def __init__(self, d: int, bits: int) -> None:
        self.rng = torch.Generator().manual_seed(d + bits)
        self.layout: SliceLayout = slice_layout(PATTERNS[0 if bits == 8 else 1], PAGE, d)
        stride = self.layout.size_bytes + GUARD
        self.block_bytes = GUARD + stride * 2  # two slices in a block, but for the last
        order = torch.randperm(HEADS * 2, generator=self.rng)
        self.places = torch.stack([order // 2, GUARD + order % 2 * stride], 1)
        self.places = self.places.view(HEADS, 2, 2).int()
        blocks = torch.randperm(PAGES * SLOTS, generator=self.rng)
        self.page_blocks = blocks.view(PAGES, SLOTS).int()
        self.arena = poison(torch.empty(PAGES * SLOTS * self.block_bytes, dtype=torch.uint8))
        self.rotation = signed_hadamard(d)
        # of one layer of three
        self.centre = torch.randn(2, 3, HEADS, d, generator=self.rng)[:, 1]

    def encode(self, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **tuning: object) -> None:
        arena = self.arena.to(DEVICE)
        new = NewTokens(
            arena, self.page_blocks.to(DEVICE), loc.to(DEVICE), k.to(DEVICE), v.to(DEVICE),
            self.places.to(DEVICE), self.centre.to(DEVICE),
            rotation_signs(self.rotation).to(DEVICE), self.block_bytes, self.layout,
        )  # fmt: skip
        encode_tokens(new, **tuning)
        self.arena = arena.cpu()

    def address(self, page: int, head: int, side: int) -> int:
        slot, offset = self.places[head, side].tolist()
        return int(self.page_blocks[page, slot]) * self.block_bytes + offset

    def check(self, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Codes and radii agree with the codec's; no other byte was written."""
        (tile,), bits = self.layout.tiles, self.layout.pattern.bits[0]
        half = 2 ** (bits - 1) - 0.5
        rest = self.arena.clone()
        far = total = 0
        for side, x in enumerate((k, v)):
            y = (x.float() - self.centre[side]) @ self.rotation.T
            codes, radii = code_directions(y, bits)
            for i, at in enumerate(loc.tolist()):
                for head in range(HEADS):
                    start = self.address(at // PAGE, head, side)
                    row = start + tile.offset_bytes + at % PAGE * tile.row_bytes
                    radius = start + self.layout.radii_offset_bytes + at % PAGE * 2
                    rest[row : row + tile.row_bytes] = rest[radius : radius + 2] = POISON
                    if at < PAGE:
                        continue  # the sink holds one of many rows
                    found = self.arena[row : row + tile.row_bytes]
                    got = self.arena[radius : radius + 2].view(torch.float16).float()
                    wanted = radii[i, head].half().float()
                    if not torch.equal(got.nan_to_num(-1.0), wanted.nan_to_num(-1.0)):
                        assert float((got - wanted).abs()) <= float(wanted) * 2**-10, (i, head)
                    if torch.equal(found, pack_digits(codes[i, head], bits)):
                        total += codes.shape[-1]
                        continue
                    digits = found if bits == 8 else torch.cat([found & 15, found >> 4])
                    apart = digits.int() - codes[i, head].int()
                    assert int(apart.abs().max()) == 1, (i, head)
                    # both neighbours of a rounding edge are right: the value lies on it
                    level = y[i, head] / (y[i, head].abs().max() / half)
                    edge = (level - level.round()).abs()[apart != 0]
                    assert float(edge.max()) < 1e-3
                    far, total = far + int((apart != 0).sum()), total + apart.numel()
        assert far <= max(1, total // 1000)
        assert bool((rest == POISON).all())

    def tokens(self, n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(n, HEADS, self.layout.head_dim, generator=self.rng).to(dtype)

    def places_of(self, n: int) -> torch.Tensor:
        return PAGE + torch.randperm((PAGES - 1) * PAGE, generator=self.rng)[:n]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_agrees_with_the_codec(d: int, bits: int) -> None:
    pages = Pages(d, bits)
    loc, k, v = pages.places_of(9), pages.tokens(9), pages.tokens(9)
    pages.encode(loc, k, v)
    pages.check(loc, k, v)


@pytest.mark.parametrize("n", [1, TUNING.rows, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_number_of_tokens_and_dtype(n: int, dtype: torch.dtype) -> None:
    pages = Pages(64, 8)
    loc, k, v = pages.places_of(n), pages.tokens(n, dtype), pages.tokens(n, dtype)
    pages.encode(loc, k, v, tuning=TUNING)
    pages.check(loc, k, v)


def test_rows_out_of_a_wider_tensor() -> None:
    pages = Pages(64, 8)
    rows = torch.randn(7, 5 * HEADS * 64, generator=pages.rng)
    k = rows[:, HEADS * 64 : 2 * HEADS * 64].view(7, HEADS, 64)
    v = rows[:, 4 * HEADS * 64 :].view(7, HEADS, 64)
    loc = pages.places_of(7)
    pages.encode(loc, k, v)
    pages.check(loc, k, v)


def test_padded_rows_all_go_to_the_sink() -> None:
    pages = Pages(64, 8)
    loc, k, v = pages.places_of(6), pages.tokens(6), pages.tokens(6)
    loc[2:] = 0
    pages.encode(loc, k, v)
    pages.check(loc, k, v)


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_tiny_huge_and_broken_rows(bits: int) -> None:
    pages = Pages(128, bits)
    k, v = pages.tokens(8, torch.float32), pages.tokens(8, torch.float32)
    k[0] = pages.centre[0]  # a row of zeros
    k[1, :, 3] = 360.0
    k[2] *= 360.0
    k[3, 0, 5] = torch.nan
    k[4, 1, 6] = torch.inf
    v[5, :, :] = -torch.inf
    v[6] = pages.centre[1] + 1e-30
    v[7, 0] *= 1e6  # beyond float16: its radius is infinite
    loc = pages.places_of(8)
    pages.encode(loc, k, v)
    pages.check(loc, k, v)


@pytest.mark.parametrize("change", ["calibrated", "head_dim", "places"])
def test_says_what_it_expects(change: str) -> None:
    pages = Pages(64, 8)
    k = pages.tokens(2)
    if change == "calibrated":
        pages.layout = slice_layout(PATTERNS[2], PAGE, 64)
    elif change == "head_dim":
        pages.layout = slice_layout(PATTERNS[0], PAGE, 128)
    else:
        pages.places = pages.places[:1]
    with pytest.raises(ValueError, match="expected"):
        pages.encode(pages.places_of(2), k, k)


def test_only_signed_hadamard_rotations() -> None:
    for d in (64, 80, 96):
        signs = rotation_signs(signed_hadamard(d))
        assert torch.equal(signs.abs(), torch.full((d,), (d & -d) ** -0.5))
    with pytest.raises(ValueError, match="rotation"):
        rotation_signs(torch.eye(64))
