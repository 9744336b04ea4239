"""Builds the attention backend, and refuses models whose attention it does not compute."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_spherical.attention.backend import SphericalAttnBackend
from sglang_spherical.errors import StartupError
from sglang_spherical.pool.kv_pool import SphericalKVPool


def build_backend(model_runner: Any) -> SphericalAttnBackend:
    """The backend of one rank. Raises StartupError for a foreign pool or an attention not built."""
    pool = model_runner.token_to_kv_pool
    if not isinstance(pool, SphericalKVPool):
        raise StartupError(
            f"--attention-backend spherical: expected a SphericalKVPool, got a "
            f"{type(pool).__name__}"
        )
    for name, layer in model_runner.model.named_modules():
        if isinstance(layer, RadixAttention):
            _check_layer(name, layer)
    return SphericalAttnBackend(model_runner)


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
