"""Dense decode kernels to compare with, on random caches of a shape; None where not installed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from decode_cases import PAGE, Shape

KV_SPLITS = 8  # SGLang's default for --triton-attention-num-kv-splits

Peer = Callable[[], object]


def flashinfer(shape: Shape, dtype: torch.dtype) -> Peer | None:
    """FlashInfer's paged batch decode, on tensor cores, pages of 64 tokens."""
    try:
        import flashinfer as library
    except ImportError:
        return None
    kv, d = shape.kv_heads, shape.head_dim
    cache = torch.randn(shape.batch * shape.pages, 2, PAGE, kv, d, device="cuda").to(dtype)
    order = torch.randperm(shape.batch * shape.pages, device="cuda").int()
    starts = torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32) * shape.pages
    last = torch.full_like(starts[:-1], (shape.context - 1) % PAGE + 1)
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        starts, order, last, shape.heads, kv, d, PAGE, q_data_type=torch.bfloat16,
        kv_data_type=dtype,
    )  # fmt: skip
    q = torch.randn(shape.batch, shape.heads, d, device="cuda", dtype=torch.bfloat16)
    return lambda: wrapper.run(q, cache)


def sglang_triton(shape: Shape) -> Peer | None:
    """SGLang's Triton decode attention, bf16."""
    try:
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    except ImportError:
        return None
    tokens, d = shape.batch * shape.pages * PAGE, shape.head_dim
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    keys, values = (torch.randn(tokens, shape.kv_heads, d, **bf16) for _ in range(2))
    pages = torch.randperm(shape.batch * shape.pages, device="cuda").unsqueeze(1)
    indices = (pages * PAGE + torch.arange(PAGE, device="cuda")).flatten()
    indices = indices.view(shape.batch, -1)[:, : shape.context].flatten()
    starts = torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32) * shape.context
    q = torch.randn(shape.batch, shape.heads, d, **bf16)
    out = torch.empty_like(q)
    logits = torch.empty(shape.batch, shape.heads, KV_SPLITS, d, device="cuda")
    lse = torch.empty(shape.batch, shape.heads, KV_SPLITS, device="cuda")
    splits = torch.full((shape.batch,), KV_SPLITS, dtype=torch.int32, device="cuda")
    scale = 1 / math.sqrt(d)
    return lambda: decode_attention_fwd(
        q, keys, values, out, starts, indices, logits, lse, splits, KV_SPLITS, scale, 1.0, 1.0
    )


PEERS: dict[str, Callable[[Shape], Peer | None]] = {
    "flashinfer_bf16_us": lambda shape: flashinfer(shape, torch.bfloat16),
    "flashinfer_fp8_us": lambda shape: flashinfer(shape, torch.float8_e4m3fn),
    "sglang_triton_us": sglang_triton,
}
