"""The tables of an extend: pages by kind, tiles, items, addresses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from extend_case import DEVICE

from spherical_kernels.extend.tables import (
    ExtendTables,
    build_tables,
    cut_tiles,
    locate_entries,
    pages_per_item,
)

PAGE = 16


def tables_of(prefixes: list[int], lengths: list[int], levels: list[list[int]]) -> ExtendTables:
    """Page ids count from 5, request by request."""
    req_to_token = torch.full((len(prefixes), 200), 1 << 20, dtype=torch.int32)
    page = 5
    for row, mine in zip(req_to_token, levels):
        for index in range(len(mine)):
            row[index * PAGE : (index + 1) * PAGE] = page * PAGE + torch.arange(PAGE)
            page += 1
    page_level = torch.tensor([0] * 5 + [one for mine in levels for one in mine]).to(torch.uint8)
    on_device = (x.to(DEVICE) for x in (req_to_token, torch.arange(len(prefixes)), page_level))
    return build_tables(
        *on_device, prefixes, lengths,
        page_size=PAGE, group=2, levels=3, present=range(3), tile_rows=64, most_items=4,
    )  # fmt: skip


def test_pages_are_sorted_by_kind_and_stay_in_order() -> None:
    tables = tables_of([70, 0, 32], [10, 3, 1], [[0, 2, 1, 1, 0], [], [1, 0]])
    assert tables.pages.tolist() == [5, 9, 7, 8, 6, 11, 10]
    assert tables.page_levels.tolist() == [0, 0, 1, 1, 2, 0, 1]
    assert tables.runs.tolist() == [0, 2, 4, 5, 5, 5, 5, 6, 7, 7]
    assert tables.requests.tolist() == [[0, 10, 6, 0], [10, 3, 0, 0], [13, 1, 16, 0]]


def test_no_prefix_makes_tiles_without_items() -> None:
    tables = tables_of([0], [40], [[]])
    assert tables.tiles.tolist() == [[0, 0, 0, 0], [0, 64, 0, 0]]
    assert tables.items.shape == (0, 4) and tables.pages.shape == (0,)


def test_a_request_without_new_tokens_has_no_tiles() -> None:
    tables = tables_of([16, 16], [0, 1], [[0], [0]])
    assert tables.tiles[:, 0].tolist() == [1]


@pytest.mark.parametrize("most_items", [1, 3, 64, 1000])
def test_items_cover_every_tile(most_items: int) -> None:
    pages, rows = np.array([512, 3, 0, 40]), np.array([1024, 64, 100, 65])
    tiles, items = cut_tiles(pages, rows, 64, most_items)
    assert [list(t[:2]) for t in tiles if t[0] == 3] == [[3, 0], [3, 64]]
    for request, first_row, first_item, splits in tiles.tolist():
        mine = items[first_item : first_item + splits]
        assert (mine[:, 0] == request).all() and (mine[:, 1] == first_row).all()
        assert mine[:, 2].tolist() == list(range(splits))
        assert (mine[:, 3] == splits).all() and splits <= max(pages[request], 0)
        assert bool(splits) == bool(pages[request])
    assert len(items) == tiles[:, 3].sum()


def test_few_tiles_are_cut_to_fill_the_device() -> None:
    tiles, items = cut_tiles(np.array([512]), np.array([64]), 64, 33)
    assert len(tiles) == 1 and 30 <= len(items) <= 33


def test_many_tiles_stay_whole() -> None:
    assert pages_per_item(np.array([512]), np.array([4096]), 33) == 512


def test_addresses_follow_block_and_offset() -> None:
    tables = tables_of([48], [1], [[0, 2, 1]])
    page_blocks = torch.arange(40, dtype=torch.int32).view(10, 4)
    places = torch.randint(0, 4, (3, 5, 2, 2, 2)).int()  # levels, layers, heads, sides
    places[..., 1] *= 25
    given = page_blocks.to(DEVICE), places.to(DEVICE)
    entries = locate_entries(tables, *given, 1 << 33).cpu()
    assert entries.shape == (5, 2, 3, 2) and entries.dtype == torch.int64
    for n, (page, kind) in enumerate([(5, 0), (7, 1), (6, 2)]):
        blocks = page_blocks[page, places[kind, ..., 0].long()].long()
        assert torch.equal(entries[:, :, n], blocks * (1 << 33) + places[kind, ..., 1])
    some = locate_entries(tables, given[0], given[1][:, 3:4], 1 << 33)
    assert torch.equal(some[0].cpu(), entries[3])


def test_one_prefix_per_request() -> None:
    with pytest.raises(ValueError, match="prefixes: expected 1, one per request, got 2"):
        tables_of([16, 16], [1], [[0], [0]])
