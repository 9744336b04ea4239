"""The attention backend on a GPU: the same reads as `backend.py`, by kernels.

decode   planned outside the step's graph from device tensors, into tables at fixed addresses that
         the graph reads; the host never learns how long a request is.
extend   planned eagerly; the shapes come from the lengths that the scheduler knows on the host.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_spherical.attention.backend import SphericalAttnBackend
from sglang_spherical.attention.decode_plan import DecodeTables
from sglang_spherical.attention.extend_plan import ExtendPlan


class KernelAttnBackend(SphericalAttnBackend):
    """Attention over a `SphericalKVPool` in Triton kernels.

    q_heads  query heads of this rank, in every layer
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any, q_heads: int) -> None:
        super().__init__(model_runner)
        self.q_heads = q_heads
        self.graph_tables: DecodeTables | None = None
        self.eager_tables: DecodeTables | None = None
        self.decode_tables: DecodeTables | None = None  # of the step being run
        self.extend_plan: ExtendPlan | None = None

    def support_triton(self) -> bool:
        return True

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocates what graphs of up to `max_bs` requests read, for good."""
        self.graph_tables = DecodeTables(self.pool, self.req_to_token, max_bs, self.q_heads)

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
        elif len(forward_batch.req_pool_indices):
            self._plan_decode(forward_batch, self._eager_tables(len(forward_batch.seq_lens)))

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plans a decode step in the tables of the graphs, before one is captured or replayed."""
        assert self.graph_tables is not None
        self._plan_decode(forward_batch, self.graph_tables)

    def _plan_decode(self, forward_batch: Any, tables: DecodeTables) -> None:
        self.extend_plan = None  # its workspace may be large
        tables.plan(forward_batch.req_pool_indices, forward_batch.seq_lens)
        self.decode_tables = tables

    def _eager_tables(self, batch: int) -> DecodeTables:
        """Tables for a step without a graph: the graphs', where the batch is not larger."""
        for tables in (self.graph_tables, self.eager_tables):
            if tables is not None and tables.max_batch >= batch:
                return tables
        room = 1 << (batch - 1).bit_length()  # batches grow one by one
        self.eager_tables = DecodeTables(self.pool, self.req_to_token, room, self.q_heads)
        return self.eager_tables

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        """q [batch, q_heads * d], k and v [batch, kv_heads, d] -> [batch, q_heads * d]."""
        assert self.decode_tables is not None
        index, d, new = self._index(layer), layer.head_dim, None
        if save_kv_cache:
            k, v = k.view(-1, layer.tp_k_head_num, d), v.view(-1, layer.tp_k_head_num, d)
            new = self.pool.new_tokens(index, forward_batch.out_cache_loc[: len(k)], k, v)
        out = self.decode_tables.attend(index, q.view(len(q), self.q_heads, d), layer.scaling, new)
        return out.view(len(q), -1)

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
        """q [tokens, q_heads * d], k and v [tokens, kv_heads, d] -> [tokens, q_heads * d], until
        the next layer's call overwrites it."""
        heads, d = layer.tp_k_head_num, layer.head_dim
        k, v = k.view(-1, heads, d), v.view(-1, heads, d)
        queries = q.view(len(k), -1, d)
        if save_kv_cache:
            self._observe(layer, queries, k, v, forward_batch)
            self._write(layer, k, v, forward_batch)
        assert self.extend_plan is not None
        out = self.extend_plan.attend(self._index(layer), queries, k, v, layer.scaling)
        return out.view_as(q)
