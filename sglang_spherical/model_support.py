"""Which models a spherical KV cache can hold.

Read from SGLang's `ModelConfig`, that is from the model's config.json, before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_spherical.errors import StartupError

HEAD_DIM_MULTIPLE = 16  # values: a band of channels, and a kernel's tile, is this wide
_WINDOWED = ("sliding_attention", "chunked_attention")


def check_model(model_config: Any) -> None:
    """Raise StartupError, naming the model's path, unless every layer is plain MHA or GQA."""
    for reason in _reasons(model_config):
        raise StartupError(
            f"--model-path {model_config.model_path}: {reason}, which --kv-format spherical does "
            "not serve: use a plain MHA or GQA model, or --kv-format dense"
        )


def _reasons(model_config: Any) -> Iterator[str]:
    """What each unsupported trait of the model is, most telling first."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch, is_minimax_sparse

    layer_types = set(getattr(model_config.hf_text_config, "layer_types", None) or ())
    if model_config.is_encoder_decoder:
        yield "it is an encoder-decoder"
    if model_config.attention_arch == AttentionArch.MLA:
        yield "its attention is MLA"
    if mambaish_config(model_config) or "linear_attention" in layer_types:
        yield "it has state-space or linear attention layers"
    if model_config.has_attention_sinks:
        yield "it has attention sinks"
    if is_minimax_sparse(model_config.hf_config):
        yield "its attention is sparse"
    if (
        model_config.is_hybrid_swa
        or model_config.attention_chunk_size is not None
        or layer_types.intersection(_WINDOWED)
    ):
        yield "it has sliding-window layers"
    yield from _shape_reasons(model_config)


def _shape_reasons(model_config: Any) -> Iterator[str]:
    head_dim, v_head_dim = model_config.head_dim, model_config.v_head_dim
    if model_config.has_asymmetric_kv:
        yield f"its key heads have {head_dim} dimensions and its value heads {v_head_dim}"
    if head_dim % HEAD_DIM_MULTIPLE:
        yield f"its head dimension {head_dim} is no multiple of {HEAD_DIM_MULTIPLE}"
