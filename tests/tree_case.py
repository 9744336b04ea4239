"""The radix tree, the allocator and the pool together, driven as SGLang's scheduler drives them.

`Cache.check` is what must hold after every step: memory adds up, nothing is owned twice, and every
cached token still says what was written for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cache_tools import Layer, normal, unlike_heads, write
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_spherical.config import TIERS, SphericalConfig
from sglang_spherical.pool.allocator import SphericalAllocator
from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.layout import SIDES, PageLayout, default_levels
from sglang_spherical.radix.tree import SphericalRadixCache
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
    patience: int = 0
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
        self.tree.patience = self.patience

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


def ready_cache() -> Cache:
    """Twelve hot pages, with frames ready; a request's newest two pages stay hot."""
    cache = Cache()
    ready_frames_like_content(cache)
    return cache


LONG = (0, 1, 2, 0, 1, 2, 0, 1)  # eight pages
