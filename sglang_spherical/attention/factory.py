"""Builds the attention backend, and refuses models whose attention it does not compute."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from triton.runtime.errors import OutOfResources

from sglang_spherical.attention.backend import SphericalAttnBackend
from sglang_spherical.errors import StartupError
from sglang_spherical.pool.kv_pool import SphericalKVPool

OLDEST_GPU = (8, 0)
"""Compute capability."""

GPU_HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head dimensions that the kernels are tested at; narrower bands than theirs read wrongly."""

SMALLEST_PAGES = {64: 32, 80: 64, 96: 64}
"""Smallest page by head dimension, where it is not any. Rows of left-over digits that are no whole
words leave an operand transposed in shared memory, and Triton's product reads it wrongly where it
is narrower than this page (docs/kernels.md)."""


def build_backend(model_runner: Any) -> SphericalAttnBackend:
    """The backend of one rank. Raises StartupError for a foreign pool or an attention not built."""
    pool = model_runner.token_to_kv_pool
    if not isinstance(pool, SphericalKVPool):
        raise StartupError(
            f"--attention-backend spherical: expected a SphericalKVPool, got a "
            f"{type(pool).__name__}"
        )
    q_heads = set()
    for name, layer in model_runner.model.named_modules():
        if isinstance(layer, RadixAttention):
            _check_layer(name, layer)
            q_heads.add(layer.tp_q_head_num)
    if pool.arena.device.type == "cpu":
        return SphericalAttnBackend(model_runner)
    _check_gpu(pool.arena.device, pool.layout.head_dim, pool.layout.page_size)
    from sglang_spherical.attention.compile_ahead import compile_kernels
    from sglang_spherical.attention.kernel_backend import KernelAttnBackend

    if len(q_heads) != 1:
        raise StartupError(
            f"query heads {sorted(q_heads)}: the kernels of --kv-format spherical need as many in "
            "every layer: use --kv-format dense"
        )
    backend = KernelAttnBackend(model_runner, q_heads.pop())
    try:
        compile_kernels(pool, backend.req_to_token, backend.q_heads, model_runner.dtype)
    except OutOfResources as error:
        raise StartupError(
            f"heads of dimension {pool.layout.head_dim}: the GPU kernels of --kv-format spherical "
            f"need more than {torch.cuda.get_device_name(pool.arena.device)} has ({error}): use "
            "--device cpu, or --kv-format dense"
        ) from error
    return backend


def _check_gpu(device: torch.device, head_dim: int, page_size: int) -> None:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < OLDEST_GPU:
        raise StartupError(
            f"{torch.cuda.get_device_name(device)}: the kernels of --kv-format spherical need an "
            f"NVIDIA GPU of compute capability {'.'.join(map(str, OLDEST_GPU))}: use --device cpu, "
            "or --kv-format dense"
        )
    if head_dim not in GPU_HEAD_DIMS:
        known = ", ".join(map(str, GPU_HEAD_DIMS))
        raise StartupError(
            f"heads of dimension {head_dim}: the GPU kernels of --kv-format spherical serve "
            f"{known}: use --device cpu, or --kv-format dense"
        )
    smallest = SMALLEST_PAGES.get(head_dim, 0)
    if page_size < smallest:
        raise StartupError(
            f"--page-size {page_size} with heads of dimension {head_dim}: the GPU kernels of "
            f"--kv-format spherical need pages of {smallest} tokens there: use --page-size "
            f"{smallest}"
        )


def _check_layer(name: str, layer: Any) -> None:
    reasons = {
        "a logit cap": layer.logit_cap > 0,
        "a sliding window": layer.sliding_window_size > -1,
        "cross attention": layer.is_cross_attention,
        "attention that is not causal": layer.attn_type != AttentionType.DECODER,
        "values of another dimension than keys": layer.qk_head_dim != layer.v_head_dim,
    }
    for reason, present in reasons.items():
        if present:
            raise StartupError(
                f"layer {name} has {reason}, which --kv-format spherical does not serve: "
                "use --kv-format dense"
            )
