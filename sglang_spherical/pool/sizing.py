"""From a model and a configuration to a page layout, before anything is allocated."""

from __future__ import annotations

from functools import cache
from typing import Any

from sglang.srt.runtime_context import get_parallel

from sglang_spherical.config import SphericalConfig
from sglang_spherical.pool.layout import PageLayout, default_levels

_fit = cache(PageLayout.fit)  # asked for several times per start; large models take a second


def page_layout(kvc: Any, num_layers: int, config: SphericalConfig) -> PageLayout:
    """The layout for this rank's layers and KV heads. `kvc`: SGLang's KVCacheConfigurator."""
    return _fit(
        kvc.server_args.page_size,
        kvc.model_config.head_dim,
        num_layers,
        kvc.model_config.get_num_kv_heads(get_parallel().attn_tp_size),
        default_levels(config),
    )


def hot_bytes_per_token(kvc: Any, num_layers: int, config: SphericalConfig) -> int:
    """Bytes of capacity that one hot token takes, tables included."""
    return page_layout(kvc, num_layers, config).hot_bytes_per_token
