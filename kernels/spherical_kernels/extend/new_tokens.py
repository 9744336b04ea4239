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
_BLOCK = 64  # new tokens read at once
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
        attend_new_rows[(len(tables.tiles), self.kv_heads)](
            q, k, v, tables.tiles, tables.requests, out, lse, self.kv_heads, self.scale * LOG2_E,
            D=d, DP=max(16, triton.next_power_of_2(d)), G=heads // self.kv_heads,
            M=tables.tile_rows, BLOCK=_BLOCK, num_warps=4 if tables.tile_rows <= 64 else 8,
        )  # fmt: skip
        return out, lse


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
