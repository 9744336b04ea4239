"""Builds the pool and the allocator where SGLang would build its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_exec, get_parallel

from sglang_spherical import frame_file
from sglang_spherical.config import SphericalConfig
from sglang_spherical.errors import StartupError
from sglang_spherical.pool.allocator import SphericalAllocator
from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.sizing import page_layout


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
    pool = SphericalKVPool(
        pages * layout.page_size,
        layout,
        configurator.device,
        get_exec().features.enable_memory_saver,
        configurator.layer_info.start_layer,
        configurator.layer_info.end_layer,
    )
    pool.learning = False  # until it is started: warming up and capturing show no real prompts
    if config.frames is not None:
        _load_frames(pool, configurator, Path(config.frames))
    return pool


def _load_frames(pool: SphericalKVPool, configurator: Any, path: Path) -> None:
    """Gives the pool its layers and KV heads of a calibration file of all.

    Raises StartupError when the file is damaged or belongs to another model.
    """
    model = configurator.model_config
    identity = frame_file.model_identity(frame_file.local_model(model.model_path, model.revision))
    known = frame_file.load(path, identity)
    parallel = get_parallel()
    heads = frame_file.rank_heads(known.kv_heads, parallel.attn_tp_rank, parallel.attn_tp_size)
    mine = known.part(slice(pool.start_layer, pool.end_layer), heads)
    pool.frames.load(mine.centre, mine.gain, mine.spread)


def build_allocator(configurator: Any, *, token_to_kv_pool: Any, **_: Any) -> SphericalAllocator:
    """The allocator over a pool that `build_pool` built."""
    if not isinstance(token_to_kv_pool, SphericalKVPool):
        raise StartupError(
            f"KV pool: expected a SphericalKVPool, SGLang built a "
            f"{type(token_to_kv_pool).__name__}; "
            "this model needs another pool: use --kv-format dense"
        )
    return SphericalAllocator(token_to_kv_pool)
