"""PageLayout: the only owner of byte offsets in the arena.

The arena is cut into equal blocks. A page (all layers and KV heads of this rank) at a level owns
n(level) whole blocks; its slices, keys and values of every (layer, head) in order, are packed into
them and never straddle a block. A hot page owns H blocks and costs page_size hot-token equivalents,
a page of n blocks n / H of that, rounded up to a whole number: memory is counted in these, and what
the count has free is always there in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch

from sglang_spherical.config import TIERS, SphericalConfig
from sglang_spherical.errors import StartupError
from spherical_kernels.codec.patterns import PATTERN_ID, FrameKind, Pattern
from spherical_kernels.codec.slices import ALIGNMENT, SliceLayout, slice_alignment, slice_layout

# Places of a descriptor's fields, low bits first. The sign bit stays clear.
PATTERN_BITS, SLOT_BITS, OFFSET_BITS = 4, 6, 21
SLACK = 1.08  # how much larger than needed for hot pages a block may be made for the others' sake
CANDIDATES = 48  # block sizes tried for every H
MOST_BLOCKS = 1 << SLOT_BITS  # of a page
WASTE_WEIGHTS = {"hot": 1.0, "warm": 3.0, "cold": 2.0}
"""Of a level's waste: most of a cache is at the budget, and of a full one below it."""

PASSING_WEIGHT = 0.5
"""Of the other levels, which refine the ladder."""
SIDES = 2  # keys, values


@dataclass(frozen=True)
class Level:
    """One rung of the precision ladder: the patterns of every key and value slice of a page."""

    name: str
    keys: Pattern
    values: Pattern


@dataclass(frozen=True)
class PageLayout:
    """Bytes of a page at every level.

    levels         finest first; level 0 is hot
    slices         layers * kv_heads of this rank
    hot_blocks     H, blocks of a hot page
    block_bytes    bytes of a block, a multiple of what slices are aligned to
    """

    page_size: int
    head_dim: int
    layers: int
    kv_heads: int
    levels: tuple[Level, ...]
    hot_blocks: int
    block_bytes: int

    @classmethod
    @cache
    def fit(
        cls, page_size: int, head_dim: int, layers: int, kv_heads: int, levels: tuple[Level, ...]
    ) -> PageLayout:
        """The layout whose pages, over all levels, waste the least.

        Raises StartupError when the page size cannot be packed, or when pages would grow from one
        level to the next.
        """
        best: tuple[float, PageLayout] | None = None
        sides = [level_sides(level, page_size, head_dim) for level in levels]
        for hot_blocks in range(1, MOST_BLOCKS + 1):
            for block_bytes in _block_sizes(sides, layers * kv_heads, hot_blocks):
                layout = cls(page_size, head_dim, layers, kv_heads, levels, hot_blocks, block_bytes)
                if block_bytes // ALIGNMENT >> OFFSET_BITS:
                    continue
                if best is not None and layout.waste(layout._fewest_blocks) >= best[0]:
                    continue  # without packing it: most of the candidates
                if not layout._fits(hot_blocks):
                    continue
                waste = layout.waste()
                if best is None or waste < best[0]:
                    best = waste, layout
        if best is None:
            raise StartupError(
                f"--page-size {page_size}: no block size packs {layers} layers of {kv_heads} KV "
                f"heads of dimension {head_dim} with no level larger than the one before: use a "
                "larger page size, or --spherical-*-bits further apart"
            )
        return best[1]

    def _fits(self, hot_blocks: int) -> bool:
        """Whether a hot page fills `hot_blocks`, and no level needs more than the one before."""
        steps = zip(self.blocks, self.blocks[1:])
        return self.blocks[0] == hot_blocks and all(finer >= coarser for finer, coarser in steps)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of a page, by level."""
        return tuple(max(block for block, _ in places) + 1 for places in self._places)

    @cached_property
    def cost_tokens(self) -> tuple[int, ...]:
        """Hot-token equivalents of a page, by level; `page_size` at level 0."""
        return tuple(self._cost_of(blocks) for blocks in self.blocks)

    def _cost_of(self, blocks: int) -> int:
        return -(-blocks * self.page_size // self.hot_blocks)

    @property
    def _fewest_blocks(self) -> tuple[int, ...]:
        """Blocks by level if slices could straddle them."""
        pairs = (self.side_layouts(level) for level in range(len(self.levels)))
        sizes = (sum(side.size_bytes for side in pair) for pair in pairs)
        return tuple(-(-self.layers * self.kv_heads * size // self.block_bytes) for size in sizes)

    def finest_of_cost(self, level: int) -> int:
        """The finest level whose pages cost what those of `level` do: small pages round up."""
        return self.cost_tokens.index(self.cost_tokens[level])

    @property
    def table_bytes(self) -> int:
        """Descriptors and block table of one logical page."""
        return 4 * (self.layers * self.kv_heads * SIDES + self.hot_blocks)

    @property
    def logical_pages_per_hot_page(self) -> float:
        """Ids to keep so that they never run out before blocks do."""
        return self.hot_blocks / min(self.blocks)

    @property
    def hot_bytes_per_token(self) -> int:
        """What a token of capacity costs: its blocks and its share of the tables, rounded up."""
        tables = self.table_bytes * self.logical_pages_per_hot_page
        return -int(-(self.hot_blocks * self.block_bytes + tables) // self.page_size)

    def bytes_per_token(self, level: int) -> float:
        """Arena bytes and tables of one token cached at `level`."""
        return (self.blocks[level] * self.block_bytes + self.table_bytes) / self.page_size

    def dense_bytes_per_token(self, element_bytes: int = 2) -> int:
        """The same token in a dense pool."""
        return SIDES * self.layers * self.kv_heads * self.head_dim * element_bytes

    def side_layouts(self, level: int) -> tuple[SliceLayout, SliceLayout]:
        """Slice layouts of keys and values at a level."""
        return level_sides(self.levels[level], self.page_size, self.head_dim)

    def waste(self, blocks_of: tuple[int, ...] | None = None) -> float:
        """What pages cost over the bytes of their slices, summed over the levels by weight.

        blocks_of  blocks of a page by level, if not what packing needs; fewer never waste more
        """
        total, unit = 0.0, self.hot_blocks * self.block_bytes / self.page_size
        for level, (rung, blocks) in enumerate(zip(self.levels, blocks_of or self.blocks)):
            pair = sum(side.size_bytes for side in self.side_layouts(level))
            cost = self._cost_of(blocks)
            counted = (blocks * self.block_bytes + cost * unit) / 2
            ratio = counted / (self.layers * self.kv_heads * pair) - 1
            total += ratio * WASTE_WEIGHTS.get(rung.name, PASSING_WEIGHT)
        return total

    @cached_property
    def _places(self) -> tuple[list[tuple[int, int]], ...]:
        """(block of the page, byte offset) of every slice in order layer, head, side; by level."""
        places = []
        for level in range(len(self.levels)):
            keys, values = self.side_layouts(level)
            sizes = keys.size_bytes, values.size_bytes
            places.append(_pack(sizes, self.layers * self.kv_heads, self.block_bytes))
        return tuple(places)

    def descriptors(self, level: int) -> torch.Tensor:
        """Descriptors of a uniform page: int32 [layers, kv_heads, 2 (keys, values)]."""
        rung = self.levels[level]
        ids = [PATTERN_ID[rung.keys], PATTERN_ID[rung.values]]
        words = [
            pattern | slot << PATTERN_BITS | offset // ALIGNMENT << (PATTERN_BITS + SLOT_BITS)
            for (slot, offset), pattern in zip(
                self._places[level], ids * (len(self._places[level]) // 2)
            )
        ]
        return torch.tensor(words, dtype=torch.int32).view(self.layers, self.kv_heads, SIDES)


def _pack(sizes: tuple[int, int], count: int, block_bytes: int) -> list[tuple[int, int]]:
    """(block, offset) of `count` key and `count` value slices, in order key, value, key, value, ...

    A block takes the side that lags behind, or the other one where only that still fits.
    """
    places: list[list[tuple[int, int]]] = [[], []]
    block, used = 0, 0
    while len(places[0]) < count or len(places[1]) < count:
        lagging = 0 if len(places[0]) <= len(places[1]) else 1
        for side in (lagging, 1 - lagging):
            if len(places[side]) < count and used + sizes[side] <= block_bytes:
                places[side].append((block, used))
                used += sizes[side]
                break
        else:
            block, used = block + 1, 0
    return [place for pair in zip(*places, strict=True) for place in pair]


def _block_sizes(
    layouts: list[tuple[SliceLayout, SliceLayout]], count: int, hot_blocks: int
) -> list[int]:
    """Candidate block sizes, from what `count` hot slices of each side need in H blocks to `SLACK`
    more."""
    needed = -(-count * 2 // hot_blocks) * layouts[0][0].size_bytes
    if needed < max(side.size_bytes for pair in layouts for side in pair):
        return []
    top = int(needed * SLACK)
    unit = slice_alignment(layouts[0][0].head_dim)
    step = max(unit, (top - needed) // CANDIDATES // unit * unit)
    sizes = [side.size_bytes for pair in layouts for side in pair]
    sizes += [keys.size_bytes + values.size_bytes for keys, values in layouts]
    fitted = {size * (top // size) for size in sizes}
    return sorted({n for n in fitted if n >= needed} | set(range(needed, top + 1, step)))


def level_sides(level: Level, page_size: int, head_dim: int) -> tuple[SliceLayout, SliceLayout]:
    """Slice layouts of a level's keys and values."""
    return (
        slice_layout(level.keys, page_size, head_dim),
        slice_layout(level.values, page_size, head_dim),
    )


def split_descriptor(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Descriptors int32 -> pattern id, block of the page, byte offset in the block (all int64)."""
    words = words.long()
    slot = words >> PATTERN_BITS & ((1 << SLOT_BITS) - 1)
    return (
        words & ((1 << PATTERN_BITS) - 1),
        slot,
        (words >> (PATTERN_BITS + SLOT_BITS)) * ALIGNMENT,
    )


def _calibrated(*bits: int) -> Pattern:
    return Pattern(FrameKind.CALIBRATED, bits)


Sides = tuple[Pattern, Pattern]
"""Patterns of keys and values."""

_HOT: dict[int, Sides] = {bits: (Pattern(FrameKind.HOT, (bits,)),) * 2 for bits in (4, 8)}

_CACHED: dict[int, Sides] = {
    4: (_calibrated(6, 4, 4, 2), _calibrated(4, 4, 4, 4)),
    3: (_calibrated(4, 4, 2, 2), _calibrated(4, 4, 2, 2)),
    2: (_calibrated(4, 2, 2, 2), _calibrated(2, 2, 2, 2)),
}
"""Of warm and cold, by code bits: chosen by fidelity at equal bytes (docs/format.md)."""

_BETWEEN: dict[tuple[int, int], Sides] = {
    (4, 2): _CACHED[3],
    (4, 3): (_calibrated(6, 4, 4, 2), _calibrated(4, 4, 2, 2)),
    (3, 2): (_calibrated(4, 2, 2, 2), _calibrated(4, 4, 2, 2)),
}
"""Of cool, by the bits of warm and cold."""

_LAST: dict[int, Sides] = {
    3: _CACHED[2],
    2: (_calibrated(4, 2, 2, 0), _calibrated(2, 2, 2, 2)),
}
"""Of frozen, by the bits of cold."""


def default_levels(config: SphericalConfig) -> tuple[Level, ...]:
    """The levels of `TIERS`, with the patterns that the bits of `config` name."""
    warm, cold = config.warm_bits, config.cold_bits
    sides = _HOT[config.hot_bits], _CACHED[warm], _BETWEEN[warm, cold], _CACHED[cold], _LAST[cold]
    return tuple(Level(name, *pair) for name, pair in zip(TIERS, sides, strict=True))
