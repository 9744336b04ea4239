"""PageLayout: the only owner of byte offsets in the arena.

The arena is cut into equal blocks. A page (all layers and KV heads of this rank) at a level owns
n(level) whole blocks; its slices, keys and values of every (layer, head) in order, are packed into
them and never straddle a block. A hot page owns H blocks and costs page_size hot-token equivalents,
a page of n blocks n / H of that, rounded up to a whole number: memory is counted in these, and what
the count has free is always there in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch

from sglang_spherical.config import TIERS, SphericalConfig
from sglang_spherical.errors import StartupError
from sglang_spherical.pool.assignment import Assignment, Kind, pack_alike, pack_mixed
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
    """One rung of the precision ladder: patterns of a page's key and value slices, or, where heads
    differ, what their bytes are on average."""

    name: str
    keys: Pattern
    values: Pattern

    @property
    def pair(self) -> Kind:
        return self.keys, self.values


@dataclass(frozen=True)
class PageLayout:
    """Bytes of a page at every level.

    levels         finest first; level 0 is hot
    slices         layers * kv_heads of this rank
    hot_blocks     H, blocks of a hot page
    block_bytes    bytes of a block, a multiple of what slices are aligned to
    chosen         kinds of this rank's heads; None gives all of a level its own pair
    """

    page_size: int
    head_dim: int
    layers: int
    kv_heads: int
    levels: tuple[Level, ...]
    hot_blocks: int
    block_bytes: int
    chosen: Assignment | None = None

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
        sides = [kind_layouts(level.pair, page_size, head_dim) for level in levels]
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
        """Blocks of a page, by level: as many as slices of its own pair take."""
        return tuple(max(block for block, _ in places) + 1 for places in self._alike)

    @cached_property
    def choices(self) -> tuple[Kind, ...]:
        """Pairs of patterns that a head may have below hot, finest first: those of the levels, and
        a finer one for heads that the first of them costs too much."""
        hot, *lower = (level.pair for level in self.levels)
        finer = [_FINER[pair] for pair in lower[:1] if pair in _FINER]
        finer = [pair for pair in finer if pair[0].average_bits < hot[0].average_bits]
        return tuple(dict.fromkeys(finer + lower))

    @cached_property
    def assignment(self) -> Assignment:
        """The kinds of this rank's heads."""
        pairs = [level.pair for level in self.levels]
        return self.chosen or Assignment.uniform(pairs, self.layers * self.kv_heads)

    @cached_property
    def kinds(self) -> tuple[tuple[SliceLayout, SliceLayout], ...]:
        """Slice layouts of keys and values, by kind."""
        return tuple(
            kind_layouts(kind, self.page_size, self.head_dim) for kind in self.assignment.kinds
        )

    def with_kinds(self, chosen: Assignment) -> PageLayout:
        """The same blocks and costs, filled by slices of these kinds.

        Raises ValueError when they do not fit.
        """
        layout = replace(self, chosen=chosen)
        for level, places in enumerate(layout._places):
            if places is None:
                raise ValueError(f"chosen: the slices of level {level} exceed its blocks")
        return layout

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
        return kind_layouts(self.levels[level].pair, self.page_size, self.head_dim)

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
    def _alike(self) -> tuple[list[tuple[int, int]], ...]:
        """(block of the page, byte offset) of every slice in order layer, head, side; by level,
        where all are of its own pair."""
        places = []
        for level in range(len(self.levels)):
            keys, values = self.side_layouts(level)
            sizes = keys.size_bytes, values.size_bytes
            places.append(pack_alike(sizes, self.layers * self.kv_heads, self.block_bytes))
        return tuple(places)

    @cached_property
    def _places(self) -> tuple[list[tuple[int, int]] | None, ...]:
        """The same of the kinds that slices have; None where they do not fit."""
        return tuple(self._pack(level) for level in range(len(self.levels)))

    def _pack(self, level: int) -> list[tuple[int, int]] | None:
        sizes = self.slice_bytes(level)
        own = [side.size_bytes for side in self.side_layouts(level)] * (len(sizes) // SIDES)
        if all(size <= room for size, room in zip(sizes, own)):
            return self._alike[level]
        return pack_mixed(sizes, self.blocks[level], self.block_bytes)

    def slice_bytes(self, level: int) -> list[int]:
        """Sizes of the slices at a level, in order layer, head, side."""
        return [side.size_bytes for kind in self.assignment.of[level] for side in self.kinds[kind]]

    def kind_table(self) -> torch.Tensor:
        """Kinds of all heads: int32 [levels, layers, kv_heads]."""
        table = torch.tensor(self.assignment.of, dtype=torch.int32)
        return table.view(len(self.levels), self.layers, self.kv_heads)

    def kinds_at(self, levels: Iterable[int]) -> set[int]:
        """Kinds that slices at any of these levels have."""
        return set().union(*(self._kinds_of[level] for level in levels))

    @cached_property
    def _kinds_of(self) -> tuple[set[int], ...]:
        return tuple(set(kinds) for kinds in self.assignment.of)

    def descriptors(self, level: int) -> torch.Tensor:
        """Descriptors of a page at a level: int32 [layers, kv_heads, 2 (keys, values)]."""
        places = self._places[level]
        assert places is not None, "`with_kinds` has seen to it"
        patterns = [side for pair in self.assignment.pairs(level) for side in pair]
        words = [
            PATTERN_ID[pattern]
            | slot << PATTERN_BITS
            | offset // ALIGNMENT << (PATTERN_BITS + SLOT_BITS)
            for (slot, offset), pattern in zip(places, patterns, strict=True)
        ]
        return torch.tensor(words, dtype=torch.int32).view(self.layers, self.kv_heads, SIDES)


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


def kind_layouts(kind: Kind, page_size: int, head_dim: int) -> tuple[SliceLayout, SliceLayout]:
    """Slice layouts of a kind's keys and values."""
    keys, values = kind
    return slice_layout(keys, page_size, head_dim), slice_layout(values, page_size, head_dim)


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


_HOT: dict[int, Kind] = {bits: (Pattern(FrameKind.HOT, (bits,)),) * 2 for bits in (4, 8)}

_CACHED: dict[int, Kind] = {
    4: (_calibrated(6, 4, 4, 2), _calibrated(4, 4, 4, 4)),
    3: (_calibrated(4, 4, 2, 2), _calibrated(4, 4, 2, 2)),
    2: (_calibrated(4, 2, 2, 2), _calibrated(2, 2, 2, 2)),
}
"""Of warm and cold, by code bits: chosen by fidelity at equal bytes (docs/format.md)."""

_FINER: dict[Kind, Kind] = {
    _CACHED[4]: (_calibrated(8, 6, 6, 4), _calibrated(6, 6, 6, 6)),
    _CACHED[3]: _CACHED[4],
}
"""Of single heads where warm's pair is this: a few that copy lose with it what stands in the text
(docs/format.md)."""

_BETWEEN: dict[tuple[int, int], Kind] = {
    (4, 2): _CACHED[3],
    (4, 3): (_calibrated(6, 4, 4, 2), _calibrated(4, 4, 2, 2)),
    (3, 2): (_calibrated(4, 2, 2, 2), _calibrated(4, 4, 2, 2)),
}
"""Of cool, by the bits of warm and cold."""

_LAST: dict[int, Kind] = {
    3: _CACHED[2],
    2: (_calibrated(4, 2, 1, 1), _calibrated(2, 2, 2, 2)),
}
"""Of frozen, by the bits of cold."""


def default_levels(config: SphericalConfig) -> tuple[Level, ...]:
    """The levels of `TIERS`, with the patterns that the bits of `config` name."""
    warm, cold = config.warm_bits, config.cold_bits
    sides = _HOT[config.hot_bits], _CACHED[warm], _BETWEEN[warm, cold], _CACHED[cold], _LAST[cold]
    return tuple(Level(name, *pair) for name, pair in zip(TIERS, sides, strict=True))
