"""SGLang's paged allocator over blocks: logical page ids, and blocks counted in hot-token
equivalents.

Request-owned pages are hot and own H blocks. Pages owned by the radix tree may own fewer. Two free
lists, of page ids and of blocks, are device tensors whose lengths are known on the host, so that no
call waits for the device. Page ids are SGLang's and stay on its scheduling stream; blocks and the
tables of pages change in the forward passes' order (order.py). `available_size() >= n` implies that
a page-aligned alloc of n succeeds, because a page's blocks never exceed what it costs.
"""

from __future__ import annotations

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from sglang_spherical.metrics import NoMetrics
from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.order import to_device


class SphericalAllocator(PagedTokenToKVPoolAllocator):
    """Hands out token locations (page id * page_size + place) backed by blocks of the arena.

    free_pages    int64, ids of unused logical pages
    free_blocks   int32, blocks no page owns
    free_tokens   the capacity that no page costs, in hot-token equivalents
    metrics       is told what changes; engagement.py gives another one when metrics are on
    """

    def __init__(self, pool: SphericalKVPool, need_sort: bool = False) -> None:
        self.pool = pool
        self.metrics = NoMetrics()
        super().__init__(
            pool.size,
            pool.page_size,
            torch.uint8,
            pool.arena.device,
            kvcache=pool,
            need_sort=need_sort,
        )

    def clear(self) -> None:
        """All memory free again; page 0 keeps the first H blocks."""
        super().clear()
        layout, arena = self.pool.layout, self.pool.arena
        self.free_pages = torch.arange(1, arena.num_pages, dtype=torch.int64, device=self.device)
        self.free_tokens = self.pool.size
        first = layout.hot_blocks
        with self.pool.order.after_forwards():
            self.free_blocks = torch.arange(
                first, first + arena.num_blocks, dtype=torch.int32, device=self.device
            )
            self.pool.forget()
        self.metrics.cleared(self.free_tokens)

    def available_size(self) -> int:
        """Free memory in hot-token equivalents."""
        return self.free_tokens

    def pages_in_use(self) -> torch.Tensor:
        """Ids of pages that own blocks, int64, page 0 left out. Waits for the device: not for hot
        paths."""
        used = torch.ones(self.pool.arena.num_pages, dtype=torch.bool, device=self.device)
        used[0] = False
        used[self.free_pages] = used[self.release_pages] = False
        return used.nonzero().squeeze(1)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Token locations [need_size] of whole hot pages; None when memory is short."""
        pages = self._take_pages(-(-need_size // self.page_size))
        if pages is None:
            return None
        places = torch.arange(self.page_size, device=self.device)
        return (pages.unsqueeze(1) * self.page_size + places).flatten()

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Locations [extend_num_tokens] of new tokens after each request's prefix; None when
        short."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        pages = self._take_pages(num_new_pages)
        if pages is None:
            return None
        return _extend_locations(prefix_lens_cpu, seq_lens_cpu, last_loc, pages, self.page_size)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Location [batch] of each request's next token; None when memory is short."""
        count = int((seq_lens_cpu % self.page_size == 1).sum())
        pages = self._take_pages(count)
        if pages is None:
            return None
        following = last_loc.long() + 1
        if not count:
            return following
        opens_page = seq_lens % self.page_size == 1
        place = (opens_page.cumsum(0) - 1).clamp_min(0)
        return torch.where(opens_page, pages[place] * self.page_size, following)

    def free_at_level(self, pages: torch.Tensor, level: int) -> None:
        """Frees tree-owned pages int64 [n], all at one level."""
        owned = self.pool.layout.blocks[level]
        with self.pool.order.after_forwards(pages):
            blocks = self.pool.arena.page_blocks[pages, :owned].flatten()
            self.free_blocks = torch.cat((blocks, self.free_blocks))
        self.free_tokens += len(pages) * self.pool.layout.cost_tokens[level]
        self.metrics.changed(level, -len(pages), self.free_tokens)
        super()._release_page_ids(pages)

    def lower(self, pages: torch.Tensor, old: int, new: int) -> None:
        """Re-encodes tree-owned full pages int64 [n] from level `old` to a coarser `new`."""
        cost = self.pool.layout.cost_tokens
        with self.pool.order.after_forwards(pages):
            blocks = self.pool.lower(pages, old, new)
            self.free_blocks = torch.cat((blocks, self.free_blocks))
        self.free_tokens += len(pages) * (cost[old] - cost[new])
        self.metrics.retiered(old, new, len(pages), self.free_tokens)

    def promote(self, pages: torch.Tensor, level: int, originals: torch.Tensor) -> int:
        """Gives tree-owned pages int64 [n] at `level` the storage of hot pages int64 [n] with the
        same tokens, which keep being hot pages, of no content, for their owner to free.

        Returns how many there was memory for: the first ones.
        """
        layout = self.pool.layout
        more = self.page_size - layout.cost_tokens[level]
        count = min(len(pages), self.free_tokens // more) if more else len(pages)
        pages, originals = pages[:count], originals[:count]
        owned, whole = layout.blocks[level], layout.hot_blocks
        needed = count * (whole - owned)
        taken, self.free_blocks = self.free_blocks[:needed], self.free_blocks[needed:]
        self.free_tokens -= count * more
        with self.pool.order.after_forwards(pages, originals, taken):
            table = self.pool.arena.page_blocks
            left = torch.cat((table[pages, :owned], taken.view(count, whole - owned)), 1)
            table[pages] = table[originals]
            table[originals] = left
            self.pool.arena.set_level(pages, 0)
        self.metrics.promoted(level, count, self.free_tokens)
        return count

    def _take_pages(self, count: int) -> torch.Tensor | None:
        """Ids [count] of new hot pages, placed on blocks; None when memory is short."""
        if count * self.page_size > self.free_tokens:
            return None
        blocks = count * self.pool.layout.hot_blocks
        self.free_tokens -= count * self.page_size
        if count > len(self.free_pages):
            self.merge_and_sort_free()
        pages, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        taken, self.free_blocks = self.free_blocks[:blocks], self.free_blocks[blocks:]
        if count:
            with self.pool.order.after_forwards(pages, taken):
                self.pool.arena.place_pages(pages, taken.view(count, -1))
            self.metrics.changed(0, count, self.free_tokens)
        return pages

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        # SGLang's own frees end here: request-owned pages, which are hot.
        self.free_at_level(torch.cat(page_ids), 0)


def _extend_locations(
    prefix_lens: torch.Tensor, seq_lens: torch.Tensor, last_loc: torch.Tensor, pages: torch.Tensor,
    page_size: int,
) -> torch.Tensor:  # fmt: skip
    """Token locations int64 of all requests, one after the other, without a wait.

    Tokens [prefix_lens, seq_lens) of a request, both on the host, fill the page of `last_loc`, then
    its new `pages`, both on the device.
    """
    prefixes, ends = prefix_lens.numpy().astype(np.int64), seq_lens.numpy().astype(np.int64)
    lengths = ends - prefixes
    request = np.repeat(np.arange(len(lengths)), lengths)
    rank = np.arange(len(request)) - np.repeat(lengths.cumsum() - lengths, lengths)
    old_pages = -(-prefixes // page_size)
    new_pages = -(-ends // page_size) - old_pages
    index = (prefixes[request] + rank) // page_size - old_pages[request]
    first_page = len(lengths) + new_pages.cumsum() - new_pages
    start = np.where(index < 0, request, first_page[request] + index)
    offset = np.where(index < 0, rank, (prefixes[request] + rank) % page_size)
    start_of, offset_of = to_device(np.stack((start, offset)), pages.device)
    starts = torch.cat((last_loc.long() + 1, pages * page_size))  # of open pages, then new ones
    return starts[start_of] + offset_of
