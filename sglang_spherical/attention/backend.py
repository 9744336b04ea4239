"""SGLang's attention backend: queries meet the codes.

decode   the new token is coded into its hot page, then everything is read from codes.
extend   new tokens attend to each other as they are, and to the coded prefix through its codes; the
         two parts are merged by their log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_spherical.attention.plan import ReadPlan
from spherical_kernels.extend.reference import attend_new_tokens


class SphericalAttnBackend(AttentionBackend):
    """Attention over a `SphericalKVPool` in plain PyTorch."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.pool = model_runner.token_to_kv_pool
        self.allocator = model_runner.token_to_kv_pool_allocator
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.plans: list[ReadPlan | None] = []

    def support_triton(self) -> bool:
        return False

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plans the reads of one forward pass, shared by all layers: one plan for a decode step,
        one per request for an extend."""
        slots = forward_batch.req_pool_indices
        if forward_batch.forward_mode.is_extend():
            prefixes = forward_batch.extend_prefix_lens.to(slots.dtype)
            self.plans = [self._plan(*pair) for pair in zip(slots.split(1), prefixes.split(1))]
        else:
            self.plans = [self._plan(slots, forward_batch.seq_lens)]

    def _plan(self, slots: torch.Tensor, lengths: torch.Tensor) -> ReadPlan | None:
        """A plan to read the first `lengths` tokens of the requests in `slots`; None for no
        tokens."""
        if not len(lengths) or not int(lengths.max()):
            return None
        return ReadPlan.for_lengths(
            self.pool.arena, self.pool.frames, self.req_to_token, slots, lengths
        )

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
        if save_kv_cache:
            heads, d = layer.tp_k_head_num, layer.head_dim
            self._write(layer, k.view(-1, heads, d), v.view(-1, heads, d), forward_batch)
        (plan,) = self.plans
        assert plan is not None
        batch, heads, d = len(q), layer.tp_k_head_num, layer.head_dim
        rows = q.float().reshape(batch * heads, -1, d) * layer.scaling
        out = plan.attend(self._index(layer), rows).out
        return out.reshape(batch, -1).to(q.dtype)

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
        out = torch.zeros_like(queries)
        start = 0
        for length, plan in zip(forward_batch.extend_seq_lens_cpu, self.plans):
            tokens = slice(start, start + length)
            start += length
            if length:
                rows = queries[tokens].float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
                rows = rows * layer.scaling  # [heads, group, tokens, d]
                keys, values = (x[tokens].float().transpose(0, 1) for x in (k, v))
                state = attend_new_tokens(rows, keys, values)
                if plan is not None:
                    state = state.merge(plan.attend(self._index(layer), rows.flatten(1, 2)))
                merged = state.out.unflatten(1, (-1, length)).permute(2, 0, 1, 3)
                out[tokens] = merged.flatten(1, 2).to(q.dtype)
        return out.view_as(q)

    def _index(self, layer: Any) -> int:
        """The layer's place in this rank's pool."""
        return int(layer.layer_id - self.pool.start_layer)

    def _observe(
        self, layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward_batch: Any
    ) -> None:
        if not self.pool.learns(layer):
            return
        loc, page_size = forward_batch.out_cache_loc[: len(k)], self.pool.page_size

        def older_pages() -> torch.Tensor:
            opened = loc[loc % page_size == 0] // page_size  # nothing was in these before
            pages = self.allocator.pages_in_use()
            return pages[~torch.isin(pages, opened)]

        positions, ids = forward_batch.positions[: len(k)], forward_batch.input_ids
        ids = None if ids is None else ids[: len(k)]
        self.pool.observe(layer, q, k, v, positions, ids, older_pages)

    def _write(self, layer: Any, k: torch.Tensor, v: torch.Tensor, forward_batch: Any) -> None:
        """k and v [tokens, kv_heads, d]."""
        self.pool.set_kv_buffer(layer, forward_batch.out_cache_loc[: k.shape[0]], k, v)
