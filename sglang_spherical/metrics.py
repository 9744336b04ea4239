"""What the cache tells SGLang's own Prometheus endpoint (`--enable-metrics`, GET /metrics).

All of it is counted on the host from numbers that the host has anyway: nothing here waits for the
device. Every tensor-parallel rank keeps the same counts, so one rank of a group speaks for it, as
in SGLang's own metrics; bytes are that rank's.

    spherical:pages, spherical:bytes {tier}           gauges: what the cache holds now
    spherical:free_tokens, spherical:capacity_tokens  gauges: hot-token equivalents
    spherical:retiered_pages_total {from_tier, to_tier}
    spherical:promoted_pages_total {from_tier}         pages replaced by a request's hot originals
    spherical:dropped_pages_total {tier}              pages forgotten under memory pressure
    spherical:hit_tokens_total {tier}                 cached tokens that requests started from
    spherical:moved_bytes_total                       of blocks that re-tiering read and wrote
    spherical:retention_seconds {trigger}             histogram: host time of a call and its policy
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sglang_spherical.pool.layout import PageLayout

P = ParamSpec("P")
R = TypeVar("R")

PREFIX = "spherical:"
TRIGGERS = ("settle", "evict")
SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""Bounds of the histogram's buckets; no decode step shall be later by more than 1 ms."""


class NoMetrics:
    """With metrics off: takes every event and does nothing. Levels are indices, 0 is hot."""

    def changed(self, level: int, pages: int, free_tokens: int) -> None:
        """The cache holds `pages` more pages at `level` (fewer when negative)."""

    def retiered(self, old: int, new: int, pages: int, free_tokens: int) -> None:
        """`pages` pages went from level `old` to level `new`."""

    def promoted(self, level: int, pages: int, free_tokens: int) -> None:
        """`pages` pages went from `level` to hot, whose originals were at hand."""

    def dropped(self, level: int, pages: int) -> None:
        """The tree forgot `pages` pages to make room; `changed` is told of them too."""

    def started(self, levels: Iterable[NDArray[np.uint8]]) -> None:
        """A request starts from a cached prefix: levels of its pages, node by node."""

    def retained(self, trigger: str, seconds: float) -> None:
        """Host time that one call of the retention took."""

    def cleared(self, free_tokens: int) -> None:
        """The cache was flushed."""


class PrometheusMetrics(NoMetrics):
    """With metrics on: writes every event to prometheus_client at once.

    labels    of SGLang's scheduler metrics: model, engine, ranks
    registry  another than prometheus_client's own, for tests
    """

    def __init__(
        self,
        layout: PageLayout,
        capacity_tokens: int,
        labels: dict[str, Any],
        registry: Any = None,
    ) -> None:
        # SGLang has set PROMETHEUS_MULTIPROC_DIR by now: prometheus_client reads it when imported.
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        tiers = [level.name for level in layout.levels]

        def gauge(name: str, text: str, *names: str) -> Any:
            names = (*labels, *names)
            return Gauge(
                PREFIX + name, text, names, registry=registry, multiprocess_mode="mostrecent"
            )

        def counter(name: str, text: str, *names: str) -> Any:
            return Counter(PREFIX + name, text, (*labels, *names), registry=registry)

        self.page_size = layout.page_size
        self.page_bytes = [blocks * layout.block_bytes for blocks in layout.blocks]
        self.held = [0] * len(tiers)
        pages = gauge("pages", "Pages that the cache holds.", "tier")
        held_bytes = gauge("bytes", "Bytes of the arena that these pages own.", "tier")
        dropped = counter("dropped_pages_total", "Pages forgotten to make room.", "tier")
        hits = counter("hit_tokens_total", "Cached tokens that requests started from.", "tier")
        self.pages = [pages.labels(**labels, tier=tier) for tier in tiers]
        self.bytes = [held_bytes.labels(**labels, tier=tier) for tier in tiers]
        self.drops = [dropped.labels(**labels, tier=tier) for tier in tiers]
        self.hits = [hits.labels(**labels, tier=tier) for tier in tiers]
        retiered = counter("retiered_pages_total", "Pages re-encoded.", "from_tier", "to_tier")
        self.moves = {
            (old, new): retiered.labels(**labels, from_tier=tiers[old], to_tier=tiers[new])
            for new in range(len(tiers))
            for old in range(new)
        }
        promoted = counter("promoted_pages_total", "Pages replaced by hot originals.", "from_tier")
        self.promotions = {
            level: promoted.labels(**labels, from_tier=tiers[level])
            for level in range(1, len(tiers))
        }
        text = "Bytes of blocks that re-tiering read and wrote."
        self.moved_bytes = counter("moved_bytes_total", text).labels(**labels)
        seconds = Histogram(
            PREFIX + "retention_seconds",
            "Host time of a call of the retention, its policy included.",
            (*labels, "trigger"),
            registry=registry,
            buckets=SECONDS,
        )
        self.seconds = {name: seconds.labels(**labels, trigger=name) for name in TRIGGERS}
        text = "Free memory in hot-token equivalents."
        self.free_tokens = gauge("free_tokens", text).labels(**labels)
        text = "All memory in hot-token equivalents."
        gauge("capacity_tokens", text).labels(**labels).set(capacity_tokens)
        self.cleared(capacity_tokens)

    def changed(self, level: int, pages: int, free_tokens: int) -> None:
        self._hold(level, self.held[level] + pages)
        self.free_tokens.set(free_tokens)

    def retiered(self, old: int, new: int, pages: int, free_tokens: int) -> None:
        self.moves[old, new].inc(pages)
        self.moved_bytes.inc(pages * (self.page_bytes[old] + self.page_bytes[new]))
        self._hold(old, self.held[old] - pages)
        self._hold(new, self.held[new] + pages)
        self.free_tokens.set(free_tokens)

    def promoted(self, level: int, pages: int, free_tokens: int) -> None:
        self.promotions[level].inc(pages)
        self._hold(level, self.held[level] - pages)
        self._hold(0, self.held[0] + pages)
        self.free_tokens.set(free_tokens)

    def dropped(self, level: int, pages: int) -> None:
        self.drops[level].inc(pages)

    def started(self, levels: Iterable[NDArray[np.uint8]]) -> None:
        pages = sum(
            (np.bincount(some, minlength=len(self.hits)) for some in levels),
            np.zeros(len(self.hits), np.int64),
        )
        for level in np.flatnonzero(pages):
            self.hits[level].inc(int(pages[level]) * self.page_size)

    def retained(self, trigger: str, seconds: float) -> None:
        self.seconds[trigger].observe(seconds)

    def cleared(self, free_tokens: int) -> None:
        for level in range(len(self.held)):
            self._hold(level, 0)
        self.free_tokens.set(free_tokens)

    def _hold(self, level: int, pages: int) -> None:
        self.held[level] = pages
        self.pages[level].set(pages)
        self.bytes[level].set(pages * self.page_bytes[level])


def timed(trigger: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a method of the tree: its host time is told to the metrics under `trigger`."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                tree: Any = args[0]
                tree.allocator.metrics.retained(trigger, time.perf_counter() - start)

        return call

    return decorate
