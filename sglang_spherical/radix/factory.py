"""Builds the prefix tree where SGLang would build its own."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import default_radix_cache_factory

from sglang_spherical.radix.tree import SphericalRadixCache


def build_tree(ctx: Any) -> BasePrefixCache:
    """The spherical tree; SGLang's ChunkCache with --disable-radix-cache, which keeps everything
    hot."""
    if ctx.disable_radix_cache:
        return default_radix_cache_factory(ctx)
    return SphericalRadixCache(ctx.params, ctx.server_args._spherical)
