"""PageLayout: where slices lie, what pages cost, and the bytes that were promised."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from sglang_spherical.config import SphericalConfig
from sglang_spherical.errors import StartupError
from sglang_spherical.pool.layout import (
    SIDES,
    Level,
    PageLayout,
    default_levels,
    split_descriptor,
)
from spherical_kernels.codec.patterns import PATTERN_ID, PATTERNS
from spherical_kernels.codec.slices import slice_alignment

Geometry = tuple[int, int, int]
"""Layers, KV heads of a rank, head dimension."""

GEOMETRIES: dict[str, Geometry] = {
    "SmolLM2-135M": (30, 3, 64),
    "Llama-3.1-8B": (32, 8, 128),
    "Llama-3.1-8B, 2 ranks": (32, 4, 128),
    "Llama-3.1-8B, 8 ranks": (32, 1, 128),
    "Qwen2.5-1.5B": (28, 2, 128),
    "Qwen2.5-1.5B, 2 ranks": (28, 1, 128),
    "test model": (4, 2, 64),
    "test model, 2 ranks": (4, 1, 64),
    "heads of 80": (32, 8, 80),
    "heads of 96": (24, 4, 96),
    "heads of 96, 2 ranks": (24, 2, 96),
}
BITS = [(8, 4, 2), (8, 4, 3), (8, 3, 2)]
"""Bits of hot, warm and cold."""

every_geometry = pytest.mark.parametrize("name", GEOMETRIES)
every_page_size = pytest.mark.parametrize("page_size", [16, 32, 64])


@cache
def fitted(page_size: int, geometry: Geometry, *bits: int) -> PageLayout:
    layers, kv_heads, head_dim = geometry
    hot, warm, cold = bits or (8, 4, 2)
    config = SphericalConfig("spherical", hot_bits=hot, warm_bits=warm, cold_bits=cold)
    return PageLayout.fit(page_size, head_dim, layers, kv_heads, default_levels(config))


def slice_extents(layout: PageLayout, level: int) -> torch.Tensor:
    """(block, first byte, end byte) of every slice of a page at a level, [slices, 3]."""
    _, slot, offset = split_descriptor(layout.descriptors(level))
    sizes = torch.tensor([side.size_bytes for side in layout.side_layouts(level)])
    return torch.stack([slot, offset, offset + sizes.expand_as(offset)], -1).view(-1, 3)


@every_page_size
@every_geometry
def test_slices_lie_apart_inside_the_blocks_of_their_page(name: str, page_size: int) -> None:
    layout = fitted(page_size, GEOMETRIES[name])
    for level in range(len(layout.levels)):
        extents = slice_extents(layout, level)
        block, first, end = extents.unbind(1)
        assert len(extents) == layout.layers * layout.kv_heads * SIDES
        assert int(block.min()) == 0
        assert int(block.max()) == layout.blocks[level] - 1, "every counted block holds something"
        assert bool((end <= layout.block_bytes).all()), "no slice straddles a block"
        assert bool((first % slice_alignment(layout.head_dim) == 0).all())
        assert layout.block_bytes % slice_alignment(layout.head_dim) == 0
        start = block * layout.block_bytes + first
        order = start.argsort()
        ends = (block * layout.block_bytes + end)[order]
        assert bool((ends[:-1] <= start[order][1:]).all()), "no slice lies on another"


@every_page_size
@every_geometry
def test_descriptors_name_the_patterns_of_their_level(name: str, page_size: int) -> None:
    layout = fitted(page_size, GEOMETRIES[name])
    for level, rung in enumerate(layout.levels):
        words = layout.descriptors(level)
        assert words.shape == (layout.layers, layout.kv_heads, SIDES)
        assert bool((words >= 0).all()), "the sign bit stays clear"
        pattern, _, _ = split_descriptor(words)
        assert bool((pattern[..., 0] == PATTERN_ID[rung.keys]).all())
        assert bool((pattern[..., 1] == PATTERN_ID[rung.values]).all())


@every_page_size
@every_geometry
@pytest.mark.parametrize("bits", BITS, ids=lambda bits: "-".join(map(str, bits)))
def test_costs_are_whole_tokens_and_never_grow(
    name: str, page_size: int, bits: tuple[int, ...]
) -> None:
    layout = fitted(page_size, GEOMETRIES[name], *bits)
    costs = layout.cost_tokens
    assert layout.blocks[0] == layout.hot_blocks
    assert costs[0] == page_size
    for blocks, cost in zip(layout.blocks, costs):
        exact = blocks * page_size / layout.hot_blocks
        assert exact <= cost < exact + 1, "what a page costs is always there in blocks"
    assert all(type(cost) is int and cost > 0 for cost in costs)
    assert list(costs) == sorted(costs, reverse=True)
    assert costs[-1] < page_size, "there is something to gain"
    for level in range(len(costs)):
        finest = layout.finest_of_cost(level)
        assert costs[finest] == costs[level]
        assert finest == 0 or costs[finest - 1] > costs[level]


@every_geometry
def test_every_named_budget_gains_at_the_default_page_size_and_bits(name: str) -> None:
    """Levels between and below may round to a neighbour's cost where few slices fill a page."""
    layout = fitted(64, GEOMETRIES[name])
    costs = {level.name: cost for level, cost in zip(layout.levels, layout.cost_tokens)}
    assert costs["hot"] > costs["warm"] > costs["cold"]
    assert costs["warm"] >= costs["cool"] >= costs["cold"] >= costs["frozen"]
    if layout.layers * layout.kv_heads >= 64:
        assert costs["warm"] > costs["cool"] > costs["cold"]


@every_geometry
def test_levels_that_would_grow_are_refused(name: str) -> None:
    """4-bit warm pages carry a header that 4-bit hot ones do not, and a layout has to round up."""
    try:
        costs = fitted(64, GEOMETRIES[name], 4, 4, 2).cost_tokens
    except (StartupError, ValueError) as refusal:
        assert "--spherical-" in str(refusal)
    else:
        assert list(costs) == sorted(costs, reverse=True)


@every_geometry
def test_tables_are_below_one_percent_of_the_data(name: str) -> None:
    """At page 64, for every level alone, and for the table of a whole pool of cold pages."""
    layout = fitted(64, GEOMETRIES[name])
    for blocks in layout.blocks:
        assert layout.table_bytes < 0.01 * blocks * layout.block_bytes
    hot_page_bytes = layout.hot_blocks * layout.block_bytes
    assert layout.table_bytes * layout.logical_pages_per_hot_page < 0.01 * hot_page_bytes


@every_page_size
@every_geometry
def test_sizing_counts_every_byte(name: str, page_size: int) -> None:
    """A pool sized by hot_bytes_per_token holds blocks and tables, with less than a token over."""
    layout = fitted(page_size, GEOMETRIES[name])
    pages = 1000
    ids = pages * layout.logical_pages_per_hot_page
    needed = pages * layout.hot_blocks * layout.block_bytes + ids * layout.table_bytes
    paid = layout.hot_bytes_per_token * pages * page_size
    assert needed <= paid < needed + pages * page_size


# Bytes of a token against bf16 at page 64, radii, centroids, tables and padding included: hot, warm
# and cold.
TARGETS = {
    "Llama-3.1-8B": (0.54, 0.285, 0.17),
    "Llama-3.1-8B, 2 ranks": (0.54, 0.285, 0.17),
    "Llama-3.1-8B, 8 ranks": (0.54, 0.285, 0.17),
    "Qwen2.5-1.5B": (0.54, 0.285, 0.17),
    "SmolLM2-135M": (0.56, 0.34, 0.21),
}


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_against_bf16(name: str) -> None:
    layout = fitted(64, GEOMETRIES[name])
    dense = layout.dense_bytes_per_token()
    layers, heads, head_dim = GEOMETRIES[name]
    assert dense == 2 * layers * heads * head_dim * 2
    names = [level.name for level in layout.levels]
    for tier, target in zip(("hot", "warm", "cold"), TARGETS[name]):
        assert layout.bytes_per_token(names.index(tier)) <= target * dense, tier
    assert layout.hot_bytes_per_token <= TARGETS[name][0] * dense, "what sizing charges"


def test_dimensions_that_do_not_fit_are_refused() -> None:
    levels = default_levels(SphericalConfig("spherical"))
    with pytest.raises(ValueError, match="head_dim: expected a positive multiple of 16, got 72"):
        PageLayout.fit(64, 72, 4, 2, levels)
    with pytest.raises(ValueError, match="page_size: expected a positive multiple of 16, got 24"):
        PageLayout.fit(24, 64, 4, 2, levels)


@every_page_size
def test_any_pattern_may_stand_on_any_level(page_size: int) -> None:
    """The layout knows nothing of particular patterns: finer above coarser is all it asks."""
    by_size = [PATTERNS[i] for i in (0, 2, 3, 4, 5, 6)]
    levels = tuple(Level(p.name, p, p) for p in by_size)
    layout = PageLayout.fit(page_size, 128, 8, 4, levels)
    for level in range(len(levels)):
        extents = slice_extents(layout, level)
        assert bool((extents[:, 2] <= layout.block_bytes).all())
    assert sorted(layout.blocks, reverse=True) == list(layout.blocks)
