"""How many tokens a memory budget holds, and what the budget is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_spherical.errors import StartupError
from spherical_patches.server_args import engaged_config


def cell_size(original: Callable[..., int], self: Any, kvc: Any, num_layers: int) -> int:
    """Around `DefaultPoolConfigurator._compute_cell_size`.

    Bytes per token of hot pages over this rank's `num_layers` layers, so that SGLang's
    `max_total_num_tokens` counts hot-token equivalents.
    """
    config = engaged_config(kvc.server_args)
    if config is None:
        return original(self, kvc, num_layers)
    from sglang_spherical.pool.sizing import hot_bytes_per_token

    return int(hot_bytes_per_token(kvc, num_layers, config))


def available_bytes(original: Callable[..., int], self: Any, pre_model_load_memory: int) -> int:
    """Around `KVCacheConfigurator._profile_available_bytes`: the pool's budget in bytes.

    Raises StartupError where --spherical-kv-bytes is more than the device has free.
    """
    config = engaged_config(self.server_args)
    if config is None or config.kv_bytes is None:
        return original(self, pre_model_load_memory)
    free = _free_bytes(self.device, self.gpu_id)
    if config.kv_bytes > free:
        raise StartupError(
            f"--spherical-kv-bytes {config.kv_bytes}: {self.device} has {free} bytes free after "
            "loading the model: use fewer"
        )
    return config.kv_bytes


def _free_bytes(device: str, gpu_id: int) -> int:
    from sglang.srt.utils import get_available_gpu_memory

    return int(get_available_gpu_memory(device, gpu_id) * (1 << 30))
