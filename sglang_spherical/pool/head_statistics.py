"""What frames, and estimates of errors' harm, are made of: sums over the tokens of prompts."""

from __future__ import annotations

import torch

from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.layout import SIDES

SAMPLED_QUERIES = 512
"""Of a prefill, at most, whose attention is looked at."""

COPYING = 3.0
"""How much more errors count in a head that reads to copy and for nothing else: an answer may hang
on it alone. Measured on one small model (docs/retention.md)."""

FEWEST_COPYING = 16
"""Queries with something to copy that say what a head does; fewer count as so many."""

SMALLEST_WEIGHT = 1e-6
"""Of a head that was never seen to read an earlier page; all alike where no prompt is longer than
two."""


class HeadStatistics:
    """Sums over observed tokens, per layer and KV head: squared queries, keys and values, and
    squared probabilities with which sampled queries read earlier pages but the first, which stays
    hot; of all tokens there, and of those that a head would *copy*: what followed when the query's
    token stood in the text before (induction heads, arXiv 2209.11895), if not the same token again,
    as in runs of blanks and the placeholders of an image.

    Keys and values are taken around the mean of each run of `page_size` tokens, as pages will be.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, device: torch.device | str
    ) -> None:
        shape = (layers, kv_heads, head_dim)
        self.query_square = torch.zeros(shape, device=device)
        self.spread_square = torch.zeros(SIDES, *shape, device=device)
        self.read_square = torch.zeros(SIDES, *shape[:-1], device=device)
        self.copy_square = torch.zeros_like(self.read_square)
        self.query_count = [0] * layers
        self.spread_count = [0] * layers
        self.read_count = [0] * layers
        self.copy_count = torch.zeros(layers, device=device)  # the host would have to wait for it

    def add(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page_size: int
    ) -> None:
        """q [n, kv_heads, group, d], k and v [n, kv_heads, d], float32, n consecutive tokens."""
        whole = len(k) // page_size * page_size
        self.query_square[layer] += q.square().sum((0, 2))
        self.query_count[layer] += q.shape[0] * q.shape[2]
        for side, x in ((KEYS, k), (VALUES, v)):
            runs = x[:whole].unflatten(0, (-1, page_size))
            self.spread_square[side, layer] += (
                (runs - runs.mean(1, keepdim=True)).square().sum((0, 1))
            )
        self.spread_count[layer] += whole

    def add_attention(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: torch.Tensor,
        ids: torch.Tensor | None,
        page_size: int,
        scale: float,
    ) -> None:
        """q [n, kv_heads, group, d], unscaled, k [n, kv_heads, d], float32, sinks included,
        positions and token ids [n]: consecutive tokens of one request or of several, one after
        another. Without ids nothing is known of copying."""
        pages = positions // page_size
        asking = (pages > 1).nonzero().squeeze(-1)
        asking = asking[:: -(-len(asking) // SAMPLED_QUERIES) or 1]
        if not len(asking):
            return
        row = torch.arange(len(positions), device=positions.device)
        start = positions - row  # the same for the tokens of a request
        seen = (start == start[asking, None]) & (row <= asking[:, None])
        coded = (pages < pages[asking, None]) & (pages > 0)  # the first stays hot
        copied = torch.zeros_like(coded)
        if ids is not None:
            before = _before(ids, start)
            copied = seen & coded & (before == ids[asking, None]) & (before != ids)
        for head in range(k.shape[1]):  # one by one: what all take together may be too much
            logits = q[asking, head].transpose(0, 1) * scale @ k[:, head].T
            p = logits.masked_fill_(~seen, -torch.inf).softmax(-1)
            square = p.masked_fill_(~coded, 0).square_().sum(0)
            for sums, read in (
                (self.read_square, square.sum()),
                (self.copy_square, (square * copied).sum()),
            ):
                sums[KEYS, layer, head] += scale**2 * read
                sums[VALUES, layer, head] += read
        self.read_count[layer] += len(asking)
        self.copy_count[layer] += copied.any(1).sum()

    def gain(self) -> torch.Tensor:
        """Root mean square of the queries: [layers, kv_heads, d]."""
        count = torch.tensor(self.query_count, device=self.query_square.device)
        return (self.query_square / count.view(-1, 1, 1)).sqrt()

    def spread(self) -> torch.Tensor:
        """Root mean square of keys and values around their page: [2, layers, kv_heads, d]."""
        count = torch.tensor(self.spread_count, device=self.spread_square.device)
        return (self.spread_square / count.view(-1, 1, 1)).sqrt()

    def read(self) -> torch.Tensor:
        """Sum of the squared probabilities with which a query reads earlier pages, over a KV head's
        queries, for keys times the squared scale of logits: [2, layers, kv_heads]."""
        count = torch.tensor(self.read_count, device=self.read_square.device)
        return self.read_square / count.clamp_min(1).unsqueeze(-1)

    def copied(self) -> torch.Tensor:
        """Like `read`, of what is read to copy, on average over the queries that have something to
        copy, or FEWEST_COPYING of them: nothing where no prompt repeats itself."""
        return self.copy_square / self.copy_count.clamp_min(FEWEST_COPYING).unsqueeze(-1)

    def weight(self) -> torch.Tensor:
        """What the squared error of a query's product with a key, and of a value, counts for in
        what is read of earlier pages, more in heads that copy: [2, layers, kv_heads]."""
        read = self.read().clamp_min(SMALLEST_WEIGHT)
        share = (self.copied() / read).clamp_max(1)  # of few queries it may seem more than all
        return read * (1 + COPYING * share.square())

    def reset(self) -> None:
        """Forgets everything observed."""
        for sums in (
            self.query_square,
            self.spread_square,
            self.read_square,
            self.copy_square,
            self.copy_count,
        ):
            sums.zero_()
        self.query_count = [0] * len(self.query_count)
        self.spread_count = [0] * len(self.spread_count)
        self.read_count = [0] * len(self.read_count)


def _before(ids: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The token before each of ids [n], of the same request (`start` [n]): -1 before the first."""
    joined = start[1:] == start[:-1]
    return torch.cat((ids.new_full((1,), -1), torch.where(joined, ids[:-1], -1)))
