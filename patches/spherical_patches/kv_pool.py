"""The pool, the allocator, the radix tree and the attention backend, where SGLang builds its own.

The parts themselves are in `sglang_spherical`, imported when a server with a spherical cache builds
them: a dense server never loads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_spherical.errors import StartupError
from spherical_patches.refusals import NAME
from spherical_patches.server_args import engaged_config


def build_pool(
    original: Callable[..., Any], self: Any, *, max_total_num_tokens: int, **kwargs: Any
) -> Any:
    """Around `KVCacheConfigurator._build_mha_kv_pool`."""
    if engaged_config(self.server_args) is None:
        return original(self, max_total_num_tokens=max_total_num_tokens, **kwargs)
    from sglang_spherical.pool import factory

    return factory.build_pool(self, max_total_num_tokens=max_total_num_tokens)


def build_allocator(original: Callable[..., Any], self: Any, **kwargs: Any) -> Any:
    """Around `KVCacheConfigurator._build_token_to_kv_pool_allocator`."""
    if engaged_config(self.server_args) is None:
        return original(self, **kwargs)
    from sglang_spherical.pool import factory

    return factory.build_allocator(self, **kwargs)


def build_tree(ctx: Any) -> Any:
    """The radix cache backend `spherical`. `ctx`: SGLang's TreeCacheBuildContext.

    Raises StartupError without `--kv-format spherical`, or where a hook of the ledger is missing.
    """
    _require_spherical(ctx.server_args, "--radix-cache-backend")
    from sglang_spherical.radix import factory

    return factory.build_tree(ctx)


def build_backend(model_runner: Any) -> Any:
    """The attention backend `spherical`. Raises as `build_tree` does."""
    _require_spherical(model_runner.server_args, "--attention-backend")
    from sglang_spherical.attention import factory

    return factory.build_backend(model_runner)


def _require_spherical(server_args: Any, flag: str) -> None:
    """SGLang calls the two registered factories by name, hooks or no hooks: the place to look."""
    if engaged_config(server_args) is None:
        raise StartupError(
            f"{flag} {NAME}: works only inside --kv-format spherical: give that flag instead"
        )
