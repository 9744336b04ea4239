"""Builds the pool and the allocator where SGLang would build its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_exec, get_parallel

from sglang_spherical import frame_file
from sglang_spherical.config import SphericalConfig
from sglang_spherical.errors import StartupError
from sglang_spherical.pool.allocator import SphericalAllocator
from sglang_spherical.pool.choice import choose_kinds, expected_change
from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.sizing import page_layout

logger = logging.getLogger(__name__)


def build_pool(configurator: Any, max_total_num_tokens: int) -> SphericalKVPool:
    """The pool of one rank, for `max_total_num_tokens` hot-token equivalents.

    Raises StartupError when that is less than a page for every request that may run.
    """
    config: SphericalConfig = configurator.server_args._spherical
    layout = page_layout(configurator, configurator.layer_info.num_effective_layers, config)
    pages = max_total_num_tokens // layout.page_size
    if pages < 1:
        raise StartupError(
            f"KV memory for {max_total_num_tokens} tokens is less than one page of "
            f"{layout.page_size}: "
            "raise --mem-fraction-static, --max-total-tokens or --spherical-kv-bytes"
        )
    requests = configurator.server_args.max_running_requests
    if requests is not None and requests > pages:
        raise StartupError(
            f"--max-running-requests {requests}: KV memory holds {pages} pages of "
            f"{layout.page_size} "
            "tokens, less than one per request: lower it, or raise --max-total-tokens"
        )
    known = None if config.frames is None else _known_frames(configurator, Path(config.frames))
    if known is not None and known.distortion is not None:
        layout = layout.with_kinds(choose_kinds(layout, known.distortion))
        changes = zip(layout.levels[1:], expected_change(layout, known.distortion))
        said = ", ".join(f"{level.name} {change:+.0%}" for level, change in changes)
        logger.info("patterns chosen per head; expected loss against one for all: %s", said)
    pool = SphericalKVPool(
        pages * layout.page_size,
        layout,
        configurator.device,
        get_exec().features.enable_memory_saver,
        configurator.layer_info.start_layer,
        configurator.layer_info.end_layer,
    )
    pool.learning = False  # until it is started: warming up and capturing show no real prompts
    if known is not None:
        pool.frames.load(known.centre, known.gain, known.spread)
    return pool


def _known_frames(configurator: Any, path: Path) -> frame_file.FrameStatistics:
    """This rank's layers and KV heads of a calibration file of all.

    Raises StartupError when the file is damaged or belongs to another model.
    """
    model = configurator.model_config
    identity = frame_file.model_identity(frame_file.local_model(model.model_path, model.revision))
    known = frame_file.load(path, identity)
    parallel = get_parallel()
    heads = frame_file.rank_heads(known.kv_heads, parallel.attn_tp_rank, parallel.attn_tp_size)
    layers = slice(configurator.layer_info.start_layer, configurator.layer_info.end_layer)
    return known.part(layers, heads)


def build_allocator(configurator: Any, *, token_to_kv_pool: Any, **_: Any) -> SphericalAllocator:
    """The allocator over a pool that `build_pool` built."""
    if not isinstance(token_to_kv_pool, SphericalKVPool):
        raise StartupError(
            f"KV pool: expected a SphericalKVPool, SGLang built a "
            f"{type(token_to_kv_pool).__name__}; "
            "this model needs another pool: use --kv-format dense"
        )
    return SphericalAllocator(token_to_kv_pool)
