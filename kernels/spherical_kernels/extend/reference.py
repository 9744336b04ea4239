"""Causal attention among a request's new tokens, with the log-sum-exp that a merge needs."""

from __future__ import annotations

import torch

from ..decode.reference import AttentionState

QUERY_ROWS = 256
"""New tokens whose logits are held at once."""


def attend_new_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionState:
    """Causal attention of n new tokens to themselves and the new tokens before them.

    q     float32 [kv_heads, group, n, d], scaled
    k, v  float32 [kv_heads, n, d]
    Returns out [kv_heads, group * n, d] and lse [kv_heads, group * n].
    """
    n = q.shape[2]
    outs, lses = [], []
    for start in range(0, n, QUERY_ROWS):
        end = min(start + QUERY_ROWS, n)
        logits = q[:, :, start:end] @ k[:, None, :end].transpose(-1, -2)
        future = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu_(start + 1)
        logits.masked_fill_(future, -torch.inf)
        lse = logits.logsumexp(-1)
        outs.append(torch.exp(logits - lse.unsqueeze(-1)) @ v[:, None, :end])
        lses.append(lse)
    return AttentionState(torch.cat(outs, 2).flatten(1, 2), torch.cat(lses, 2).flatten(1, 2))
