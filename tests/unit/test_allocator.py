"""The allocator of a tree in use: token locations, blocks and page ids."""

from __future__ import annotations

import pytest
import torch
from tree_case import (
    MAX_TOKENS,
    PAGE,
    Cache,
    pages_of,
    ready_cache,
)

from sglang_spherical.pool.allocator import SphericalAllocator


@pytest.fixture
def cache() -> Cache:
    return ready_cache()


def test_new_tokens_go_on_where_the_request_stopped(cache: Cache) -> None:
    """A batch of extends: full pages, parts of pages, and prefixes that end inside a page."""
    before, after = torch.tensor([0, 5, 16, 20, 31]), torch.tensor([20, 9, 32, 50, 32])
    starts = cache.allocator.alloc(3 * PAGE)  # the last pages of requests 1, 3 and 4
    last_loc = torch.tensor([-1, starts[4], 999, starts[PAGE + 3], starts[2 * PAGE + 14]])
    free = cache.allocator.available_size()
    count = int((after - before).sum())
    loc = cache.allocator.alloc_extend(before, before, after, after, last_loc, count)
    assert len(set(loc.tolist())) == count == len(loc)
    assert cache.allocator.available_size() == free - PAGE * (2 + 0 + 1 + 2 + 0)
    for i, new in enumerate(loc.split((after - before).tolist())):
        places = torch.arange(int(before[i]), int(after[i]))
        assert bool((new % PAGE == places % PAGE).all())
        joined = new.clone()
        if int(before[i]) % PAGE:
            joined = torch.cat([last_loc[i].view(1), joined])
            places = torch.cat([places[:1] - 1, places])
        same_page = places[1:] // PAGE == places[:-1] // PAGE
        assert bool((joined.diff()[same_page] == 1).all())


def test_a_decode_step_opens_pages_only_for_those_that_need_one(cache: Cache) -> None:
    lengths = torch.tensor([17, 5, 33, 16])  # with the new token
    last = torch.tensor([15, 100, 47, 200])
    free = cache.allocator.available_size()
    loc = cache.allocator.alloc_decode(lengths, lengths, last)
    assert loc[[1, 3]].tolist() == [101, 201]
    assert bool((loc[[0, 2]] % PAGE == 0).all())
    assert loc[0] != loc[2]
    assert cache.allocator.available_size() == free - 2 * PAGE


def test_what_does_not_fit_is_refused_and_changes_nothing(cache: Cache) -> None:
    allocator = cache.allocator
    assert allocator.alloc(11 * PAGE) is not None
    zero, long = torch.tensor([0, 0]), torch.tensor([16, 1])
    assert allocator.alloc(2 * PAGE) is None
    assert allocator.alloc_extend(zero, zero, long, long, zero - 1, 17) is None
    assert allocator.alloc_decode(long + 16, long + 16, zero + 5) is not None, "one new page"
    ones = torch.tensor([1])
    assert allocator.alloc_decode(ones, ones, ones) is None
    assert allocator.available_size() == 0


def test_page_ids_that_wait_to_be_sorted_are_used_in_time(cache: Cache) -> None:
    allocator = SphericalAllocator(cache.pool, need_sort=True)
    ids = cache.pool.arena.num_pages - 1
    for _ in range(5 * ids):
        loc = allocator.alloc(10 * PAGE)
        assert loc is not None
        allocator.free(loc)
        assert len(allocator.free_pages) + len(allocator.release_pages) == ids
        assert allocator.available_size() == allocator.size


def test_frees_may_be_gathered(cache: Cache) -> None:
    cache.serve(pages_of(0, 1))
    req = cache.start([*pages_of(1, 1, 1), 4])
    assert cache.prefill(req, MAX_TOKENS)
    free = cache.allocator.available_size()
    cache.allocator.free_group_begin()
    cache.finish(req, insert=False)
    assert cache.allocator.available_size() == free
    cache.allocator.free_group_end()
    cache.check()
    assert cache.allocator.available_size() == free + PAGE
