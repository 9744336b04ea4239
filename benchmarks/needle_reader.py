"""A cached haystack as a question over it reads it, in one form of the cache after another;
`needle_margins.py` scores what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_spherical.config import SphericalConfig
from sglang_spherical.evaluation.attention import CacheForm, WindowAttention

RECENT_TOKENS = SphericalConfig.recent_tokens

Sides = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer, [kv_heads, tokens, d]."""


class OneSide:
    """A form whose other side, keys or values, stays as it is when new."""

    def __init__(self, form: CacheForm, side: int) -> None:
        self.form, self.side = form, side
        self.page_size = form.page_size

    def reach(self, layer: int, side: int, x: torch.Tensor) -> Sides:
        """See `CacheForm.reach`."""
        new, later = self.form.reach(layer, side, x)
        return new, later if side == self.side else new


class Rounded:
    """A dense cache of floats with fewer bits than the exact one."""

    def __init__(self, dtype: torch.dtype, page_size: int) -> None:
        self.dtype, self.page_size = dtype, page_size

    def reach(self, layer: int, side: int, x: torch.Tensor) -> Sides:
        """See `CacheForm.reach`."""
        return (x.to(self.dtype).float(),) * 2


class CachedHaystack:
    """Keys and values of a haystack in one form of the cache.

    exact  by layer, of whole pages
    form   None keeps them exact
    """

    def __init__(self, exact: Sequence[Sides], form: CacheForm | None) -> None:
        self.tokens = exact[0][0].shape[1]
        self.page_size = 1 if form is None else form.page_size
        self.forms = [
            [(x, x) if form is None else form.reach(layer, side, x) for side, x in enumerate(sides)]
            for layer, sides in enumerate(exact)
        ]

    def read(self, layer: int, end: int) -> Sides:
        """As the next request reads it, when the pages before token `end` but for the first one,
        which holds the sinks, have been lowered."""
        first = self.page_size
        keys, values = (
            torch.cat([new[:, :first], later[:, first:end], new[:, end:]], 1)
            for new, later in self.forms[layer]
        )
        return keys, values


class HaystackReader(WindowAttention):
    """Dense attention of a haystack, whose keys and values are kept; or of a question over one that
    is cached, whose own tokens are exact.

    cached  what a question reads; None when it is a haystack that comes
    seen    of the last haystack, by layer
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cached: CachedHaystack | None = None
        self.end = 0
        self.seen: list[Sides] = []
        self.install(model)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if self.cached is None:
            self.seen.append((key[0].float(), value[0].float()))
            mask = None
        else:
            before = self.cached.read(layer, self.end)
            key, value = (
                torch.cat([cached[None].to(own.dtype), own], 2)
                for cached, own in zip(before, (key, value))
            )
            new, total = query.shape[2], key.shape[2]
            mask = torch.ones(new, total, dtype=torch.bool, device=key.device).tril(total - new)
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )[0]

    def take_in(self, tokens: Sequence[int]) -> list[Sides]:
        """Keys and values of a haystack, exact, by layer."""
        self.cached, self.seen = None, []
        with torch.inference_mode():
            self.model.base_model(torch.tensor([tokens]), use_cache=False)
        return self.seen

    def continued(
        self, cached: CachedHaystack, question: Sequence[int], answer: Sequence[int]
    ) -> torch.Tensor:
        """Logits [len(answer), vocabulary] of each of an answer's tokens after those before it.

        The newest tokens of haystack and question together are hot, as in a server.
        """
        hot_from = cached.tokens + len(question) - RECENT_TOKENS
        self.cached, self.end = cached, max(hot_from, 0) // cached.page_size * cached.page_size
        ids = torch.tensor([[*question, *answer[:-1]]])
        positions = cached.tokens + torch.arange(ids.shape[1]).unsqueeze(0)
        with torch.inference_mode():
            out = self.model(
                ids, position_ids=positions, use_cache=False, logits_to_keep=len(answer)
            )
        return out.logits[0].float()
