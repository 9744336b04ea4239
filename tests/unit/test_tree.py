"""The radix tree over pages of several levels, one thing at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from tree_case import (
    COLD,
    COOL,
    COST,
    FROZEN,
    KINDS,
    LAYOUT,
    LONG,
    MAX_TOKENS,
    PAGE,
    WARM,
    Cache,
    pages_of,
    path_levels,
    ready_cache,
    ready_frames_like_content,
)

from sglang_spherical.config import TIERS
from sglang_spherical.radix.tree import SETTLE_BYTES
from sglang_spherical.retention.executor import execute
from sglang_spherical.retention.operations import Lower


@pytest.fixture
def cache() -> Cache:
    return ready_cache()


def test_a_finished_prompt_settles_between_its_sinks_and_its_newest_tokens(cache: Cache) -> None:
    cache.serve(pages_of(*LONG))
    assert cache.levels(pages_of(*LONG)) == [0, 1, 1, 1, 1, 1, 0, 0]
    saved = 5 * (PAGE - COST[WARM])
    assert cache.allocator.available_size() == 4 * PAGE + saved
    assert cache.tree.evictable_size() == 8 * PAGE - saved
    cache.check()


def test_a_running_request_settles_at_the_end_of_its_prompt_and_not_before(cache: Cache) -> None:
    req = cache.start(pages_of(*LONG))
    for done in (2, 4, 6):
        assert cache.prefill(req, 2 * PAGE, last=False)
        assert cache.levels(pages_of(*LONG)) == [0] * done, "its own chunks see a hot prefix"
        cache.check()
    assert cache.prefill(req, 2 * PAGE, last=False)
    assert cache.levels(pages_of(*LONG)) == [0] * 8, "its first token is not held up"
    cache.tree.forward_launched()
    assert cache.levels(pages_of(*LONG)) == [0, 1, 1, 1, 1, 1, 0, 0]
    assert cache.tree.evictable_size() == 0
    assert cache.tree.protected_size() == 8 * PAGE - 5 * (PAGE - COST[WARM])
    cache.check()
    for _ in range(2 * PAGE):
        assert cache.decode(req, 5)
    cache.finish(req)
    cache.tree.forward_launched()
    assert cache.levels(list(req.tokens)) == [0, *[1] * 7, 0, 0], "its new tokens are the newest"
    cache.check()


def test_a_prompt_under_way_sees_its_prefix_hot_whoever_else_ends_on_it(cache: Cache) -> None:
    long = cache.start(pages_of(*LONG))
    assert cache.prefill(long, 6 * PAGE, last=False)
    cache.serve(pages_of(*LONG[:4]))
    assert cache.levels(pages_of(*LONG)) == [0] * 6
    assert cache.prefill(long, 2 * PAGE)
    cache.tree.forward_launched()
    assert cache.levels(pages_of(*LONG)) == [0, 1, 1, 1, 1, 1, 0, 0]
    cache.finish(long)
    cache.check()


def test_the_newest_tokens_of_a_running_request_stay_hot_for_it(cache: Cache) -> None:
    short = cache.start(pages_of(*LONG[:4]))
    assert cache.prefill(short, 4 * PAGE)
    long = cache.start(pages_of(*LONG))
    assert cache.prefill(long, 8 * PAGE)
    cache.tree.forward_launched()
    assert cache.levels(pages_of(*LONG)) == [0, 1, 0, 0, 1, 1, 0, 0]
    cache.finish(short, insert=False)
    cache.check()
    cache.finish(long)
    cache.tree.forward_launched()
    assert cache.levels(pages_of(*LONG)) == [0, 1, 1, 1, 1, 1, 0, 0]
    assert not cache.tree.held_hot
    cache.check()


@pytest.mark.parametrize(("budget", "level"), [*zip(TIERS, range(5))])
def test_the_budget_is_the_level_of_settled_pages(budget: str, level: int) -> None:
    cache = Cache(budget=budget, recent=0)
    ready_frames_like_content(cache)
    cache.serve(pages_of(*LONG))
    assert cache.levels(pages_of(*LONG)) == [0] + [level] * 7
    cache.check()


def test_nothing_is_lowered_below_the_watermark() -> None:
    cache = Cache(recent=0, watermark=0.5)
    ready_frames_like_content(cache)
    cache.serve(pages_of(*LONG[:5]))
    assert cache.levels(pages_of(*LONG[:5])) == [0] * 5, "5 of 12 pages are in use"
    cache.serve(pages_of(*LONG))
    assert cache.levels(pages_of(*LONG)) == [0] + [1] * 7
    cache.check()


def test_a_split_keeps_every_page_at_its_level(cache: Cache) -> None:
    cache.serve(pages_of(*LONG))
    before = cache.levels(pages_of(*LONG))
    for pages in (6, 1, 3):  # in the middle of hot and warm pages
        assert len(cache.match(pages_of(*LONG[:pages])).device_indices) == pages * PAGE
        assert cache.levels(pages_of(*LONG)) == before
        cache.check()
    req = cache.start([*pages_of(*LONG[:5]), 7])
    assert cache.prefill(req, 1)
    assert cache.tree.protected_size() == PAGE + 4 * COST[WARM]
    cache.check()
    cache.finish(req)
    assert cache.tree.protected_size() == 0
    cache.check()


def test_a_split_in_the_middle_of_mixed_levels(cache: Cache) -> None:
    """Every level in one node, cut where they change; each half is then lowered on its own."""
    cache = Cache(budget="hot")
    ready_frames_like_content(cache)
    cache.serve(pages_of(*LONG))
    (node, _, _) = next(cache.nodes())
    mixed = [0, FROZEN, WARM, COLD, COOL, 0, FROZEN, COLD]
    for level in range(1, len(TIERS)):
        pages = np.flatnonzero(np.array(mixed) == level)
        execute(cache.tree, [Lower(node, pages, level)])
    assert cache.levels(pages_of(*LONG)) == mixed
    cache.check()
    req = cache.start([*pages_of(*LONG[:4]), 7])
    assert cache.levels(pages_of(*LONG)) == mixed
    assert cache.tree.protected_size() == sum(COST[level] for level in mixed[:4])
    assert cache.tree.evictable_size() == sum(COST[level] for level in mixed[4:])
    cache.check()
    lower_half = sum(COST[level] - COST[FROZEN] for level in mixed[4:])
    assert cache.tree.evict(EvictParams(lower_half)).num_tokens_evicted == lower_half
    assert cache.levels(pages_of(*LONG)) == mixed[:4] + [FROZEN] * 4
    cache.check()
    cache.finish(req, insert=False)
    cache.check()


def test_pages_are_lowered_while_a_running_request_reads_them(cache: Cache) -> None:
    """By the budget of a request that ends on them; never by an eviction, and not its newest."""
    reader = cache.start([*pages_of(*LONG), 5])
    assert cache.prefill(reader, MAX_TOKENS)
    for _ in range(3):
        assert cache.decode(reader, 5)
        cache.serve([*pages_of(*LONG[:3]), *pages_of(2, 2)])
        assert cache.tree.evict(EvictParams(10**9)).num_tokens_evicted > 0
        assert cache.levels(pages_of(*LONG)) == [0, WARM, WARM, WARM, WARM, WARM, 0, 0]
        cache.check()
    held = [page for page, _ in path_levels(cache, reader.last_node)]
    row = cache.rows.req_to_token[reader.req_pool_idx, : reader.filled : PAGE].long() // PAGE
    assert row.tolist()[: len(held)] == held, "it reads the tree's own pages"
    cache.finish(reader)
    cache.check()


def test_pages_that_two_requests_computed_are_kept_once(cache: Cache) -> None:
    """Both start before either is cached; the second gives its own pages back."""
    one, two = cache.start(pages_of(*LONG[:4])), cache.start(pages_of(*LONG[:4]))
    assert cache.prefill(one, MAX_TOKENS)
    free = cache.allocator.available_size()
    assert cache.prefill(two, MAX_TOKENS)
    assert cache.allocator.available_size() >= free
    cache.check()
    cache.finish(one)
    cache.finish(two, insert=False)
    cache.check()
    assert cache.tree.protected_size() == 0
    assert len(cache.prefixes()) == 4


def test_an_aborted_request_leaves_what_was_cached_before(cache: Cache) -> None:
    cache.serve(pages_of(*LONG[:3]))
    before, free = cache.prefixes(), cache.allocator.available_size()
    req = cache.start(pages_of(*LONG))
    assert cache.prefill(req, MAX_TOKENS, last=True)
    for _ in range(5):
        cache.decode(req, 3)
    cache.finish(req, insert=False)
    cache.check()
    assert before <= cache.prefixes()
    again = cache.start([*pages_of(2, 2, 2), 1])
    assert cache.prefill(again, 2 * PAGE + 3, last=False)
    cache.finish(again, insert=False)  # aborted in the middle of its prompt
    cache.check()
    assert cache.allocator.available_size() <= free


def test_eviction_lowers_before_it_drops(cache: Cache) -> None:
    cache.serve(pages_of(*LONG))
    known = cache.prefixes()
    by_lowering = 5 * (COST[WARM] - COST[FROZEN]) + 2 * (PAGE - COST[FROZEN])
    assert cache.tree.evict(EvictParams(by_lowering)).num_tokens_evicted == by_lowering
    assert cache.prefixes() == known
    assert cache.levels(pages_of(*LONG)) == [0] + [FROZEN] * 7
    cache.check()
    assert cache.tree.evict(EvictParams(1)).num_tokens_evicted == PAGE + 7 * COST[FROZEN]
    assert not cache.prefixes(), "one node is dropped as a whole"
    cache.check()


def test_only_the_first_page_of_a_prefix_is_a_sink(cache: Cache) -> None:
    """Nodes deeper in the tree have no sinks of their own."""
    cache.serve(pages_of(0, 1, 2, 0))
    cache.serve(pages_of(0, 1, 1, 1))
    leaves = pages_of(0, 1, 2, 0), pages_of(0, 1, 1, 1)
    known = cache.prefixes()
    while cache.prefixes() == known:
        first, second = (cache.levels(leaf) for leaf in leaves)
        assert cache.tree.evict(EvictParams(1)).num_tokens_evicted >= 1
        cache.check()
    for levels in first, second:
        assert levels[0] == 0
        assert levels[1] > 0
        assert levels[2:] == [FROZEN] * 2


def test_shared_prefixes_yield_after_private_ones(cache: Cache) -> None:
    """A prompt that three requests have asked for, and two newer ones of one request each."""
    shared, *private = pages_of(0, 1, 2), pages_of(1, 1, 2), pages_of(2, 1, 2)
    for _ in range(3):
        cache.serve(shared)
    for prompt in private:
        cache.serve(prompt)
    whole = cache.prefixes()
    yielded = {}
    while cache.prefixes() == whole:
        levels = cache.levels(shared)[-1]
        others = [cache.levels(prompt)[-1] for prompt in private]
        yielded.setdefault(levels, min(others))
        cache.tree.evict(EvictParams(1))
        cache.check()
    assert all(least >= level for level, least in yielded.items()), "private ones go before"
    assert {0, WARM, COOL} <= set(yielded)
    assert len(cache.levels(shared)) == 3, "a private prompt is dropped first"


def test_the_clock_on_the_wall_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for reading in (itertools.count(0), itertools.count(0, -1)):
        monkeypatch.setattr("time.monotonic", lambda reading=reading: float(next(reading)))
        cache = Cache(pages=16)
        ready_frames_like_content(cache)
        for prompt in ((0, 1, 2), (1, 1, 2), (0, 1, 1), (2, 0, 1)):
            cache.serve(pages_of(*prompt))
            cache.match(pages_of(1, 1, 2))
            cache.tree.evict(EvictParams(30))
        found.append(sorted((tokens, node.levels.tolist()) for node, _, tokens in cache.nodes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("settle_pages", [1, 2, 3])
def test_no_more_than_it_may_is_lowered_between_two_forward_passes(settle_pages: int) -> None:
    cache = Cache(recent=0, settle_pages=settle_pages)
    ready_frames_like_content(cache)
    cache.serve(pages_of(*LONG[:6]))  # with one forward pass behind it
    for done in itertools.count(settle_pages, settle_pages):
        expected = [0, *([WARM] * done)[:5], *[0] * (5 - done)]
        assert cache.levels(pages_of(*LONG[:6])) == expected, "from the beginning"
        cache.check()
        if not cache.tree.unsettled:
            break
        cache.tree.forward_launched()  # nothing has been inserted
    assert done >= 5


def test_prefixes_that_share_pages_are_settled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call for a pair of levels, and no page twice."""
    cache = Cache(recent=0)
    prompts = pages_of(*LONG[:4], 0, 1), pages_of(*LONG[:4], 2, 2)
    requests = [cache.start(prompt) for prompt in prompts]
    for req in requests:
        assert cache.prefill(req, MAX_TOKENS)  # no frames yet: nothing is settled
    ready_frames_like_content(cache)
    for req in requests:
        cache.finish(req)
    calls: list[tuple[torch.Tensor, int, int]] = []
    lower = cache.allocator.lower

    def spy(pages: torch.Tensor, old: int, new: int) -> None:
        calls.append((pages, old, new))
        lower(pages, old, new)

    monkeypatch.setattr(cache.allocator, "lower", spy)
    cache.tree.forward_launched()
    ((pages, old, new),) = calls
    assert (old, new) == (0, WARM)
    assert len(pages.unique()) == len(pages) == 3 + 2 + 2
    for prompt in prompts:
        assert cache.levels(prompt) == [0] + [WARM] * 5
    cache.check()


def test_prefixes_wait_for_company_while_memory_is_ample() -> None:
    cache = Cache(recent=0, pages=20, patience=4)
    ready_frames_like_content(cache)
    cache.serve(pages_of(0, 1))  # and a pass
    cache.serve(pages_of(1, 0))
    assert cache.levels(pages_of(0, 1)) == cache.levels(pages_of(1, 0)) == [0, 0]
    cache.tree.forward_launched()
    assert len(cache.tree.unsettled) == 2
    cache.tree.forward_launched()
    assert cache.levels(pages_of(0, 1)) == cache.levels(pages_of(1, 0)) == [0, WARM]
    cache.serve(pages_of(2, 2))
    assert cache.levels(pages_of(2, 2)) == [0, 0], "the next ones wait anew"
    cache.tree.idle()
    assert cache.levels(pages_of(2, 2)) == [0, WARM]
    cache.check()


def test_a_prompt_waits_as_part_of_its_answer() -> None:
    cache = Cache(recent=0, pages=20, patience=100)
    ready_frames_like_content(cache)
    req = cache.start(pages_of(0, 1))
    assert cache.prefill(req, MAX_TOKENS)
    assert len(cache.tree.unsettled) == 1
    for token in pages_of(2):
        assert cache.decode(req, token)
    cache.finish(req)
    assert len(cache.tree.unsettled) == 1
    cache.tree.idle()
    assert cache.levels(pages_of(0, 1, 2)) == [0, WARM, WARM]
    assert not cache.tree.unsettled
    cache.check()


def test_no_prefix_waits_where_memory_is_short() -> None:
    cache = Cache(recent=0, pages=5, patience=100)
    ready_frames_like_content(cache)
    cache.serve(pages_of(0, 1, 2, 0))
    assert cache.levels(pages_of(0, 1, 2, 0)) == [0, 0, 0, 0]  # four of five are no more than 0.8
    cache.serve(pages_of(0, 1, 2, 0, 1))
    # behind the pass of its prefill, and then memory was ample again
    assert cache.levels(pages_of(0, 1, 2, 0, 1)) == [0, *[WARM] * 3, 0]
    cache.check()


def test_what_does_not_fit_behind_one_pass_goes_on_behind_the_next() -> None:
    cache = Cache(recent=0, pages=30, settle_pages=1, patience=2)
    ready_frames_like_content(cache)
    cache.serve(pages_of(0, 1, 2, 0))  # with the first pass that it waits for
    for done in (0, 1, 2, 3):
        assert cache.levels(pages_of(0, 1, 2, 0)) == [0, *[WARM] * done, *[0] * (3 - done)]
        cache.tree.forward_launched()
        if not done:
            cache.tree.forward_launched()
    cache.check()


def test_an_idle_server_settles_what_waits() -> None:
    cache = Cache(recent=0, settle_pages=2)
    ready_frames_like_content(cache)
    cache.serve(pages_of(*LONG[:6]))
    for done in (2, 4, 5):
        assert cache.levels(pages_of(*LONG[:6])) == [0, *[WARM] * done, *[0] * (5 - done)]
        cache.tree.idle()
        cache.check()
    assert not cache.tree.unsettled


def test_the_default_is_by_bytes() -> None:
    page = LAYOUT.hot_blocks * LAYOUT.block_bytes
    assert Cache(settle_pages=None).tree.settle_pages == SETTLE_BYTES // page


def test_what_waits_to_settle_may_be_dropped_or_flushed() -> None:
    cache = Cache(recent=0, settle_pages=1)
    ready_frames_like_content(cache)
    cache.serve(pages_of(*LONG[:6]))
    assert cache.tree.unsettled
    cache.tree.evict(EvictParams(10**9))
    assert not cache.tree.unsettled
    cache.serve(pages_of(*LONG[:6]))
    cache.flush()
    assert not cache.tree.unsettled
    cache.check()


def test_waiting_pages_that_a_request_reads_hot_stay_hot() -> None:
    cache = Cache(recent=0, settle_pages=1)
    ready_frames_like_content(cache)
    cache.serve(pages_of(*LONG[:6]))
    assert cache.levels(pages_of(*LONG[:6])) == [0, WARM, 0, 0, 0, 0]
    reader = cache.start(pages_of(*LONG))
    assert cache.prefill(reader, PAGE, last=False)  # its prompt is under way
    before = cache.levels(pages_of(*LONG[:6]))
    for _ in range(3):
        cache.serve(pages_of(1))
        cache.tree.forward_launched()
    assert cache.levels(pages_of(*LONG[:6])) == before
    assert cache.prefill(reader, PAGE, last=False)
    cache.finish(reader)
    assert cache.levels(pages_of(*LONG))[-3:] == [0, 0, 0], "the last ones wait"
    while cache.tree.unsettled:
        cache.tree.forward_launched()
    assert cache.levels(pages_of(*LONG)) == [0] + [WARM] * 7
    cache.check()


def test_hot_originals_replace_what_is_colder_than_the_budget() -> None:
    """Two requests compute the same prompt; the first one's pages have been lowered when the second
    one brings its own."""
    cache = Cache(recent=0, pages=20)
    ready_frames_like_content(cache)
    first, second = (cache.start(pages_of(*LONG[:6])) for _ in range(2))
    assert cache.prefill(first, MAX_TOKENS, last=False)
    cache.finish(first)
    while max(cache.levels(pages_of(*LONG[:6]))) < COLD:
        cache.tree.evict(EvictParams(1))
    lowered = cache.levels(pages_of(*LONG[:6]))
    assert {COLD} <= set(lowered) <= {0, WARM, COOL, COLD}
    assert cache.prefill(second, MAX_TOKENS, last=False)
    assert cache.levels(pages_of(*LONG[:6])) == [0] * 6
    cache.check()
    cache.tree.forward_launched()
    assert cache.levels(pages_of(*LONG[:6])) == [0] + [WARM] * 5
    cache.check()
    cache.finish(second)
    cache.check()


def test_a_promotion_without_memory_moves_nothing() -> None:
    cache = Cache(recent=0, pages=20)
    ready_frames_like_content(cache)
    cached, originals = (cache.allocator.alloc(2 * PAGE)[::PAGE] // PAGE for _ in range(2))
    cache.allocator.lower(cached, 0, COLD)
    before = cache.pool.arena.page_blocks.clone()
    while cache.allocator.available_size() >= PAGE - COST[COLD]:
        cache.allocator.free_tokens -= 1
    assert cache.allocator.promote(cached, COLD, originals) == 0
    assert torch.equal(cache.pool.arena.page_blocks, before)


def test_a_promotion_takes_no_more_memory_than_is_free() -> None:
    cache = Cache(recent=0, pages=20, settle_pages=1)
    ready_frames_like_content(cache)
    first, second = (cache.start(pages_of(*LONG[:6])) for _ in range(2))
    assert cache.prefill(first, MAX_TOKENS, last=False)
    cache.finish(first)
    while min(cache.levels(pages_of(*LONG[:6]))[1:]) < COLD:
        cache.tree.evict(EvictParams(1))
    room = 2 * (PAGE - COST[COLD]) + 1  # for two promotions
    spare = (cache.allocator.available_size() - 6 * PAGE - room) // PAGE * PAGE
    taken = cache.allocator.alloc(spare)
    left = cache.allocator.available_size() - 6 * PAGE
    assert cache.prefill(second, MAX_TOKENS, last=False)
    levels = cache.levels(pages_of(*LONG[:6]))
    promoted = left // (PAGE - COST[COLD])
    assert 2 <= promoted <= 4 and levels[1 + promoted :] == [COLD] * (5 - promoted)
    assert set(levels[1 : 1 + promoted]) <= {0, WARM}
    cache.allocator.free(taken)
    cache.check()


def test_above_the_high_watermark_pages_are_lowered_beyond_the_budget() -> None:
    cache = Cache(recent=0, high_watermark=0.7)
    ready_frames_like_content(cache)
    for first in range(3):
        cache.serve(pages_of(first, *LONG[:5]))
        cache.check()
    used = 1 - cache.allocator.available_size() / cache.allocator.size
    assert len(cache.prefixes()) == 18, "nothing is dropped for it"
    assert used <= 0.7
    assert cache.levels(pages_of(0, *LONG[:5]))[1] > WARM
    plain = Cache(recent=0)
    ready_frames_like_content(plain)
    for first in range(3):
        plain.serve(pages_of(first, *LONG[:5]))
    assert plain.allocator.available_size() < cache.allocator.available_size()


def test_the_high_watermark_is_kept_behind_forward_passes_too() -> None:
    cache = Cache(recent=0, high_watermark=0.7, settle_pages=1)
    ready_frames_like_content(cache)
    for first in range(3):
        cache.serve(pages_of(first, *LONG[:5]))
    for _ in range(40):
        cache.tree.forward_launched()
        cache.check()
    assert not cache.tree.unsettled
    assert 1 - cache.allocator.available_size() / cache.allocator.size <= 0.7
    assert len(cache.prefixes()) == 18, "nothing is dropped for it"


def test_everything_can_be_evicted_at_once(cache: Cache) -> None:
    for first in range(3):
        cache.serve(pages_of(first, 0, 1))
    held = cache.tree.evictable_size()
    assert cache.tree.evict(EvictParams(10**9)).num_tokens_evicted == held
    assert cache.allocator.available_size() == cache.allocator.size
    assert cache.tree.evictable_size() == 0
    assert not cache.prefixes()
    cache.check()
    assert cache.tree.evict(EvictParams(1)).num_tokens_evicted == 0


def test_locked_pages_are_not_evicted(cache: Cache) -> None:
    req = cache.start(pages_of(*LONG))
    assert cache.prefill(req, MAX_TOKENS)
    cache.tree.forward_launched()
    before = cache.levels(pages_of(*LONG))
    assert cache.tree.evict(EvictParams(10**9)).num_tokens_evicted == 0
    assert cache.levels(pages_of(*LONG)) == before
    cache.check()


def test_what_is_due_is_lowered_before_anything_is_dropped() -> None:
    cache = Cache(pages=16, recent=0, patience=100)
    ready_frames_like_content(cache)
    cache.serve(pages_of(1, 1))
    req = cache.start(pages_of(*LONG))
    assert cache.prefill(req, MAX_TOKENS)
    assert cache.levels(pages_of(*LONG)) == [0] * 8
    need = 3 * PAGE  # more than the other prefix has
    assert cache.tree.evict(EvictParams(need)).num_tokens_evicted >= need
    assert cache.levels(pages_of(*LONG)) == [0, *[WARM] * 7], "although a request holds them"
    assert cache.levels(pages_of(1, 1)) == [0, WARM]
    cache.check()


def test_before_frames_are_ready_eviction_only_drops() -> None:
    cache = Cache()
    cache.serve(pages_of(0, 1, 2))
    cache.serve(pages_of(1, 1, 2))
    assert cache.tree.evict(EvictParams(1)).num_tokens_evicted == 3 * PAGE
    assert {tokens[0] for _, tokens in cache.prefixes()} == {PAGE}, "the older one is gone"
    assert set(cache.levels(pages_of(1, 1, 2))) == {0}
    cache.check()


def test_page_ids_do_not_run_out_before_blocks_do() -> None:
    """As many cold pages as the memory can hold, and still every free block can be allocated."""
    cache = Cache(budget="cold", recent=0)
    ready_frames_like_content(cache)
    ending = 0
    while cache.allocator.available_size() >= 3 * PAGE and ending < 100:
        cache.serve(pages_of(*_digits(ending)))
        ending += 1
        cache.check()
    assert len(cache.prefixes()) > cache.pages, "more pages than hot ones would fit"
    loc = cache.allocator.alloc(cache.allocator.available_size() // PAGE * PAGE)
    assert loc is not None
    cache.allocator.free(loc)
    cache.check()


def _digits(number: int) -> tuple[int, ...]:
    return number % KINDS, number // KINDS % KINDS, number // KINDS**2 % KINDS


def test_a_flush_gives_everything_back(cache: Cache) -> None:
    cache.serve(pages_of(*LONG))
    cache.tree.evict(EvictParams(30))
    cache.flush()
    assert cache.allocator.available_size() == cache.allocator.size == cache.pages * PAGE
    assert cache.tree.evictable_size() == cache.tree.protected_size() == 0
    assert len(cache.match(pages_of(*LONG)).device_indices) == 0
    cache.check()
    ready_frames_like_content(cache)
    cache.serve(pages_of(*LONG))
    cache.check()


def test_namespaces_share_nothing(cache: Cache) -> None:
    cache.serve(pages_of(0, 1, 2, 0), "adapter")
    assert len(cache.match(pages_of(0, 1, 2, 0)).device_indices) == 0
    assert len(cache.match(pages_of(0, 1, 2, 0), "adapter").device_indices) == 4 * PAGE
    cache.serve(pages_of(0, 1, 2, 0))
    cache.check()


def test_ranks_decide_alike_whatever_their_heads_hold() -> None:
    """Tensor-parallel ranks see other keys and values, and must lower and drop the same pages."""
    ranks = [Cache(), Cache()]
    ready_frames_like_content(ranks[0])
    ready_frames_like_content(ranks[1], spoil=torch.nan)
    for prompt in (LONG, (*LONG[:4], 2, 2, 2), (1, 1, 1), LONG[:5]):
        for rank in ranks:
            rank.serve(pages_of(*prompt))
            rank.tree.evict(EvictParams(20))
    books = [
        sorted((tokens, node.levels.tolist(), node.value.tolist()) for node, _, tokens in r.nodes())
        for r in ranks
    ]
    assert books[0] == books[1]
    assert ranks[0].allocator.free_blocks.tolist() == ranks[1].allocator.free_blocks.tolist()
