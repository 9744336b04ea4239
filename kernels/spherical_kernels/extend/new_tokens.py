"""Causal attention of new tokens to each other, dense, with the log-sum-exp that a merge needs.

FlashInfer's ragged prefill was no faster here, from 16 to 8,192 new tokens (docs/kernels.md).
"""

from __future__ import annotations

from functools import cache

import torch
import triton

from ..device import Launch
from .ends import attend_new_rows
from .tables import ExtendTables

LOG2_E = 1.4426950408889634
_ROWS = 64  # of a program
_BLOCK, _BLOCK_BYTES = 64, 16 << 10  # new tokens read at once, at most; of their keys, likewise


def attend_new_tokens(
    tables: ExtendTables, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
    out: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """Attention of new tokens to those of their request that came before, and to themselves.

    q     [tokens, q_heads, d], k and v [tokens, kv_heads, d], of one stride; each contiguous but
          for its tokens, request by request as `tables` say
    out   [tokens, q_heads, d], lse float32 [tokens, q_heads], base 2: what it leaves
    """
    _, heads, d = q.shape
    kv_heads = k.shape[1]
    launch = _launch(d, q.element_size(), tables.tile_rows, heads // kv_heads)
    parts = tables.tile_rows // launch.constants["ROWS"]
    launch(
        (tables.tiles.shape[0] * parts, kv_heads, 1),
        q, k, v, tables.tiles, tables.requests, out, lse, q.stride(0), k.stride(0),
        kv_heads, scale * LOG2_E,
    )  # fmt: skip


@cache
def _launch(head_dim: int, element_bytes: int, tile_rows: int, group: int) -> Launch:
    constants = new_rows_constants(head_dim, element_bytes, tile_rows)
    return Launch(attend_new_rows, G=group, **constants, num_warps=4)


def new_rows_constants(head_dim: int, element_bytes: int, tile_rows: int) -> dict[str, int]:
    """What the kernel is specialised on, but for the query heads of a KV head."""
    columns = columns_of(head_dim)
    block = min(_BLOCK, _BLOCK_BYTES // (columns * element_bytes))
    return {
        "D": head_dim, "DP": columns, "M": tile_rows, "ROWS": min(_ROWS, tile_rows), "BLOCK": block
    }  # fmt: skip


def columns_of(head_dim: int) -> int:
    """Width of a row in registers, padding included."""
    return max(16, int(triton.next_power_of_2(head_dim)))
