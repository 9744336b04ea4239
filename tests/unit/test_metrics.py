"""The cache's metrics say what its own tables say, after every event; off, they do nothing."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from cache_tools import ready_frames, tiny_pool
from prometheus_client import CollectorRegistry
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_spherical import engagement
from sglang_spherical.config import SphericalConfig
from sglang_spherical.metrics import NoMetrics, PrometheusMetrics
from sglang_spherical.pool.allocator import SphericalAllocator
from sglang_spherical.radix.tree import SphericalRadixCache

PAGE = 16
LABELS = {"model_name": "m", "tp_rank": 0}


class Cache:
    """A pool, an allocator and a tree whose metrics go to a registry of their own."""

    def __init__(self, pages: int = 24) -> None:
        self.pool = tiny_pool(pages)
        self.layout = self.pool.layout
        self.tiers = [level.name for level in self.layout.levels]
        self.allocator = SphericalAllocator(self.pool)
        self.registry = CollectorRegistry()
        size = self.allocator.size
        self.allocator.metrics = PrometheusMetrics(self.layout, size, LABELS, self.registry)
        rows = ReqToTokenPool(4, 64 * PAGE, "cpu", False)
        params = CacheInitParams(False, rows, self.allocator, PAGE)
        self.tree = SphericalRadixCache(params, SphericalConfig("spherical"))
        ready_frames(self.pool)

    def insert(self, tokens: list[int]) -> None:
        """Puts a prefix of whole pages into the tree, as a request that is done."""
        short = len(tokens) - self.allocator.available_size()
        if short > 0:
            self.tree.evict(EvictParams(short))
        loc = self.allocator.alloc(len(tokens))
        assert loc is not None
        known = self.tree.insert(InsertParams(key=key(tokens), value=loc)).prefix_len
        self.allocator.free_segment(loc[:known], start_pos=0)

    def value(self, name: str, **labels: str) -> float:
        found = self.registry.get_sample_value(f"spherical:{name}", {**string(LABELS), **labels})
        assert found is not None, name
        return found

    def by_tier(self, name: str) -> list[int]:
        return [int(self.value(name, tier=tier)) for tier in self.tiers]

    def check(self) -> None:
        """Gauges against the arena's tables and the allocator's count."""
        used = self.allocator.pages_in_use()
        levels = self.pool.arena.page_level[used].numpy()
        expected = np.bincount(levels, minlength=len(self.tiers)).tolist()
        assert self.by_tier("pages") == expected
        blocks = [n * b for n, b in zip(expected, self.layout.blocks)]
        assert self.by_tier("bytes") == [n * self.layout.block_bytes for n in blocks]
        assert self.value("free_tokens") == self.allocator.available_size()


def key(tokens: list[int]) -> RadixKey:
    return RadixKey(array("q", tokens), None)


def string(labels: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in labels.items()}


@pytest.mark.parametrize("seed", range(4))
def test_gauges_follow_every_event(seed: int) -> None:
    cache, rng = Cache(), random.Random(seed)
    assert cache.value("capacity_tokens") == cache.allocator.size
    for step in range(40):
        event = rng.choice(["insert"] * 5 + ["evict", "hold"] + ["flush"] * (step == 25))
        if event == "insert":
            start = rng.randrange(4)
            cache.insert([start] * PAGE + rng.choices(range(5), k=PAGE * rng.randint(1, 4)))
        elif event == "evict":
            cache.tree.evict(EvictParams(rng.randrange(1, 6 * PAGE)))
        elif event == "hold":
            loc = cache.allocator.alloc(min(2, cache.allocator.available_size() // PAGE) * PAGE)
            cache.check()
            cache.allocator.free(loc)
        else:
            cache.tree.reset()
            cache.allocator.clear()
        cache.check()


def test_what_left_a_tier_went_to_another_or_was_dropped() -> None:
    cache = Cache()
    rng = random.Random(0)
    inserted = 0
    for _ in range(30):
        pages = rng.randint(2, 5)
        cache.insert([rng.randrange(100) for _ in range(pages * PAGE)])  # no two alike
        inserted += pages
    hot = len(cache.tiers) * [0]
    hot[0] = inserted
    tiers = cache.tiers
    moved_bytes = 0.0
    for old, new in cache.allocator.metrics.moves:
        pages = cache.value("retiered_pages_total", from_tier=tiers[old], to_tier=tiers[new])
        hot[old] -= pages
        hot[new] += pages
        sizes = [cache.layout.blocks[i] * cache.layout.block_bytes for i in (old, new)]
        moved_bytes += pages * sum(sizes)
    left = [n - dropped for n, dropped in zip(hot, cache.by_tier("dropped_pages_total"))]
    assert left == cache.by_tier("pages")
    assert sum(cache.by_tier("dropped_pages_total")) > 0
    assert cache.value("moved_bytes_total") == moved_bytes > 0
    assert cache.value("retention_seconds_count", trigger="evict") > 0
    assert cache.value("retention_seconds_sum", trigger="evict") > 0


def test_promotions_are_counted() -> None:
    cache = Cache()
    cached, originals = (cache.allocator.alloc(2 * PAGE)[::PAGE] // PAGE for _ in range(2))
    cache.allocator.lower(cached, 0, 1)
    assert cache.by_tier("pages")[:2] == [2, 2]
    assert cache.allocator.promote(cached, 1, originals) == 2
    assert cache.by_tier("pages")[:2] == [4, 0]
    assert cache.value("promoted_pages_total", from_tier=cache.tiers[1]) == 2
    assert cache.value("free_tokens") == cache.allocator.available_size()


def test_hits_are_counted_once_by_tier() -> None:
    cache = Cache()
    tokens = [i % 7 for i in range(5 * PAGE)]
    cache.insert(tokens)
    cache.tree.evict(EvictParams(2 * PAGE))
    node = cache.tree.match_prefix(MatchPrefixParams(key=key(tokens))).last_device_node
    expected = np.bincount(node.levels, minlength=len(cache.tiers)) * PAGE
    req = SimpleNamespace(last_node=node)
    cache.tree._count_hit(req)
    assert cache.by_tier("hit_tokens_total") == expected.tolist()
    assert sum(expected) == len(tokens) and expected[0] < len(tokens)
    cache.tree.held_hot[id(req)] = node, 0  # its first event has been seen
    cache.tree._count_hit(req)
    assert cache.by_tier("hit_tokens_total") == expected.tolist()


def test_off_nothing_is_even_looked_at() -> None:
    def levels() -> Iterator[np.ndarray]:
        raise AssertionError("looked at")
        yield np.zeros(1, np.uint8)

    allocator = SphericalAllocator(tiny_pool(4))
    assert type(allocator.metrics) is NoMetrics
    allocator.metrics.started(levels())
    allocator.free(allocator.alloc(PAGE))
    assert allocator.available_size() == allocator.size


@pytest.mark.parametrize("enabled", [False, True])
def test_metrics_start_where_sglang_has_them(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(
        "sglang_spherical.metrics.PrometheusMetrics", lambda *args: seen.append(args) or "metrics"
    )
    allocator = SimpleNamespace(size=64, metrics=None)
    parts = engagement.Parts(SimpleNamespace(layout="layout"), allocator, None, None)
    context = SimpleNamespace(
        current_scheduler_metrics_enabled=enabled, collector=SimpleNamespace(labels=LABELS)
    )
    engagement._start_metrics(parts, context)
    assert seen == ([("layout", 64, LABELS)] if enabled else [])
    assert allocator.metrics == ("metrics" if enabled else None)
