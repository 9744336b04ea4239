"""A state machine serves requests against a small cache: prefix hits, chunked prefill, decoding,
finishing, aborts, evictions, flushes. After every step `Cache.check` must hold.
"""

from __future__ import annotations

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from tree_case import (
    LAYOUT,
    MAX_TOKENS,
    PAGE,
    RECENT,
    UNLIKE,
    Cache,
    Request,
    pages_of,
    path_levels,
    ready_frames_like_content,
)

from sglang_spherical.config import TIERS
from sglang_spherical.pool.layout import PageLayout
from sglang_spherical.retention.operations import SINK_PAGES

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
        patience=st.sampled_from([0, 0, 2]),
        high=st.sampled_from([1.0, 1.0, 0.5]),
        layout=st.sampled_from([LAYOUT, UNLIKE]),
    )
    def set_up(
        self,
        budget: str,
        recent: int,
        ready: bool,
        settle_pages: int,
        patience: int,
        high: float,
        layout: PageLayout,
    ) -> None:
        self.cache = Cache(
            budget=budget,
            recent=recent,
            settle_pages=settle_pages,
            patience=patience,
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
    @rule(
        prompt=prompts,
        tail=st.integers(1, PAGE),
        extra=namespaces,
        chunk=st.integers(1, 9),
        settles=st.booleans(),
    )
    def start(
        self, prompt: list[int], tail: int, extra: str | None, chunk: int, settles: bool
    ) -> None:
        tokens = pages_of(*prompt)[: len(prompt) * PAGE - PAGE + tail]
        longest = self.longest_known(tokens[:-1], extra)
        req = self.cache.start(tokens, extra)
        assert req.filled == longest
        self.prefill(req, chunk, settles)

    @precondition(lambda self: any(not req.prefilled for req in self.cache.requests))
    @rule(place=st.integers(0, 2), chunk=st.integers(1, 9), settles=st.booleans())
    def go_on_with_a_prompt(self, place: int, chunk: int, settles: bool) -> None:
        waiting = [req for req in self.cache.requests if not req.prefilled]
        self.prefill(waiting[place % len(waiting)], chunk, settles)

    @rule()
    def a_forward_pass_of_others(self) -> None:
        self.cache.tree.forward_launched()

    def prefill(self, req: Request, chunk: int, settles: bool) -> None:
        """So many pages of a prompt, the last of which may be a part; whether the next forward pass
        comes before anything else."""
        locked, cached = dict(self.page_levels(req)), self.cache.tree_pages()
        if self.cache.prefill(req, chunk * PAGE, last=False):
            self.learn(req)
            if settles:
                self.cache.tree.forward_launched()
            self.check_settled(req, locked, cached)
        self.after_eviction()

    @precondition(lambda self: len(self.cache.requests) < 3)
    @rule(prompt=prompts, extra=namespaces, answer=st.integers(0, 2 * PAGE))
    def serve(self, prompt: list[int], extra: str | None, answer: int) -> None:
        """A request from its start to its end."""
        req = self.cache.start(pages_of(*prompt), extra)
        self.prefill(req, MAX_TOKENS, settles=True)
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
        protected = cache.tree.protected_size()
        result = cache.tree.evict(EvictParams(tokens))
        gained = cache.allocator.available_size() - free
        assert gained >= min(tokens, evictable)
        assert result.num_tokens_evicted == gained
        # what was due is lowered first, although a request may hold it
        settled = protected - cache.tree.protected_size()
        assert settled >= 0
        assert cache.tree.evictable_size() == evictable - (gained - settled)
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
