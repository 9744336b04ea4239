"""Entry point of group `sglang.srt.plugins`: SGLang calls `register()` once in every process.

Everything here is inert for `--kv-format dense`: the hooks return what the original returns, and
the registered backends are named only by a spherical server.
"""

from __future__ import annotations

from spherical_patches import hooks
from spherical_patches.kv_pool import build_backend, build_tree
from spherical_patches.refusals import NAME


def register() -> None:
    """Register the ledger's hooks, the radix cache backend and the attention backend."""
    hooks.install()
    _register_backends()
    _apply_cpu_patches()


def _register_backends() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import (
        get_radix_cache_factory,
        register_radix_cache_backend,
    )
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(build_backend)
    if get_radix_cache_factory(NAME) is None:
        register_radix_cache_backend(NAME, build_tree)


def _apply_cpu_patches() -> None:
    import torch

    if torch.cuda.is_available():
        return
    from spherical_patches import cpu

    cpu.apply()
