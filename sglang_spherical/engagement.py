"""Proof, in every worker, that keys and values go to the spherical cache and nowhere else.

SGLang's plugin loader fails open: what goes wrong in a plugin or a hook is logged, and serving goes
on with the dense cache. So no single place is trusted. What can fail, alone, and what happens then:

1. The plugin is not loaded in the launching process: `--kv-format` is an unknown argument, and
   `Engine(kv_format=…)` has an unexpected keyword.
2. A hook on the flags is missing there: parsing `--kv-format spherical` itself looks whether every
   hook of the ledger sits (`spherical_patches.hooks`), and so does `ServerArgs.__init__`. Without
   the hook on `add_cli_args` the flag is unknown; without the one on `__init__` the keyword is.
3. The plugin is not loaded in a worker, or fails before it registers its backends: the launching
   process has put the name `spherical` into `attention_backend` and `radix_cache_backend`, which
   SGLang looks up in its registries and does not find.
4. A hook is missing in a worker: the other hooks look at the ledger before they do anything, and
   so do both registered factories, which SGLang calls by name and not through hooks.
5. The hooks sit but do not act (a subclass overrides a hooked method, another plugin replaces its
   result): the backend factory takes no pool but ours, and `verify` looks at the four parts that
   the scheduler holds.
6. `verify` itself does not run: its hook is in the ledger, so 4 holds.
7. The configuration is lost on the way to a worker (a copy of the arguments, field by field): the
   factories refuse to build without it.

Dense serving would take two of these at once. The banner is printed last, by the worker that
checked: a log without it is the log of a dense server.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from sglang_spherical.errors import StartupError


@dataclass(frozen=True)
class Parts:
    """The four objects that hold a worker's KV cache, as the scheduler and the runner see them."""

    pool: Any
    allocator: Any
    tree: Any
    backend: Any


def verify(scheduler: Any) -> None:
    """Check the parts of `scheduler`, once built, and start them; rank 0 prints the banner.

    Raises StartupError where one of them is not ours, or they do not belong together.
    """
    runner = scheduler.tp_worker.model_runner
    parts = Parts(
        pool=runner.token_to_kv_pool,
        allocator=scheduler.token_to_kv_pool_allocator,
        tree=scheduler.tree_cache,
        backend=runner.attn_backend,
    )
    check_parts(parts, radix_disabled=scheduler.server_args.disable_radix_cache)
    overlapped = scheduler.enable_overlap and parts.pool.arena.device.type == "cuda"
    parts.pool.start(runner.forward_stream if overlapped else None)
    _start_metrics(parts, scheduler.metrics_collector_context)
    if scheduler.ps.tp_rank == 0:
        print(banner(parts), file=sys.stderr, flush=True)


def _start_metrics(parts: Parts, context: Any) -> None:
    """Metrics of the cache, where SGLang's `context` says that this worker has metrics."""
    if not context.current_scheduler_metrics_enabled:
        return
    from sglang_spherical.metrics import PrometheusMetrics

    allocator = parts.allocator
    labels = context.collector.labels
    allocator.metrics = PrometheusMetrics(parts.pool.layout, allocator.size, labels)


def check_parts(parts: Parts, *, radix_disabled: bool) -> None:
    """Raise StartupError unless all four are the spherical ones and refer to each other.

    Without a radix cache (`radix_disabled`) SGLang's ChunkCache is the right tree.
    """
    from sglang_spherical.attention.backend import SphericalAttnBackend
    from sglang_spherical.pool.allocator import SphericalAllocator
    from sglang_spherical.pool.kv_pool import SphericalKVPool

    _require("KV pool", parts.pool, SphericalKVPool)
    _require("allocator", parts.allocator, SphericalAllocator)
    _require("radix tree", parts.tree, _tree_class(radix_disabled))
    _require("attention backend", parts.backend, SphericalAttnBackend)
    if parts.allocator.get_kvcache() is not parts.pool:
        raise StartupError(_message("allocator", "it hands out pages of another pool"))
    if parts.tree.token_to_kv_pool_allocator is not parts.allocator:
        raise StartupError(_message("radix tree", "it frees into another allocator"))


def _tree_class(radix_disabled: bool) -> type:
    if radix_disabled:
        from sglang.srt.mem_cache.chunk_cache import ChunkCache

        chunk_cache: type = ChunkCache
        return chunk_cache
    from sglang_spherical.radix.tree import SphericalRadixCache

    return SphericalRadixCache


def _require(role: str, part: object, expected: type) -> None:
    if not isinstance(part, expected):
        found = f"it is a {type(part).__name__}, expected a {expected.__name__}"
        raise StartupError(_message(role, found))


def _message(role: str, fault: str) -> str:
    return (
        f"--kv-format spherical is not in effect: {role}: {fault}: remove other plugins that "
        "replace it, or use --kv-format dense"
    )


def banner(parts: Parts) -> str:
    """One line that starts with `spherical KV engaged:`, for logs and benchmarks to look for."""
    from sglang_spherical.banner import Banner

    layout = parts.pool.layout
    resident = {
        level.name: layout.bytes_per_token(index) for index, level in enumerate(layout.levels)
    }
    return Banner(
        pool=type(parts.pool).__name__,
        allocator=type(parts.allocator).__name__,
        tree=type(parts.tree).__name__,
        backend=type(parts.backend).__name__,
        page_size=layout.page_size,
        **resident,
        bf16=layout.dense_bytes_per_token(),
        capacity_tokens=parts.allocator.size,
        arena_bytes=parts.pool.arena.bytes.numel(),
    ).format()
