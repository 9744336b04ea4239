"""The arena: tokens land in their page and nowhere else, and pages change level in place."""

from __future__ import annotations

import pytest
import torch
from cache_tools import (
    Layer,
    normal,
    random_tokens,
    read_pages,
    ready_frames,
    tiny_layout,
    tiny_pool,
    write,
)

from sglang_spherical.pool.arena import KEYS, VALUES, Arena
from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.layout import SIDES
from sglang_spherical.pool.retier import PAGES_AT_ONCE, recentre_pages
from spherical_kernels.codec.pages import decode_slices, encode_slices
from spherical_kernels.testing import assert_close, poison

PAGE = 16


def place(pool: SphericalKVPool, pages: torch.Tensor) -> None:
    """Puts pages on blocks of their own, spread over the arena and in no order."""
    layout, arena = pool.layout, pool.arena
    order = torch.randperm(arena.num_blocks, generator=torch.Generator().manual_seed(3))
    blocks = order[: len(pages) * layout.hot_blocks] + layout.hot_blocks
    arena.place_pages(pages, blocks.view(len(pages), -1))


def locations(pages: torch.Tensor) -> torch.Tensor:
    return (pages.unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()


@pytest.fixture
def pool() -> SphericalKVPool:
    return tiny_pool(24)


@pytest.fixture
def full(pool: SphericalKVPool) -> SphericalKVPool:
    """Pages 1 to 20 hold tokens, in a poisoned arena with frames ready."""
    ready_frames(pool)
    poison(pool.arena.bytes)
    pages = torch.arange(1, 21)
    place(pool, pages)
    write(pool, locations(pages), *random_tokens(pool, 20 * PAGE))
    return pool


def page_bytes(pool: SphericalKVPool, pages: torch.Tensor, level: int = 0) -> torch.Tensor:
    """The blocks of pages at a level, uint8 [pages, blocks, block_bytes]."""
    blocks = pool.arena.page_blocks[pages, : pool.layout.blocks[level]].long()
    return pool.arena.bytes.view(-1, pool.layout.block_bytes)[blocks]


def test_page_zero_owns_the_first_blocks() -> None:
    pool = tiny_pool(3)
    arena = pool.arena
    assert len(arena.bytes) == (3 + 1) * pool.layout.hot_blocks * pool.layout.block_bytes
    assert arena.page_blocks[0].tolist() == list(range(pool.layout.hot_blocks))
    k, v = random_tokens(pool, 5)
    write(pool, torch.zeros(5, dtype=torch.int64), k, v)  # what padded rows do
    assert bool((arena.bytes[pool.layout.hot_blocks * pool.layout.block_bytes :] == 0).all())


@pytest.mark.parametrize("head_dim", [32, 80, 96])
def test_tokens_read_back_as_encoded_and_touch_nothing_else(head_dim: int) -> None:
    """Tokens are written in three runs; the pages' bytes equal whole encoded pages."""
    pool = tiny_pool(8, head_dim=head_dim)
    pages = torch.tensor([5, 2, 7])
    place(pool, pages)
    poison(pool.arena.bytes)
    loc = locations(pages)
    k, v = random_tokens(pool, len(loc))
    order = torch.randperm(len(loc), generator=torch.Generator().manual_seed(0))
    for part in order.split([1, 30, 17]):
        write(pool, loc[part], k[:, part], v[:, part])
    written = torch.zeros_like(pool.arena.bytes, dtype=torch.bool)
    _, addresses = pool.arena.locate(pages)
    for side, x in ((KEYS, k), (VALUES, v)):
        layout = pool.layout.side_layouts(0)[side]
        rows = x.unflatten(1, (3, PAGE)).transpose(2, 3).flatten(0, 2)  # (layer, page, head)
        matrix, centre = pool.frames.rotation.expand(12, -1, -1), torch.zeros(12, head_dim)
        at = addresses[..., side].flatten()
        expected = encode_slices(layout, rows, matrix, centre)
        read = pool.arena.read_slices(layout, at)
        # One matrix product per token or per page: a code may round to its neighbour, no more.
        decoded = (decode_slices(layout, s, matrix, centre) for s in (read, expected))
        step = expected.new_tensor(0).float() + float(rows.abs().max()) * head_dim**0.5 / 127
        assert_close(*decoded, max_error=float(step), rms_error=1e-3)
        assert float((read != expected).float().mean()) < 1e-3
        for start in at.tolist():
            written[start : start + layout.size_bytes] = True
    changed = pool.arena.bytes != 0xFF
    assert not bool((changed & ~written).any()), "bytes outside the pages' slices"


def test_a_token_write_leaves_its_neighbours_alone(full: SphericalKVPool) -> None:
    before = full.arena.bytes.clone()
    k, v = random_tokens(full, 1, seed=99)
    write(full, torch.tensor([7 * PAGE + 5]), k, v)
    changed = (full.arena.bytes != before).view(-1, full.layout.block_bytes).any(1)
    own = full.arena.page_blocks[7].long()
    changed[own] = False
    assert not bool(changed.any())
    pages = torch.tensor([7])
    after = read_pages(full, pages)
    full.arena.bytes.copy_(before)
    tokens = (after != read_pages(full, pages)).flatten(0, 2).any((0, 2, 3)).nonzero().flatten()
    assert tokens.tolist() == [5]


def test_slices_survive_wherever_they_lie(full: SphericalKVPool) -> None:
    """Any byte pattern, signalling NaNs included, is stored and read as it is."""
    layout = full.layout.side_layouts(1)[KEYS]
    _, addresses = full.arena.locate(torch.tensor([3, 9]))
    at = addresses[..., KEYS].flatten()
    generator = torch.Generator().manual_seed(0)
    slices = torch.randint(0, 256, (len(at), layout.size_bytes), generator=generator)
    slices = slices.to(torch.uint8)
    slices[:, 6:8], slices[:, 14:16] = torch.tensor([0xF0, 0x7F]), torch.tensor([0xF0, 0xFF])
    before = full.arena.bytes.clone()
    full.arena.write_slices(layout, at, slices)
    assert torch.equal(full.arena.read_slices(layout, at), slices)
    for start in at.tolist():
        full.arena.bytes[start : start + layout.size_bytes] = before[
            start : start + layout.size_bytes
        ]
    assert torch.equal(full.arena.bytes, before)


def test_the_last_slice_of_the_arena_is_in_reach() -> None:
    layout = tiny_layout()
    arena = Arena(layout, layout.hot_blocks, 2, "cpu")
    blocks = torch.arange(layout.hot_blocks, 2 * layout.hot_blocks).view(1, -1)
    arena.place_pages(torch.tensor([1]), blocks)
    side = layout.side_layouts(0)[VALUES]
    _, addresses = arena.locate(torch.tensor([1]))
    last = addresses[..., VALUES].max().view(1)
    slices = torch.full((1, side.size_bytes), 7, dtype=torch.uint8)
    arena.write_slices(side, last, slices)
    assert torch.equal(arena.read_slices(side, last), slices)


# --- levels --------------------------------------------------------------------------------------

LEVELS = [(0, 1), (0, 2), (1, 2)]


def lower_from(pool: SphericalKVPool, pages: torch.Tensor, old: int) -> None:
    if old:
        pool.lower(pages, 0, old)


@pytest.mark.parametrize(("old", "new"), LEVELS)
def test_lowering_in_place_is_encoding_what_was_decoded(
    full: SphericalKVPool, old: int, new: int
) -> None:
    pages = torch.tensor([4, 11, 17])
    lower_from(full, pages, old)
    before = read_pages(full, pages)
    full.lower(pages, old, new)
    _, addresses = full.arena.locate(pages)
    heads = full.layout.kv_heads
    for index, kind in enumerate(full.layout.assignment.of[new]):
        layer, head = divmod(index, heads)
        for side, layout in enumerate(full.layout.kinds[kind]):
            frame = layout.pattern.frame
            matrix = full.frames.matrices(frame, layer, side)[head].expand(3, -1, -1)
            centre = full.frames.centre[side, layer, head].expand(3, -1)
            x = before[side, layer, :, :, head]
            at = addresses[layer, :, head, side]
            expected = encode_slices(layout, x, matrix, centre)
            assert torch.equal(full.arena.read_slices(layout, at), expected)


@pytest.mark.parametrize(("old", "new"), LEVELS)
def test_lowering_touches_no_other_page(full: SphericalKVPool, old: int, new: int) -> None:
    """Among the neighbours are pages of every level."""
    warm, cold, pages = torch.tensor([1, 2]), torch.tensor([3, 5]), torch.tensor([4, 11, 17])
    full.lower(warm, 0, 1)
    full.lower(cold, 0, 2)
    lower_from(full, pages, old)
    others = torch.tensor([p for p in range(6, 21) if p not in (11, 17)])
    expected = {
        level: page_bytes(full, p, level) for level, p in ((0, others), (1, warm), (2, cold))
    }
    tables = full.arena.descriptors.clone(), full.arena.page_blocks.clone()
    full.lower(pages, old, new)
    for level, p in ((0, others), (1, warm), (2, cold)):
        assert torch.equal(page_bytes(full, p, level), expected[level])
    assert torch.equal(full.arena.page_blocks, tables[1])
    moved = (full.arena.descriptors != tables[0]).any((0, 2, 3)).nonzero().flatten()
    assert set(moved.tolist()) <= set(pages.tolist())
    assert bool(
        (full.arena.bytes[: full.layout.hot_blocks * full.layout.block_bytes] == 0xFF).all()
    )


@pytest.mark.parametrize(("old", "new"), LEVELS)
def test_freed_blocks_are_those_beyond_the_new_level(
    full: SphericalKVPool, old: int, new: int
) -> None:
    """They may be reused at once: writing poison into them does not show in the page."""
    pages = torch.tensor([4, 11, 17])
    lower_from(full, pages, old)
    owned = full.arena.page_blocks[pages].clone()
    freed = full.lower(pages, old, new)
    kept = full.layout.blocks[new]
    assert freed.tolist() == owned[:, kept : full.layout.blocks[old]].flatten().tolist()
    decoded = read_pages(full, pages)
    poison(full.arena.bytes.view(-1, full.layout.block_bytes)[freed.long()])
    blocks = full.arena.bytes.view(-1, full.layout.block_bytes)
    blocks[freed.long()] = 0xFF
    assert torch.equal(read_pages(full, pages), decoded)
    assert bool(decoded.isfinite().all())


def test_many_pages_are_lowered_as_one_by_one(full: SphericalKVPool) -> None:
    pages = torch.arange(1, 21)
    assert len(pages) > PAGES_AT_ONCE
    before = full.arena.bytes.clone()
    full.lower(pages, 0, 2)
    together = page_bytes(full, pages, 2)
    full.arena.bytes.copy_(before)
    full.arena.set_level(pages, 0)
    for page in pages.split(1):
        full.lower(page, 0, 2)
    alone = page_bytes(full, pages, 2)
    # Padding between slices keeps what was there before, in both.
    assert torch.equal(together, alone)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_pages_say_what_was_written(full: SphericalKVPool, level: int) -> None:
    """Unit normals around their centre, against the error of the level's quantisers.

    Max (1960): 0.1188, 0.01154 and 0.00104 of the variance at 2, 4 and 6 bits, plus radii good to
    a 32nd; at 8 bits a step of peak/127.5, the peak of a token below 4. The largest error is that
    of a 4 sigma value clipped to the last 2-bit level, 1.5 steps of a standard deviation.
    """
    variance = {2: 0.1188, 4: 0.01154, 6: 0.00104, 8: (4 / 127.5) ** 2 / 12}
    pages = torch.arange(1, 21)
    lower_from(full, pages, level)
    wanted = torch.stack(random_tokens(full, 20 * PAGE)).unflatten(2, (20, PAGE))
    read = read_pages(full, pages)
    for side, layout in enumerate(full.layout.side_layouts(level)):
        bits = layout.pattern.bits
        radii = 1 / 32**2 if layout.calibrated else 0.0
        rms = (sum(variance[b] + radii for b in bits) / len(bits)) ** 0.5
        assert_close(read[side], wanted[side], max_error=2.5 if level else 0.1, rms_error=rms)


# --- centres -------------------------------------------------------------------------------------


def test_recentring_keeps_what_pages_say(pool: SphericalKVPool) -> None:
    pages = torch.arange(1, 9)
    place(pool, torch.arange(1, 13))
    write(pool, locations(torch.arange(1, 13)), *random_tokens(pool, 12 * PAGE))
    before, bytes_before = read_pages(pool, torch.arange(1, 13)), pool.arena.bytes.clone()
    centre = 2 * normal(SIDES, 2, 32, seed=5)
    recentre_pages(pool.arena, pool.frames, 1, pages, centre)
    pool.frames.freeze_centre(1, centre)
    after = read_pages(pool, torch.arange(1, 13))
    # Coded twice on 8-bit grids of vectors around 3 units long per channel: steps near 0.06.
    assert_close(after[:, 1, :8], before[:, 1, :8], max_error=0.1, rms_error=0.03)
    assert torch.equal(after[:, 0], before[:, 0]), "the other layer"
    changed = (pool.arena.bytes != bytes_before).view(-1, pool.layout.block_bytes).any(1)
    changed[pool.arena.page_blocks[pages].long().flatten()] = False
    assert not bool(changed.any())


def test_the_first_long_prefill_centres_what_shorter_ones_wrote() -> None:
    pool = tiny_pool(8)
    pages = torch.tensor([1, 2])
    place(pool, pages)
    k, v = random_tokens(pool, 2 * PAGE)
    write(pool, locations(pages), k, v)
    wanted = torch.stack([k, v]).unflatten(2, (2, PAGE))
    uncentred = float((read_pages(pool, pages) - wanted).square().mean().sqrt())
    long_k, long_v = random_tokens(pool, 100, seed=7)
    for index in range(2):
        q = normal(100, 2, 32)
        args = long_k[index], long_v[index], torch.arange(100), None
        pool.observe(Layer(index), q, *args, lambda: pages)
        pool.observe(Layer(index), q, *args, lambda: pages)  # frozen: nothing moves again
    assert all(pool.frames.centred)
    assert_close(pool.frames.centre[KEYS, 0], long_k[0, 4:].mean(0), max_error=1e-5, rms_error=1e-6)
    # Moving to the centre keeps the old error and adds the smaller one of centred codes.
    now = float((read_pages(pool, pages) - wanted).square().mean().sqrt())
    assert now <= 1.2 * uncentred
    after = torch.tensor([3])
    place(pool, torch.tensor([1, 2, 3]))
    write(pool, locations(after), k[:, :PAGE], v[:, :PAGE])
    centred = float((read_pages(pool, after)[:, :, 0] - wanted[:, :, 0]).square().mean().sqrt())
    assert centred < 0.8 * uncentred
