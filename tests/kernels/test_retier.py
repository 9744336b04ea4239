"""Pages re-encoded by the kernel, against the pool's re-tiering in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_spherical.pool.arena import Arena
from sglang_spherical.pool.assignment import Assignment
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import Level, PageLayout
from sglang_spherical.pool.retier import lower_pages
from spherical_kernels.codec.frames import calibrated_frame
from spherical_kernels.codec.pages import decode_slices, encode_slices
from spherical_kernels.codec.patterns import PATTERN_ID, PATTERNS, FrameKind, Pattern
from spherical_kernels.codec.radii import unpack_radii
from spherical_kernels.codec.slices import SliceLayout, read_codes
from spherical_kernels.retier.launch import Moves, Turns, reencode_pages
from spherical_kernels.testing import POISON, poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, HEADS, PAGES = 2, 1, 2
HOT, HOT4 = PATTERNS[0], PATTERNS[1]
FINE = Level("warm", PATTERNS[8], PATTERNS[9])
WARM = Level("warm", PATTERNS[2], PATTERNS[3])
MIDDLE = Level("warm", PATTERNS[4], PATTERNS[4])
COLD = Level("cold", PATTERNS[5], PATTERNS[6])
FROZEN = Level("frozen", PATTERNS[7], PATTERNS[6])
UNCODED = Level("cold", Pattern(FrameKind.CALIBRATED, (4, 2, 2, 0)), PATTERNS[6])
ON_AN_EDGE = 2e-3
"""Share of codes, radii and centroid codes that may fall on the other side of a rounding edge."""


class Case:
    """A poisoned arena with pages at the first of two levels, and frames of random heads.

    kinds  of both layers at both levels, if not their levels' own: places among hot, old, new
    """

    def __init__(
        self,
        d: int,
        old: Level,
        new: Level,
        page_size: int = 64,
        kinds: tuple[tuple[int, int], tuple[int, int]] | None = None,
    ) -> None:
        self.rng = torch.Generator().manual_seed(d)
        hot = Level("hot", HOT, HOT)
        levels = (hot, old, new) if old.keys.frame is FrameKind.CALIBRATED else (old, new)
        self.old, self.new = len(levels) - 2, len(levels) - 1
        self.layout = PageLayout.fit(page_size, d, LAYERS, HEADS, levels)
        if kinds is not None:
            pairs = tuple(level.pair for level in levels)
            self.layout = self.layout.with_kinds(Assignment(pairs, ((0, 0), *kinds)))
        blocks = PAGES * self.layout.hot_blocks
        self.arena = Arena(self.layout, blocks, 1 + PAGES, "cpu")
        poison(self.arena.bytes)
        self.frames = Frames(LAYERS, HEADS, d, page_size, "cpu")
        self.frames.calibrated = True
        self.frames.centre.normal_(generator=self.rng)
        shape = LAYERS * HEADS, d
        self.spread = torch.randn(2, *shape, generator=self.rng).exp() * 0.7
        for side in range(2):
            gain = torch.randn(*shape, generator=self.rng).exp()
            matrix, dual = calibrated_frame(gain, self.spread[side])
            self.frames.matrix[side] = matrix.view(LAYERS, HEADS, d, d)
            self.frames.dual[side] = dual.view(LAYERS, HEADS, d, d)
        self.pages = 1 + torch.randperm(PAGES, generator=self.rng)
        order = self.layout.hot_blocks + torch.randperm(blocks, generator=self.rng)
        self.arena.place_pages(self.pages, order.view(PAGES, -1))
        self.arena.set_level(self.pages, self.old)

    def fill(self, loudness: float = 1.0) -> None:
        """Tokens around a mean of their page, as spread out as the frame expects."""
        d, size = self.layout.head_dim, self.layout.page_size
        _, addresses = self.arena.locate(self.pages)
        for layer in range(LAYERS):
            for side, layout in enumerate(self.sides(self.old, layer)):
                spread = self.spread[side].view(LAYERS, HEADS, 1, d)[layer]
                x = torch.randn(PAGES, HEADS, size, d, generator=self.rng) * spread * loudness
                x += torch.randn(PAGES, HEADS, 1, d, generator=self.rng) * loudness
                centre = self.frames.centre[side, layer].repeat(PAGES, 1)
                matrix = self.frames.matrices(layout.pattern.frame, layer, side)
                slices = encode_slices(layout, x.flatten(0, 1), matrix.repeat(PAGES, 1, 1), centre)
                self.arena.write_slices(layout, addresses[layer, ..., side].flatten(), slices)

    def sides(self, level: int, layer: int) -> tuple[SliceLayout, SliceLayout]:
        """Layouts of the keys and values of a layer, whose heads are alike here."""
        return self.layout.kinds[self.layout.assignment.of[level][layer * HEADS]]

    def turns(self) -> Turns:
        return Turns.between(self.frames.rotation, self.frames.matrix)

    def run(self, **options: int) -> torch.Tensor:
        """The arena's bytes after the kernel."""
        arena = self.arena.bytes.to(DEVICE, copy=True)
        turns = Turns(self.turns().matrices.to(DEVICE), self.turns().scales.to(DEVICE))
        reencode_pages(
            arena, self.arena.page_blocks.to(DEVICE), self.pages.to(DEVICE), self.moves(), turns,
            self.layout.block_bytes, **options,
        )  # fmt: skip
        return arena.cpu()

    def moves(self) -> Moves:
        moves = self.arena.moves(self.old, self.new)
        tensors = {
            name: value.to(DEVICE)
            for name, value in vars(moves).items()
            if isinstance(value, torch.Tensor)
        }
        each = tuple(replace(move, slices=move.slices.to(DEVICE)) for move in moves.moves)
        return replace(moves, moves=each, **tensors)

    def pool(self, matrix: torch.Tensor) -> torch.Tensor:
        """The arena's bytes after the pool's re-tiering in the frames A `matrix`."""
        before, kept = self.arena.bytes.clone(), self.frames.matrix
        self.frames.matrix = matrix
        lower_pages(self.arena, self.frames, self.pages, self.old, self.new, kernels=False)
        found = self.arena.bytes.clone()
        self.arena.bytes.copy_(before)
        self.arena.set_level(self.pages, self.old)
        self.frames.matrix = kept
        return found

    def check(self, **options: int) -> None:
        """Bytes are the pool's in the kernel's own matrices; no more is lost than in exact ones."""
        exact, found = self.pool(self.frames.matrix), self.run(**options)
        turns, expected = self.turns(), exact
        if self.old == 0:
            rounded = turns.matrices.float() * turns.scales[..., None, None]
            expected = self.pool(rounded @ self.frames.rotation)
        before = self.tokens(self.old, self.arena.bytes)
        self.arena.set_level(self.pages, self.new)
        _, addresses = self.arena.locate(self.pages)
        outside = torch.ones(len(found), dtype=torch.bool)
        for layer in range(LAYERS):
            for side, layout in enumerate(self.sides(self.new, layer)):
                at = addresses[layer, ..., side].flatten().unsqueeze(1)
                offsets = at + torch.arange(layout.size_bytes)
                outside[offsets] = False
                compare(layout, found[offsets], expected[offsets])
        assert torch.equal(found[outside], expected[outside])
        ours, theirs = (
            float((self.tokens(self.new, arena) - before).square().sum())
            for arena in (found, exact)
        )
        energy = float(before.square().sum())  # what float16 matrices lose is a share of this
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2.0**-20 * energy)

    def tokens(self, level: int, arena: torch.Tensor) -> torch.Tensor:
        """What the pages hold, in the calibrated frames: [layers * 2, slices, page_size, d]."""
        self.arena.set_level(self.pages, level)
        _, addresses = self.arena.locate(self.pages)
        found = []
        for layer in range(LAYERS):
            for side, layout in enumerate(self.sides(level, layer)):
                at = addresses[layer, ..., side].flatten().unsqueeze(1)
                dual = self.frames.duals(layout.pattern.frame, layer, side).repeat(PAGES, 1, 1)
                centre = torch.zeros(PAGES * HEADS, self.layout.head_dim)
                x = decode_slices(layout, arena[at + torch.arange(layout.size_bytes)], dual, centre)
                matrix = self.frames.matrix[side, layer].repeat(PAGES, 1, 1)
                found.append(x @ matrix.transpose(-1, -2))
        return torch.stack(found)


def compare(layout: SliceLayout, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Slices are equal, but for what lies on a rounding edge."""
    start, radii_at = layout.scales_offset_bytes, layout.radii_offset_bytes

    def alike(a: torch.Tensor, b: torch.Tensor, what: str) -> torch.Tensor:
        allowed = max(2, a.numel() * ON_AN_EDGE)
        assert int((a != b).sum()) <= allowed, f"{what}: {int((a != b).sum())} of {a.numel()}"
        return a == b

    centroids = (s[:, : layout.head_dim].int() for s in (found, wanted))
    same = alike(*centroids, "centroids").all(1)
    units = (s[:, start : start + 4].contiguous().view(torch.float16) for s in (found, wanted))
    left, right = units
    assert bool(((left - right).abs() <= right * 2**-9).all())
    assert torch.equal(found[:, start + 4 : radii_at], wanted[:, start + 4 : radii_at])
    # where a centroid's code or a unit differs, everything else in the slice may
    same &= (left == right).all(1)
    assert int((~same).sum()) <= 1 + len(same) // 8
    end = radii_at + layout.radii_bytes
    radii = (unpack_radii(s[same, radii_at:end].contiguous().view(torch.int16), layout.bands)
             for s in (found, wanted))  # fmt: skip
    same_radii = alike(*radii, "radii").transpose(1, 2)
    codes = [read_codes(layout, s[same])[same_radii] for s in (found, wanted)]
    alike(*codes, "codes")
    assert int((codes[0] - codes[1]).abs().max()) <= 1
    end = layout.tiles[-1].offset_bytes + layout.tiles[-1].row_bytes * layout.page_size
    assert torch.equal(found[:, end:], wanted[:, end:])


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_from_hot_to_warm(d: int) -> None:
    case = Case(d, Level("hot", HOT, HOT), WARM)
    case.fill()
    case.check()


@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize(
    ("old", "new"), [(Level("hot", HOT, HOT), FINE), (FINE, COLD)], ids=["to", "from"]
)
def test_to_and_from_finer_than_warm(old: Level, new: Level, d: int) -> None:
    case = Case(d, old, new)
    case.fill()
    case.check()


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_from_warm_to_cold(d: int) -> None:
    case = Case(d, WARM, COLD)
    case.fill()
    case.check()


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kinds", [((1, 1), (1, 2)), ((1, 2), (2, 2))], ids=str)
def test_layers_that_differ(d: int, kinds: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """A layer that keeps its pattern keeps its bytes, in another place."""
    fine = Level("warm", PATTERNS[2], PATTERNS[3]), Level("cool", PATTERNS[4], PATTERNS[4])
    case = Case(d, *fine, kinds=kinds)
    case.fill()
    case.check()


def test_one_page_at_a_time() -> None:
    case = Case(64, Level("hot", HOT, HOT), COLD)
    case.fill()
    case.check(scratch_bytes=1)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_other_page_sizes(page_size: int) -> None:
    case = Case(64, Level("hot", HOT, HOT), COLD, page_size)
    case.fill()
    case.check()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Level("hot", HOT4, HOT4), COLD),
        (Level("hot", HOT, HOT), MIDDLE),
        (COLD, FROZEN),
        (FROZEN, UNCODED),
    ],
    ids=["from-4-bits", "to-4-4-2-2", "from-cold-to-frozen", "from-4-2-1-1-to-4-2-2-0"],
)
@pytest.mark.parametrize("d", [64, 80, 128])
def test_other_patterns(d: int, old: Level, new: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATTERN_ID, UNCODED.keys, len(PATTERNS))  # which no level has
    case = Case(d, old, new)
    case.fill()
    case.check()


@pytest.mark.parametrize("new", [WARM, FROZEN], ids=["warm", "frozen"])
@pytest.mark.parametrize("loudness", [0.0, 1e-3, 360.0])
def test_quiet_and_loud_tokens(loudness: float, new: Level) -> None:
    case = Case(64, Level("hot", HOT, HOT), new)
    case.fill(loudness)
    case.check()


def test_nan_shows_in_its_slice_alone() -> None:
    case = Case(64, Level("hot", HOT, HOT), WARM)
    case.fill()
    _, addresses = case.arena.locate(case.pages)
    broken = int(addresses[1, 0, 0, 0])  # layer 1, the first page, keys
    case.arena.bytes[broken + 6 : broken + 8] = POISON  # a radius
    found = case.run()
    case.arena.set_level(case.pages, case.new)
    _, addresses = case.arena.locate(case.pages)
    for side, layout in enumerate(case.layout.side_layouts(case.new)):
        at = addresses[..., side].unsqueeze(-1) + torch.arange(layout.size_bytes)
        units = found[at][..., layout.scales_offset_bytes :][..., :2].contiguous()
        wanted = torch.zeros(LAYERS, PAGES, HEADS, dtype=torch.bool)
        wanted[1, 0, 0] = side == 0
        assert torch.equal(units.view(torch.float16).isnan().squeeze(-1), wanted)


def test_says_what_it_expects() -> None:
    case = Case(64, Level("hot", HOT, HOT), WARM)
    case.new = case.old
    with pytest.raises(ValueError, match="calibrated"):
        case.run()
