"""The arena: one buffer of bytes, and the tables that say which of them a page owns.

    page_blocks[page, :n(level)]            blocks of the page, [0, n(level)) is valid
    page_level[page]                        its level
    descriptors[layer, page, head, side]    pattern and place (block of the page, offset) of a slice
    places[level, layer, head, side]        the same place, of every page at a level

A slice's address is page_blocks[page, slot] * block_bytes + offset. Page 0 is SGLang's padding
sink:
it owns the first H blocks for good, so that padded rows read and write real storage.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from sglang_spherical.pool.layout import SIDES, PageLayout, split_descriptor
from spherical_kernels.codec.slices import ALIGNMENT, SliceLayout, slice_layout
from spherical_kernels.retier.launch import Move, Moves

KEYS, VALUES = 0, 1


class Arena:
    """Bytes and tables of one rank.

    num_blocks  blocks of capacity; H more are held for page 0
    num_pages   logical page ids, page 0 included
    kinds       slice layouts of keys and values, by kind
    kind_of     int32 [levels, layers, kv_heads], the kind of every head
    kind_levels int32 [layers, kinds, kv_heads, 2], levels [first, end) at which a head has a kind
    region      where the bytes are allocated (SGLang's memory saver); the tables lie outside it
    """

    def __init__(
        self,
        layout: PageLayout,
        num_blocks: int,
        num_pages: int,
        device: torch.device | str,
        region: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_pages = num_pages
        blocks = num_blocks + layout.hot_blocks
        with region():
            self.bytes = torch.zeros(blocks * layout.block_bytes, dtype=torch.uint8, device=device)
        self._words = self.bytes.view(torch.int64)
        self._halves = self.bytes.view(torch.float16)
        table = (layout.layers, num_pages, layout.kv_heads, SIDES)
        self.descriptors = torch.zeros(table, dtype=torch.int32, device=device)
        self.page_blocks = torch.zeros(
            num_pages, layout.hot_blocks, dtype=torch.int32, device=device
        )
        self.page_level = torch.zeros(num_pages, dtype=torch.uint8, device=device)
        self.kinds = layout.kinds
        slices = layout.layers, layout.kv_heads
        levels = len(layout.levels)
        self.kind_of = torch.zeros(levels, *slices, dtype=torch.int32, device=device)
        of_kinds = layout.layers, len(self.kinds), layout.kv_heads, 2
        self.kind_levels = torch.zeros(of_kinds, dtype=torch.int32, device=device)
        self.places = torch.zeros(levels, *slices, SIDES, 2, dtype=torch.int32, device=device)
        self.moves = cache(self._moves)
        self.assign(layout)
        sink = torch.arange(layout.hot_blocks, device=device)
        self.place_pages(torch.zeros(1, dtype=torch.int64, device=device), sink.unsqueeze(0))

    def assign(self, layout: PageLayout) -> None:
        """Gives heads the kinds that they have in `layout`, otherwise the arena's own, from now on:
        every page must be hot. Tables keep their addresses, for graphs."""
        self.layout = layout
        self._templates = [layout.descriptors(i).to(self.device) for i in range(len(layout.levels))]
        self.kind_of.copy_(layout.kind_table())
        kinds = torch.arange(len(self.kinds), device=self.device).view(-1, 1, 1, 1)
        ends = [(self.kind_of < kinds).sum(1), (self.kind_of <= kinds).sum(1)]
        self.kind_levels.copy_(torch.stack(ends, -1).transpose(0, 1))
        _, slot, offset = split_descriptor(torch.stack(self._templates))
        self.places.copy_(torch.stack((slot, offset), -1))
        self.moves.cache_clear()

    @property
    def device(self) -> torch.device:
        return self.bytes.device

    @property
    def table_bytes(self) -> int:
        """Memory of the tables."""
        words = self.descriptors.numel() + self.page_blocks.numel()
        return 4 * words + self.page_level.numel()

    def place_pages(self, pages: torch.Tensor, blocks: torch.Tensor) -> None:
        """Makes pages [n] hot pages on blocks [n, H]."""
        self.page_blocks[pages] = blocks.to(torch.int32)
        self.set_level(pages, 0)

    def set_level(self, pages: torch.Tensor, level: int) -> None:
        """Gives pages [n] the descriptors of a level; their bytes are the caller's
        matter."""
        self.page_level.index_fill_(0, pages, level)
        self.descriptors[:, pages] = self._templates[level].unsqueeze(1)

    def _moves(self, old: int, new: int) -> Moves:
        """What re-encoding from one level to a lower one does to every slice."""
        layout = self.layout
        found = [
            Move(
                side,
                slice_layout(before, layout.page_size, layout.head_dim),
                slice_layout(after, layout.page_size, layout.head_dim),
                torch.tensor(slices, dtype=torch.int32, device=self.device),
            )
            for (side, before, after), slices in layout.assignment.moves(old, new).items()
        ]
        return Moves.over(found, self.places[old], self.places[new], layout.slice_bytes(new))

    def locate(
        self, pages: torch.Tensor, layer: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pattern ids and byte addresses of the slices of pages [n].

        Both int64 [n, kv_heads, 2], or [layers, n, kv_heads, 2] for all layers at once.
        """
        table = self.descriptors if layer is None else self.descriptors[layer]
        pattern, slot, offset = split_descriptor(table[..., pages, :, :])
        block = self.page_blocks[pages.view(-1, 1, 1), slot]
        return pattern, block.long() * self.layout.block_bytes + offset

    def read_slices(self, layout: SliceLayout, addresses: torch.Tensor) -> torch.Tensor:
        """The slices at byte addresses [n], uint8 [n, size_bytes]."""
        return self._windows(layout)[addresses // ALIGNMENT].view(torch.uint8)

    def write_slices(
        self, layout: SliceLayout, addresses: torch.Tensor, slices: torch.Tensor
    ) -> None:
        """slices uint8 [n, size_bytes] to byte addresses [n]."""
        self._windows(layout)[addresses // ALIGNMENT] = slices.view(torch.complex128)

    def write_tokens(
        self,
        layout: SliceLayout,
        addresses: torch.Tensor,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        radii: torch.Tensor,
    ) -> None:
        """New tokens into hot slices.

        addresses  int64 [n, heads], byte address of the slice of each token
        tokens     int64 [n], place of the token in its page
        rows       uint8 [n, heads, row_bytes], packed codes
        radii      float16 [n, heads]
        """
        (tile,) = layout.tiles
        start = addresses + tile.offset_bytes + (tokens * tile.row_bytes).unsqueeze(-1)
        words = torch.arange(tile.row_bytes // 8, device=self.device)
        self._words[(start // 8).unsqueeze(-1) + words] = rows.view(torch.int64)
        at = addresses + layout.radii_offset_bytes + (tokens * 2).unsqueeze(-1)
        self._halves[at // 2] = radii

    def _windows(self, layout: SliceLayout) -> torch.Tensor:
        """A view [places, size_bytes / 16] of every place a slice may start at.

        The element type is of no matter but for its 16 bytes.
        """
        units = self.bytes.view(torch.complex128)
        length, step = layout.size_bytes // units.itemsize, ALIGNMENT // units.itemsize
        return units.as_strided(((len(units) - length) // step + 1, length), (step, 1))
