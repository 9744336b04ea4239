"""The attention backend on a GPU: the same reads as `backend.py`, by kernels.

decode   planned outside the step's graph from device tensors, into tables at fixed addresses that
         the graph reads; the host never learns how long a request is.
extend   planned eagerly; the shapes come from the lengths that the scheduler knows on the host.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_spherical.attention.backend import SphericalAttnBackend
from sglang_spherical.attention.extend_plan import ExtendPlan


class KernelAttnBackend(SphericalAttnBackend):
    """Attention over a `SphericalKVPool` in Triton kernels."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.extend_plan: ExtendPlan | None = None

    def support_triton(self) -> bool:
        return True

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plans an eager forward pass, or a prefill whose attention runs between graphs."""
        if forward_batch.forward_mode.is_extend():
            self.extend_plan = ExtendPlan(
                self.pool,
                self.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.extend_prefix_lens_cpu,
                forward_batch.extend_seq_lens_cpu,
            )
        else:
            super().init_forward_metadata(forward_batch)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        """q [tokens, q_heads * d], k and v [tokens, kv_heads, d] -> [tokens, q_heads * d]."""
        heads, d = layer.tp_k_head_num, layer.head_dim
        k, v = k.view(-1, heads, d), v.view(-1, heads, d)
        queries = q.view(len(k), -1, d)
        if save_kv_cache:
            self._observe(layer, queries, k, v, forward_batch)
            self._write(layer, k, v, forward_batch)
        assert self.extend_plan is not None
        out = self.extend_plan.attend(self._index(layer), queries, k, v, layer.scaling)
        return out.view_as(q)
