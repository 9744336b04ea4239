"""The radix tree, the allocator and the pool together, driven as SGLang's scheduler drives them.

A state machine serves requests against a small cache: prefix hits, chunked prefill, decoding,
finishing, aborts, evictions, flushes. After every step memory must add up, nothing may be owned
twice, and every cached token must still say what was written for it.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cache_tools import Layer, normal, unlike_heads, write
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_spherical.config import TIERS, SphericalConfig
from sglang_spherical.pool.allocator import SphericalAllocator
from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.layout import SIDES, PageLayout, default_levels
from sglang_spherical.radix.tree import SETTLE_BYTES, SphericalRadixCache
from sglang_spherical.retention.executor import execute
from sglang_spherical.retention.operations import SINK_PAGES, Lower
from spherical_kernels.codec.pages import decode_slices

PAGE = 16
KINDS = 3  # kinds of page content; a page of kind t holds tokens 16 t .. 16 t + 15
RECENT = 32
MAX_TOKENS = 12 * PAGE

LAYOUT = PageLayout(PAGE, 32, 4, 2, default_levels(SphericalConfig("spherical")), 16, 864)
"""Small pages, and yet no two levels cost the same: a block holds one hot slice, or one and a
half."""

UNLIKE = unlike_heads(LAYOUT)

WARM, COOL, COLD, FROZEN = range(1, len(TIERS))
COST = LAYOUT.cost_tokens

VOCABULARY = KINDS * PAGE
MEAN = torch.stack([2 * normal(LAYOUT.layers, 1, 2, 32, seed=side) for side in (1, 2)])
CONTENT = MEAN + normal(SIDES, LAYOUT.layers, VOCABULARY, 2, 32, seed=3)
"""Keys and values [2, layers, vocabulary, kv_heads, d]: a token always says the same."""

FAR_OFF = 0.8
"""Root mean square error of a token that no level explains: cold is 0.33 of a unit normal, twice
re-encoded below 0.4; another token's content is sqrt(2) off, with 1/16 standard error."""


class Request:
    """What the tree reads of SGLang's Req."""

    def __init__(self, prompt: list[int], extra_key: str | None) -> None:
        self.origin_input_ids = array("q", prompt)
        self.output_ids = array("q")
        self.extra_key = extra_key
        self.req_pool_idx: int | None = None
        self.cache_protected_len = 0
        self.last_node: Any = None
        self.prefix_indices = torch.zeros(0, dtype=torch.int64)
        self.filled = 0  # tokens with keys and values
        self.priority = 0

    @property
    def tokens(self) -> array[int]:
        return self.origin_input_ids + self.output_ids

    @property
    def prefilled(self) -> bool:
        return self.filled >= len(self.origin_input_ids)

    def get_fill_ids(self) -> array[int]:
        return self.tokens[: self.filled]


@dataclass
class Cache:
    """A pool, its allocator and its tree, and the requests that run on them."""

    pages: int = 12
    recent: int = RECENT
    budget: str = "warm"
    watermark: float = 0.0
    high_watermark: float = 1.0
    settle_pages: int | None = 256
    layout: PageLayout = LAYOUT
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = SphericalConfig(
            "spherical",
            budget=self.budget,
            recent_tokens=self.recent,
            watermark=self.watermark,
            high_watermark=self.high_watermark,
            settle_pages=self.settle_pages,
        )
        layers = self.layout.layers
        self.pool = SphericalKVPool(self.pages * PAGE, self.layout, "cpu", False, 0, layers)
        self.allocator = SphericalAllocator(self.pool)
        self.rows = ReqToTokenPool(8, MAX_TOKENS + PAGE, "cpu", False)
        params = CacheInitParams(False, self.rows, self.allocator, PAGE)
        self.tree = SphericalRadixCache(params, config)

    # --- the scheduler's steps ---

    def start(self, prompt: list[int], extra_key: str | None = None) -> Request:
        """Matches a prompt's prefix and locks it, as a request that is about to be scheduled."""
        req = Request(prompt, extra_key)
        match = self.match(prompt[:-1], extra_key)
        req.prefix_indices, req.last_node = match.device_indices, match.last_device_node
        req.cache_protected_len = req.filled = len(req.prefix_indices)
        self.tree.inc_lock_ref(req.last_node)
        req.req_pool_idx = self.rows.free_slots.pop()
        self.rows.write((req.req_pool_idx, slice(0, req.filled)), req.prefix_indices)
        self.requests.append(req)
        return req

    def match(self, tokens: list[int], extra_key: str | None = None) -> Any:
        return self.tree.match_prefix(MatchPrefixParams(RadixKey(array("q", tokens), extra_key)))

    def make_room(self, tokens: int) -> bool:
        """Evicts what is short, once, and says whether that was enough."""
        short = tokens - self.allocator.available_size()
        if short > 0:
            self.tree.evict(EvictParams(short))
        return self.allocator.available_size() >= tokens

    def prefill(self, req: Request, tokens: int, last: bool = True) -> bool:
        """The next `tokens` of a prompt; False, with nothing done, when memory is short."""
        end = min(req.filled + tokens, len(req.origin_input_ids))
        pages = -(-end // PAGE) - -(-req.filled // PAGE)
        if not self.make_room(pages * PAGE):
            return False
        row = self.rows.req_to_token[req.req_pool_idx]
        before, after = torch.tensor([req.filled]), torch.tensor([end])
        last_loc = row[req.filled - 1 : req.filled].long() if req.filled else torch.tensor([-1])
        loc = self.allocator.alloc_extend(before, before, after, after, last_loc, end - req.filled)
        assert loc is not None, "available_size() promised it"
        self._fill(req, loc)
        self.tree.forward_launched()
        if req.prefilled or not last:
            self.tree.cache_unfinished_req(req, chunked=not req.prefilled)
        return True

    def decode(self, req: Request, token: int) -> bool:
        """One more token; False, with nothing done, when memory is short."""
        if req.filled % PAGE == 0 and not self.make_room(PAGE):
            return False
        req.output_ids.append(token)
        row = self.rows.req_to_token[req.req_pool_idx]
        length = torch.tensor([req.filled + 1])
        last_loc = row[req.filled - 1 : req.filled].long()
        loc = self.allocator.alloc_decode(length, length, last_loc)
        assert loc is not None, "available_size() promised it"
        self._fill(req, loc)
        self.tree.forward_launched()
        return True

    def _fill(self, req: Request, loc: torch.Tensor) -> None:
        end = req.filled + len(loc)
        tokens = torch.tensor(req.tokens[req.filled : end])
        self.rows.write((req.req_pool_idx, slice(req.filled, end)), loc)
        write(self.pool, loc, *CONTENT[:, :, tokens])
        req.filled = end

    def finish(self, req: Request, insert: bool = True) -> None:
        """The request is done (or aborted, or retracted: then nothing is inserted)."""
        self.tree.cache_finished_req(req, is_insert=insert, kv_len_to_handle=req.filled)
        self.rows.free_slots.append(req.req_pool_idx)
        self.requests.remove(req)

    def serve(self, prompt: list[int], extra_key: str | None = None) -> None:
        """A whole request, from its prompt to the end of it, and the pass behind it."""
        req = self.start(prompt, extra_key)
        assert self.prefill(req, len(prompt))
        self.finish(req)
        self.tree.forward_launched()

    def flush(self) -> None:
        assert not self.requests
        self.tree.reset()
        self.allocator.clear()

    # --- what is in it ---

    def nodes(self) -> Iterator[tuple[Any, int, tuple[int, ...]]]:
        """Every node, the pages before it, and the tokens of its prefix and itself."""
        stack = [(child, 0, ()) for child in self.tree.root_node.children.values()]
        while stack:
            node, first, before = stack.pop()
            tokens = (*before, *node.key.token_ids)
            yield node, first, tokens
            pages = len(node.key) // PAGE
            stack += [(child, first + pages, tokens) for child in node.children.values()]

    def prefixes(self) -> set[tuple[str | None, tuple[int, ...]]]:
        """Every page-aligned prefix that is cached, with its namespace."""
        return {
            (node.key.extra_key, tokens[: PAGE * (first + i + 1)])
            for node, first, tokens in self.nodes()
            for i in range(len(node.key) // PAGE)
        }

    def levels(self, tokens: list[int], extra_key: str | None = None) -> list[int]:
        """Level of every page of the cached prefix of some tokens."""
        node, found = self.match(tokens, extra_key).last_device_node, []
        while node is not self.tree.root_node:
            found = [*node.levels.tolist(), *found]
            node = node.parent
        return found

    def tree_pages(self) -> set[int]:
        return {page for node, _, _ in self.nodes() for page in self.tree.page_ids(node).tolist()}

    def request_pages(self, req: Request) -> torch.Tensor:
        """Pages that a request owns itself: those after its cached prefix."""
        row = self.rows.req_to_token[req.req_pool_idx, req.cache_protected_len : req.filled : PAGE]
        return row.long() // PAGE

    # --- what must always hold ---

    def check(self) -> None:
        self.check_counts()
        self.check_table()
        self.check_owners()
        self.check_content()

    def check_counts(self) -> None:
        evictable = protected = saved = 0
        for node, _, _ in self.nodes():
            costs = sum(self.layout.cost_tokens[level] for level in node.levels)
            saved += len(node.key) - costs
            protected += costs if node.lock_ref else 0
            evictable += 0 if node.lock_ref else costs
        assert self.tree.evictable_size() == evictable
        assert self.tree.protected_size() == protected
        assert self.tree.saved_evictable + self.tree.saved_protected == saved
        own = sum(len(self.request_pages(req)) for req in self.requests) * PAGE
        free = self.allocator.available_size()
        assert free + evictable + protected + own == self.allocator.size

    def check_table(self) -> None:
        """The policy's columns say what the tree says."""
        table = self.tree.table
        rows = []
        for node, first, _ in self.nodes():
            row = node.row
            rows.append(row)
            assert table.node[row] is node
            assert table.parent[row] == node.parent.row
            assert table.first_page[row] == first
            assert table.locked[row] == bool(node.lock_ref)
            assert table.sinks[row] == (first == 0)
            counted = np.bincount(node.levels[table.sinks[row] :], minlength=len(TIERS))
            assert np.array_equal(table.pages[row], counted)
            if node.parent is not self.tree.root_node:
                assert table.used[node.parent.row] >= table.used[row]
        assert sorted(rows) == np.flatnonzero(table.alive).tolist()
        assert len(rows) == len(table)
        live = {id(node) for node, _, _ in self.nodes()}
        assert all(id(node) in live for node in self.tree.unsettled)

    def check_owners(self) -> None:
        owners: list[tuple[torch.Tensor, int]] = [(torch.zeros(1, dtype=torch.int64), 0)]
        for node, _, _ in self.nodes():
            assert len(node.levels) * PAGE == len(node.key) == len(node.value)
            pages = self.tree.page_ids(node)
            places = node.value.view(-1, PAGE) - pages.unsqueeze(1) * PAGE
            assert bool((places == torch.arange(PAGE)).all()), "a page is a page of tokens"
            owners += [(page.view(1), int(level)) for page, level in zip(pages, node.levels)]
        owners += [(self.request_pages(req), 0) for req in self.requests]
        pages = torch.cat([pages for pages, _ in owners])
        everyone = torch.cat([pages, self.allocator.free_pages, self.allocator.release_pages])
        assert sorted(everyone.tolist()) == list(range(self.pool.arena.num_pages)), "page ids"
        blocks = [
            self.pool.arena.page_blocks[pages, : self.layout.blocks[level]].flatten()
            for pages, level in owners
        ]
        everything = torch.cat([*blocks, self.allocator.free_blocks])
        total = self.pool.arena.num_blocks + self.layout.hot_blocks
        assert sorted(everything.tolist()) == list(range(total)), "blocks"
        for pages, level in owners:
            template = self.pool.layout.descriptors(level).unsqueeze(1)
            assert bool((self.pool.arena.descriptors[:, pages] == template).all())

    def check_content(self) -> None:
        for node, first, tokens in self.nodes():
            said = torch.tensor(tokens[first * PAGE :]).view(-1, PAGE)
            for level in np.unique(node.levels):
                chosen = torch.from_numpy(np.flatnonzero(node.levels == level))
                self._check_pages(self.tree.page_ids(node)[chosen], said[chosen], int(level))
        for req in self.requests:
            pages = self.request_pages(req)
            said = torch.tensor(req.tokens[req.cache_protected_len : req.filled])
            whole = torch.full((len(pages) * PAGE,), -1)
            whole[: len(said)] = said
            self._check_pages(pages, whole.view(-1, PAGE), 0)

    def _check_pages(self, pages: torch.Tensor, tokens: torch.Tensor, level: int) -> None:
        """Pages [n] of one level say tokens [n, PAGE]; -1 for places not written."""
        if not len(pages):
            return
        _, addresses = self.pool.arena.locate(pages)
        error = torch.zeros(tokens.shape)
        slices_of = SIDES * self.layout.layers * self.layout.kv_heads
        for index, kind in enumerate(self.pool.layout.assignment.of[level]):
            layer, head = divmod(index, self.layout.kv_heads)
            for side, layout in enumerate(self.pool.layout.kinds[kind]):
                slices = self.pool.arena.read_slices(layout, addresses[layer, :, head, side])
                frames, frame = self.pool.frames, layout.pattern.frame
                dual = frames.duals(frame, layer, side)[head].repeat(len(pages), 1, 1)
                centre = frames.centre[side, layer, head].repeat(len(pages), 1)
                x = decode_slices(layout, slices, dual, centre)
                wanted = CONTENT[side, layer, tokens, head]
                error += (x - wanted).square().mean(2) / slices_of
        off = error.sqrt()[tokens >= 0]
        assert bool((off < (FAR_OFF if level else 0.1)).all()), f"level {level}: {off.max():.2f}"


def pages_of(*kinds: int) -> list[int]:
    """Tokens of whole pages of these kinds."""
    return [kind * PAGE + i for kind in kinds for i in range(PAGE)]


def path_levels(cache: Cache, node: Any) -> list[tuple[int, int]]:
    """(page id, level) along the cached prefix that ends in a node."""
    found: list[tuple[int, int]] = []
    while node is not cache.tree.root_node:
        found = [*zip(cache.tree.page_ids(node).tolist(), node.levels.tolist()), *found]
        node = node.parent
    return found


def ready_frames_like_content(cache: Cache, spoil: float | None = None) -> None:
    """Frames see a prompt of the same model; pages already in the cache move to the new centre."""
    pool = cache.pool
    tokens = torch.arange(128) % VOCABULARY
    for layer in range(LAYOUT.layers):
        keys, values = CONTENT[:, layer, tokens]
        if spoil is not None:
            keys[20] = spoil
        pool.observe(
            Layer(layer),
            normal(128, 2, 32, seed=layer),
            keys,
            values,
            torch.arange(128),
            None,
            cache.allocator.pages_in_use,
        )


# --- one thing at a time -------------------------------------------------------------------------

LONG = (0, 1, 2, 0, 1, 2, 0, 1)  # eight pages


@pytest.fixture
def cache() -> Cache:
    """Twelve hot pages, with frames ready; a request's newest two pages stay hot."""
    made = Cache()
    ready_frames_like_content(made)
    return made


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


def test_above_the_high_watermark_insertions_lower_beyond_the_budget() -> None:
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
    before = cache.levels(pages_of(*LONG))
    assert cache.tree.evict(EvictParams(10**9)).num_tokens_evicted == 0
    assert cache.levels(pages_of(*LONG)) == before
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


# --- the allocator -------------------------------------------------------------------------------


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


# --- the state machine ---------------------------------------------------------------------------

kinds = st.sampled_from([0, 0, 0, 1, 1, 2])  # often alike, so that prefixes are shared
prompts = st.lists(kinds, min_size=2, max_size=9)
namespaces = st.sampled_from([None, None, "adapter"])


class Serving(RuleBasedStateMachine):
    """Rules are what a scheduler does; `known` is the model: the prefixes that must be cached."""

    @initialize(
        budget=st.sampled_from(["warm", *TIERS]),
        recent=st.sampled_from([0, RECENT]),
        ready=st.sampled_from([True, True, False]),
        settle_pages=st.sampled_from([256, 256, 2]),
        high=st.sampled_from([1.0, 1.0, 0.5]),
        layout=st.sampled_from([LAYOUT, UNLIKE]),
    )
    def set_up(
        self,
        budget: str,
        recent: int,
        ready: bool,
        settle_pages: int,
        high: float,
        layout: PageLayout,
    ) -> None:
        self.cache = Cache(
            budget=budget,
            recent=recent,
            settle_pages=settle_pages,
            high_watermark=high,
            layout=layout,
        )
        self.known: set[tuple[str | None, tuple[int, ...]]] = set()
        if ready:
            ready_frames_like_content(self.cache)

    def pick(self, place: int) -> Request:
        return self.cache.requests[place % len(self.cache.requests)]

    def learn(self, req: Request) -> None:
        """What a request has inserted is known from now on."""
        tokens = tuple(req.get_fill_ids())
        ends = range(PAGE, len(tokens) + 1, PAGE)
        self.known |= {(req.extra_key, tokens[:end]) for end in ends}

    @precondition(lambda self: not self.cache.pool.frames.ready)
    @rule()
    def frames_become_ready(self) -> None:
        ready_frames_like_content(self.cache)

    @precondition(lambda self: len(self.cache.requests) < 3)
    @rule(prompt=prompts, tail=st.integers(1, PAGE), extra=namespaces, chunk=st.integers(1, 9))
    def start(self, prompt: list[int], tail: int, extra: str | None, chunk: int) -> None:
        tokens = pages_of(*prompt)[: len(prompt) * PAGE - PAGE + tail]
        longest = self.longest_known(tokens[:-1], extra)
        req = self.cache.start(tokens, extra)
        assert req.filled == longest
        self.prefill(req, chunk)

    @precondition(lambda self: any(not req.prefilled for req in self.cache.requests))
    @rule(place=st.integers(0, 2), chunk=st.integers(1, 9))
    def go_on_with_a_prompt(self, place: int, chunk: int) -> None:
        waiting = [req for req in self.cache.requests if not req.prefilled]
        self.prefill(waiting[place % len(waiting)], chunk)

    def prefill(self, req: Request, chunk: int) -> None:
        """So many pages of a prompt, the last of which may be a part."""
        locked, cached = dict(self.page_levels(req)), self.cache.tree_pages()
        if self.cache.prefill(req, chunk * PAGE, last=False):
            self.learn(req)
            self.cache.tree.forward_launched()
            self.check_settled(req, locked, cached)
        self.after_eviction()

    @precondition(lambda self: len(self.cache.requests) < 3)
    @rule(prompt=prompts, extra=namespaces, answer=st.integers(0, 2 * PAGE))
    def serve(self, prompt: list[int], extra: str | None, answer: int) -> None:
        """A request from its start to its end."""
        req = self.cache.start(pages_of(*prompt), extra)
        self.prefill(req, MAX_TOKENS)
        for _ in range(min(answer, MAX_TOKENS - req.filled) if req.prefilled else 0):
            if not self.cache.decode(req, req.filled % PAGE):
                break
        self.end(req, insert=req.prefilled)

    def longest_known(self, tokens: list[int], extra: str | None) -> int:
        """Length of the longest cached prefix, by the model."""
        whole = tuple(tokens)
        return max(
            (len(p) for namespace, p in self.known if namespace == extra and p == whole[: len(p)]),
            default=0,
        )

    def page_levels(self, req: Request) -> list[tuple[int, int]]:
        """(page id, level) along the cached prefix of a request."""
        return path_levels(self.cache, req.last_node)

    def read_hot(self, req: Request) -> set[int]:
        """Pages that other requests read hot: all of a prompt under way, the newest of the rest."""
        pages: set[int] = set()
        for other in self.cache.requests:
            if other is not req and id(other) in self.cache.tree.held_hot:
                newest = len(other.origin_input_ids) - self.cache.tree.recent_tokens
                first = max(0, newest) // PAGE if other.prefilled else 0
                pages |= {page for page, _ in self.page_levels(other)[first:]}
        return pages

    def check_settled(self, req: Request, locked: dict[int, int], cached: set[int]) -> None:
        """Behind the end of a prompt its old pages have the budget; its newest are as they were.

        locked  levels before, by page, of the prefix that the request already held
        cached  all pages of the tree before: one of another request may have taken the place of
                the request's own, at whatever level that one left it
        """
        tree = self.cache.tree
        end_page = max(0, req.filled - tree.recent_tokens) // PAGE
        settles = req.prefilled and self.cache.pool.frames.ready and not tree.unsettled
        for place, (page, level) in enumerate(self.page_levels(req)):
            if place < SINK_PAGES:
                assert level == 0, "sinks stay hot"
            elif settles and place < end_page and page not in self.read_hot(req):
                assert level >= tree.budget
            elif not tree.unsettled and (page in locked or page not in cached):
                assert level == locked.get(page, 0)

    @precondition(lambda self: any(req.prefilled for req in self.cache.requests))
    @rule(place=st.integers(0, 9), kind=kinds, count=st.integers(1, PAGE))
    def decode(self, place: int, kind: int, count: int) -> None:
        running = [req for req in self.cache.requests if req.prefilled]
        req = running[place % len(running)]
        for _ in range(min(count, MAX_TOKENS - req.filled)):
            if not self.cache.decode(req, kind * PAGE + req.filled % PAGE):
                break
        self.after_eviction()

    @precondition(lambda self: self.cache.requests)
    @rule(place=st.integers(0, 2), abort=st.sampled_from([False, False, True]))
    def finish(self, place: int, abort: bool) -> None:
        req = self.pick(place)
        self.end(req, insert=req.prefilled and not abort)

    def end(self, req: Request, insert: bool) -> None:
        self.cache.finish(req, insert)
        if insert:
            self.learn(req)
        self.after_eviction()

    @precondition(lambda self: self.known)
    @rule(prompt=st.lists(kinds, min_size=1, max_size=5), extra=namespaces)
    def look_up(self, prompt: list[int], extra: str | None) -> None:
        """A match alone: it may split nodes in the middle."""
        match = self.cache.match(pages_of(*prompt), extra)
        assert len(match.device_indices) == self.longest_known(pages_of(*prompt), extra)

    @precondition(lambda self: self.known)
    @rule(tokens=st.sampled_from([1, 3, 4, 16, 17, 40, 64, 150, 10_000]))
    def evict(self, tokens: int) -> None:
        cache = self.cache
        free, evictable = cache.allocator.available_size(), cache.tree.evictable_size()
        result = cache.tree.evict(EvictParams(tokens))
        gained = cache.allocator.available_size() - free
        assert gained >= min(tokens, evictable)
        assert result.num_tokens_evicted == gained
        assert cache.tree.evictable_size() == evictable - gained
        self.after_eviction()

    def after_eviction(self) -> None:
        """Evicting may forget; what a running request stands on stays."""
        cached = self.cache.prefixes()
        assert cached <= self.known
        for req in self.cache.requests:
            tokens = tuple(req.tokens[: req.cache_protected_len])
            if tokens:
                assert (req.extra_key, tokens) in cached
        self.known &= cached

    @rule()
    def take_all_that_is_free(self) -> None:
        allocator = self.cache.allocator
        free = allocator.available_size()
        whole = free // PAGE * PAGE
        loc = allocator.alloc(whole)
        assert loc is not None
        assert len(loc) == whole
        assert allocator.available_size() == free - whole
        assert allocator.alloc(PAGE) is None, "less than a page is left"
        allocator.free(loc)
        assert allocator.available_size() == free

    @precondition(lambda self: len(self.known) > 5 and not self.cache.requests)
    @rule()
    def flush(self) -> None:
        self.cache.flush()
        self.known = set()
        assert self.cache.allocator.available_size() == self.cache.allocator.size
        assert not self.cache.pool.frames.ready

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            assert self.cache.prefixes() == self.known


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),  # "explain" takes minutes
)
