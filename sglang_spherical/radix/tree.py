"""SGLang's radix tree with a level per page.

SGLang's own counters go on counting tokens. Beside them the tree counts what its nodes have saved,
in hot-token equivalents, split as SGLang splits them (evictable, protected); a size is their
difference, so that free + evictable + protected + request-owned always equals the capacity.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache

from sglang_spherical.config import TIERS, SphericalConfig
from sglang_spherical.metrics import timed
from sglang_spherical.pool.allocator import SphericalAllocator
from sglang_spherical.pool.order import to_device
from sglang_spherical.retention.distortion import DROPPED, distortions
from sglang_spherical.retention.executor import execute
from sglang_spherical.retention.ladder import Ladder
from sglang_spherical.retention.nodes import ROOT, NodeTable
from sglang_spherical.retention.operations import NodeView, Operation
from sglang_spherical.retention.policy import relieve, settle

Node = Any  # sglang's TreeNode, plus `levels`: uint8 [pages], and `row` in the table of nodes

SHARED_HITS = 3
"""SGLang counts a request twice on its own prefix: from here on others have come back to it."""

HIT_WEIGHT = 0.5
"""For the same reason, what one count adds to the reuses of a node."""

SETTLE_BYTES = 160 << 20
"""Of hot pages that are re-encoded between two forward passes, unless a flag says how many pages:
less than a millisecond of an H200's, at the rate at which it does seven times as many."""

PATIENCE = 16
"""Forward passes for which a prefix may wait for others to be settled with: one call takes the host
less time than a call for each (docs/retention.md)."""

AMPLE = 0.2
"""Free fraction of memory from which on there is no hurry."""


class SphericalRadixCache(RadixCache):
    """A prefix tree that lowers precision before it forgets.

    saved_evictable, saved_protected   hot-token equivalents saved by unlocked and by locked nodes
    held_hot   by request in flight: its last node, and the first page of its prefix it reads hot
    unsettled  by last node: the page before which a prefix is still to be given its budget
    patience   forward passes for which they may wait for company, and how many they have `waited`
    left       pages that prefixes may still have re-encoded behind this forward pass
    own_from   while a request is inserted: the token from which on its pages are its own
    table      what the policy knows of the nodes
    """

    def __init__(self, params: CacheInitParams, config: SphericalConfig) -> None:
        self.allocator: SphericalAllocator = params.token_to_kv_pool_allocator
        self.layout = self.allocator.pool.layout
        self.budget = self.layout.finest_of_cost(TIERS.index(config.budget))
        costs = self.layout.cost_tokens
        self.ladder = Ladder.over(costs, distortions(self.layout.levels), DROPPED)
        self.drops_only = Ladder.of_drops(costs)
        self.table = NodeTable(len(costs))
        self.watermark, self.high_watermark = config.watermark, config.high_watermark
        page_bytes = self.layout.hot_blocks * self.layout.block_bytes
        self.settle_pages = config.settle_pages or max(1, SETTLE_BYTES // page_bytes)
        self.recent_tokens = config.recent_tokens
        self.patience = PATIENCE
        self.inserted_node: Node = None
        self.own_from: int | None = None
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self.root_node.row = ROOT
        self.table.clear()
        self.held_hot: dict[int, tuple[Node, int]] = {}
        self.unsettled: dict[Node, int] = {}
        self.waited = 0
        self.left = self.settle_pages
        self.saved_evictable = 0
        self.saved_protected = 0

    # --- sizes ---

    def evictable_size(self) -> int:
        """Hot-token equivalents held by unlocked nodes."""
        return int(self.evictable_size_ - self.saved_evictable)

    def protected_size(self) -> int:
        """Hot-token equivalents held by locked nodes."""
        return int(self.protected_size_ - self.saved_protected)

    def saved_tokens(self, node: Node) -> int:
        """What a node's pages save against being hot, in hot-token equivalents."""
        costs = np.asarray(self.layout.cost_tokens)
        return int((self.page_size - costs[node.levels]).sum())

    def page_ids(self, node: Node) -> torch.Tensor:
        """Logical pages of a node, int64 [pages]."""
        pages: torch.Tensor = node.value[:: self.page_size] // self.page_size
        return pages

    # --- SGLang's structure, with levels kept beside it ---

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        result = super().match_prefix(params)
        self.table.touch([node.row for node in self._path(result.last_device_node)])
        return result

    def _insert_helper(
        self, node: Node, key: Any, value: Any, priority: int = 0, chunked: bool = False
    ) -> tuple[int, Node]:
        self.table.clock += not chunked
        length = len(key)
        prefix_length, last = super()._insert_helper(node, key, value, priority, chunked)
        if prefix_length < length:
            before, end = prefix_length // self.page_size, length // self.page_size
            last.levels = np.zeros(end - before, np.uint8)
            last.row = self.table.add(last, last.parent.row, before, last.levels)
        if self.own_from is not None:
            self._promote(last, value, self.own_from, prefix_length)
        self.table.touch([node.row for node in self._path(last)])
        self.inserted_node = last
        return prefix_length, last

    def _inc_hit_count(self, node: Node, chunked: bool = False) -> None:
        super()._inc_hit_count(node, chunked)
        if not chunked and node.hit_count >= SHARED_HITS:
            self.table.count_reuse(node.row, HIT_WEIGHT)

    def _split_node(self, key: Any, child: Node, split_len: int) -> Node:
        upper = super()._split_node(key, child, split_len)
        at = split_len // self.page_size
        upper.levels, child.levels = child.levels[:at].copy(), child.levels[at:].copy()
        upper.row = self.table.split(child.row, upper, upper.levels, child.levels)
        return upper

    def _delete_leaf(self, node: Node) -> None:
        self.saved_evictable -= self.saved_tokens(node)
        self.table.remove(node.row)
        self.unsettled.pop(node, None)
        super()._delete_leaf(node)

    def inc_lock_ref(self, node: Node) -> Any:
        newly = [n for n in self._path(node) if n.lock_ref == 0]
        result = super().inc_lock_ref(node)
        self._move_savings(newly, 1)
        return result

    def dec_lock_ref(self, node: Node, params: Any = None) -> Any:
        released = [n for n in self._path(node) if n.lock_ref == 1]
        result = super().dec_lock_ref(node, params)
        self._move_savings(released, -1)
        return result

    def _move_savings(self, nodes: list[Node], direction: int) -> None:
        if self.disable:
            return
        self.table.locked[[node.row for node in nodes]] = direction > 0
        saved = direction * sum(self.saved_tokens(node) for node in nodes)
        self.saved_evictable -= saved
        self.saved_protected += saved

    def record_levels(self, node: Node, pages: NDArray[np.int64], level: int) -> None:
        """Books pages (indices into the node) as being at `level`."""
        before = self.saved_tokens(node)
        node.levels[pages] = level
        self.table.recount(node.row, node.levels)
        gained = self.saved_tokens(node) - before
        if node.lock_ref:
            self.saved_protected += gained
        else:
            self.saved_evictable += gained

    def _promote(self, last: Node, value: torch.Tensor, start: int, end: int) -> None:
        """Where pages before `last` are below the budget, and a request brings its own of the same
        tokens [start, end), the tree takes these.

        value  token locations of the whole prefix, as the request has them
        """
        for view in self._views(list(self._path(last))[::-1]):
            first = (view.first_page + np.arange(len(view.levels))) * self.page_size
            wanted = (view.levels > self.budget) & (first >= start) & (first < end)
            for level in np.unique(view.levels[wanted]):
                chosen = np.flatnonzero(wanted & (view.levels == level))
                places = to_device(first[chosen], value.device)
                index = to_device(chosen, value.device)
                count = self.allocator.promote(
                    self.page_ids(view.node)[index], int(level), value[places] // self.page_size
                )
                self.record_levels(view.node, chosen[:count], 0)

    # --- events: insert, forward pass, evict ---

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        self._count_hit(req)
        self.own_from = req.cache_protected_len
        super().cache_unfinished_req(req, chunked=chunked)
        self.own_from = None
        if self.disable:
            return
        length = len(req.get_fill_ids())
        # A chunked prompt's pages may still be written, and its next chunk shall see them hot.
        self.held_hot[id(req)] = req.last_node, 0 if chunked else self._recent_page(length)
        if not chunked:
            self._leave_to_settle(req.last_node, length)

    def cache_finished_req(
        self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        self._count_hit(req)
        self.own_from = req.cache_protected_len
        super().cache_finished_req(req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle)
        self.own_from = None
        self.held_hot.pop(id(req), None)
        if not self.disable and is_insert and not self.disable_finished_insert:
            self._leave_to_settle(self.inserted_node, kv_len_to_handle)

    def _count_hit(self, req: Any) -> None:
        """Tells the metrics, once per request, what prefix it started from."""
        if id(req) not in self.held_hot and not self.disable:
            levels = (node.levels for node in self._path(req.last_node))
            self.allocator.metrics.started(levels)

    def _recent_page(self, length: int) -> int:
        """The first page that holds any of the newest tokens of a prefix of `length` tokens."""
        return max(0, length - self.recent_tokens) // self.page_size

    def forward_launched(self) -> None:
        """A forward pass is on its way: behind it as much is re-encoded as the next one can wait
        for."""
        if self._waits() and self._may_settle():
            self.waited += 1
            if self.waited > self.patience or self._used() > min(1 - AMPLE, self.high_watermark):
                self._settle_waiting()

    def idle(self) -> None:
        """Nothing runs: as much is re-encoded as behind a forward pass, and waited for, so that a
        request that comes meanwhile waits for no more than that."""
        if self._waits() and self._may_settle():
            self._settle_waiting()
            self.allocator.pool.order.wait()

    def _waits(self) -> bool:
        """Whether there is a prefix without its budget, or less free memory than there should
        be."""
        return bool(self.unsettled) or self._used() > self.high_watermark

    def _leave_to_settle(self, node: Node, length: int) -> None:
        """The prefix that ends in `node` is to have its budget. Not now, when an answer waits to be
        sent, but behind a forward pass, together with what else there is by then."""
        if self.budget and self._may_settle():
            if not self.unsettled:
                self.waited = 0
            for settled_with_it in self._path(node):
                self.unsettled.pop(settled_with_it, None)
            self.unsettled = {node: self._recent_page(length)} | self.unsettled

    def _may_settle(self) -> bool:
        return self._used() >= self.watermark and self.allocator.pool.frames.ready

    @timed("settle")
    def _settle_waiting(self) -> None:
        """Lowers what waits, the newest prefix first, and then what the high watermark asks for:
        `settle_pages` at most."""
        self.left = self.settle_pages
        execute(self, self._budgets())
        surplus = math.ceil((self._used() - self.high_watermark) * self.allocator.size)
        if surplus > 0 and self.left:
            execute(self, self._relieve(surplus, drops=False, most_pages=self.left))

    def _budgets(self) -> Iterator[Operation]:
        """What gives waiting prefixes their budgets, as far as there are pages `left`. Prefixes
        share nodes: the next operation is to be asked for when the one before is in the books."""
        tails = self._hot_tails() if self.unsettled else {}
        while self.left and self.unsettled:
            node, end_page = next(iter(self.unsettled.items()))
            path = self._views(list(self._path(node))[::-1])
            operations, count = settle(path, self.budget, end_page, tails, self.left)
            self.left -= count
            if self.left:
                del self.unsettled[node]
            yield from operations

    def _used(self) -> float:
        """The fraction of memory that is not free."""
        return 1.0 - self.allocator.available_size() / self.allocator.size

    def _hot_tails(self) -> dict[int, int]:
        """By node: the page (index into it) from which a request reads it hot."""
        tails: dict[int, int] = {}
        for node, hot_page in self.held_hot.values():
            for view in self._views(list(self._path(node))[::-1]):
                start = max(0, hot_page - view.first_page)
                key = id(view.node)
                tails[key] = min(start, tails.get(key, start))
        return tails

    @timed("evict")
    def evict(self, params: EvictParams) -> EvictResult:
        """Frees at least `num_tokens` hot-token equivalents, where unlocked nodes hold so many."""
        if self.disable:
            return EvictResult()
        start, gained = time.perf_counter(), 0
        if self.unsettled and self._may_settle():  # what is due anyway costs nobody anything
            self.left = self.settle_pages
            gained = execute(self, self._budgets())
        if gained < params.num_tokens:
            gained += execute(self, self._relieve(params.num_tokens - gained))
        self.update_eviction_metrics(gained, start)
        return EvictResult(num_tokens_evicted=gained)

    def _relieve(self, tokens: int, **limits: Any) -> list[Operation]:
        ladder = self.ladder if self.allocator.pool.frames.ready else self.drops_only
        return relieve(self.table, tokens, ladder, **limits)

    def drop(self, node: Node) -> None:
        """Forgets an unlocked leaf and frees its pages."""
        pages = self.page_ids(node)
        for level in np.unique(node.levels):
            chosen = to_device(np.flatnonzero(node.levels == level), pages.device)
            self.allocator.free_at_level(pages[chosen], int(level))
            self.allocator.metrics.dropped(int(level), len(chosen))
        self._delete_leaf(node)
        self._record_remove_event(node)

    # --- views ---

    def _path(self, node: Node) -> Iterator[Node]:
        """A node and its ancestors, the root left out."""
        while node is not None and node is not self.root_node:
            yield node
            node = node.parent

    def _views(self, path: list[Node]) -> list[NodeView]:
        """Views of nodes that follow each other from the root."""
        views, first = [], 0
        for node in path:
            views.append(NodeView(node, first, node.levels))
            first += len(node.levels)
        return views
