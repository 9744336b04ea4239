"""A Hugging Face model whose attention reads coded keys and values, under teacher forcing.

The window is walked page by page, as a request grows: the queries of a page read their own page as
it is when new (level 0 of the tiers) and everything before it as the cache holds it by then, that
is at the tier that is being measured, but for the first page, whose sinks stay as they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_spherical.evaluation.scores import LayerErrors
from sglang_spherical.pool.arena import KEYS, VALUES

ATTENTION_NAME = "sglang_spherical_evaluation"
SAMPLE_EVERY = 8
"""Queries of a window's second half whose attention is compared with exact keys: every eighth."""


Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
"""Takes layer, queries [q_heads, tokens, d], keys and values [kv_heads, tokens, d] of a window, and
the scale of logits."""


class CacheForm(Protocol):
    """How a cache holds keys and values."""

    @property
    def page_size(self) -> int:
        """Tokens of a page."""

    def reach(self, layer: int, side: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [kv_heads, tokens, d] as it is read while new, and as it is read later."""


@dataclass(frozen=True)
class CodedRead:
    """How prefixes are read: in which form, and where errors are summed."""

    form: CacheForm
    errors: LayerErrors


class WindowAttention(ABC):
    """The attention of every layer of one model, of causal windows without padding."""

    def install(self, model: Any) -> None:
        """Makes `model` attend through this object. The newest installation wins in a process."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register(ATTENTION_NAME, self.forward)
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
        model.set_attn_implementation(ATTENTION_NAME)

    def forward(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface.

        query [1, q_heads, tokens, d], key and value [1, kv_heads, tokens, d].
        Returns [1, tokens, q_heads, d].
        """
        for name in ("sliding_window", "softcap", "s_aux"):
            if kwargs.get(name) is not None:
                raise ValueError(f"--model: its attention uses {name}, which is not served")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = self.attend(module.layer_idx, query, key, value, scale).to(query.dtype)
        return out.transpose(0, 1).unsqueeze(0).contiguous(), None

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One layer's output, [q_heads, tokens, d]."""


class MeasuredAttention(WindowAttention):
    """Attention that is dense, or through codes.

    coded      how prefixes are read; None attends densely
    observers  what learns from the windows that pass
    """

    def __init__(self) -> None:
        self.coded: CodedRead | None = None
        self.observers: Sequence[Observer] = ()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        q, k, v = query[0], key[0], value[0]
        for observe in self.observers:
            observe(layer, q, k, v, scale)
        if self.coded is None:
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )[0]
        grouped = q.float().unflatten(0, (len(k), -1)) * scale
        return attend_codes(self.coded, layer, grouped, k.float(), v.float()).flatten(0, 1)


def attend_codes(
    read: CodedRead, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Causal attention of a window of whole pages; errors are summed into `read.errors`.

    q [kv_heads, group, tokens, d], scaled; k and v [kv_heads, tokens, d], exact; all float32.
    Returns the output, of q's shape.
    """
    page_size, tokens = read.form.page_size, k.shape[1]
    hot_k, tier_k = read.form.reach(layer, KEYS, k)
    hot_v, tier_v = read.form.reach(layer, VALUES, v)
    read.errors.add_values(layer, v, tier_v)
    cached_k, cached_v = hot_k.clone(), hot_v.clone()
    out = torch.empty_like(q)
    for start in range(0, tokens, page_size):
        end = start + page_size
        p = causal_attention(q[:, :, start:end], cached_k[:, :end])
        out[:, :, start:end] = p @ cached_v[:, None, :end]
        if 2 * start >= tokens:
            sample = slice(start, end, SAMPLE_EVERY)
            exact = causal_attention(q[:, :, start:end], k[:, :end], SAMPLE_EVERY)
            exact_out = exact @ v[:, None, :end]
            read.errors.add_attention(
                layer, exact, p[:, :, ::SAMPLE_EVERY], exact_out, out[:, :, sample]
            )
        if start:  # the page is full: it goes to the tier, unless it holds the sinks
            cached_k[:, start:end] = tier_k[:, start:end]
            cached_v[:, start:end] = tier_v[:, start:end]
    return out


def causal_attention(q: torch.Tensor, k: torch.Tensor, every: int = 1) -> torch.Tensor:
    """Attention of the last n tokens, or of every so many of them, to k [kv_heads, tokens, d].

    q [kv_heads, group, n, d], scaled -> probabilities [kv_heads, group, ceil(n / every), tokens].
    """
    n, tokens = q.shape[2], k.shape[1]
    logits = q[:, :, ::every] @ k.unsqueeze(1).transpose(-1, -2)
    positions = torch.arange(tokens - n, tokens, every, device=q.device)
    future = torch.arange(tokens, device=q.device) > positions.unsqueeze(1)
    return logits.masked_fill_(future, -torch.inf).softmax(-1)
