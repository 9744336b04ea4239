"""Causal attention of new tokens to each other, dense, with the log-sum-exp that a merge needs:
FlashInfer's where it is installed, our own kernel elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
import triton

from .kernel import attend_new_rows
from .tables import ExtendTables

LOG2_E = 1.4426950408889634
_WORKSPACE_BYTES = 256 << 20
_ROWS = 64  # of a program
_BLOCK, _BLOCK_BYTES = 64, 16 << 10  # new tokens read at once, at most; of their keys, likewise
FLASHINFER_DTYPES = (torch.float16, torch.bfloat16)
FLASHINFER_HEAD_DIMS = (64, 128, 256)


class NewTokens:
    """The dense part of one forward pass, planned once for all layers.

    LSEs are logarithms in base 2: FlashInfer's own, and so ours.
    """

    def __init__(
        self,
        tables: ExtendTables,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        dtype: torch.dtype,
        flashinfer: bool | None = None,
    ) -> None:
        """flashinfer: None takes it where it is installed, has kernels for the operands, and the
        tables lie on a GPU."""
        self.tables, self.kv_heads, self.scale = tables, kv_heads, scale
        device = tables.requests.device
        if flashinfer is None:
            known = dtype in FLASHINFER_DTYPES and head_dim in FLASHINFER_HEAD_DIMS
            flashinfer = known and device.type == "cuda" and _flashinfer() is not None
        self.wrapper = _wrapper(device) if flashinfer else None
        if self.wrapper is not None:
            starts = torch.tensor((0, *tables.lengths)).cumsum(0).int()
            self.wrapper.plan(
                starts, starts, q_heads, kv_heads, head_dim, causal=True, sm_scale=scale,
                q_data_type=dtype, kv_data_type=dtype,
            )  # fmt: skip

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [tokens, q_heads, d], k and v [tokens, kv_heads, d] -> out like q, lse float32 [tokens,
        q_heads] in base 2."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if self.wrapper is not None:
            return self.wrapper.run(q, k, v, return_lse=True)
        tokens, heads, d = q.shape
        out = torch.empty_like(q)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
        tables = self.tables
        constants = new_rows_constants(d, q.element_size(), tables.tile_rows)
        attend_new_rows[(len(tables.tiles) * (constants["M"] // constants["ROWS"]), self.kv_heads)](
            q, k, v, tables.tiles, tables.requests, out, lse, self.kv_heads, self.scale * LOG2_E,
            G=heads // self.kv_heads, **constants, num_warps=4,
        )  # fmt: skip
        return out, lse


def new_rows_constants(head_dim: int, element_bytes: int, tile_rows: int) -> dict[str, int]:
    """What our kernel is specialised on, but for the query heads of a KV head."""
    columns = columns_of(head_dim)
    block = min(_BLOCK, _BLOCK_BYTES // (columns * element_bytes))
    return {
        "D": head_dim, "DP": columns, "M": tile_rows, "ROWS": min(_ROWS, tile_rows), "BLOCK": block
    }  # fmt: skip


def columns_of(head_dim: int) -> int:
    """Width of a row in registers, padding included."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def _flashinfer() -> Any:
    """FlashInfer's module, or None."""
    try:
        return import_module("flashinfer")
    except ImportError:
        return None


@cache
def _wrapper(device: torch.device) -> Any:
    """One wrapper, and one workspace, per device: planned anew for every forward pass."""
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _flashinfer().BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa2")
