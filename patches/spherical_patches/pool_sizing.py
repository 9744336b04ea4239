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

    Raises StartupError where the device has less free than --spherical-kv-bytes asks for, and where
    the budget does not hold a page beside the padding page.
    """
    config = engaged_config(self.server_args)
    if config is None:
        return original(self, pre_model_load_memory)
    if config.kv_bytes is None:
        budget, remedy = _profiled(original, self, pre_model_load_memory), "--mem-fraction-static"
    else:
        budget, remedy = _asked_for(config.kv_bytes, self), "--spherical-kv-bytes"
    from sglang_spherical.pool.sizing import hot_bytes_per_token

    layers = self.layer_info.num_effective_layers
    page_bytes = hot_bytes_per_token(self, layers, config) * self.server_args.page_size
    if budget < 2 * page_bytes:  # one page is SGLang's padding sink, and no capacity
        raise StartupError(
            f"{remedy}: {budget} bytes are left for the KV cache and two pages of "
            f"{self.server_args.page_size} tokens take {2 * page_bytes}: raise it"
        )
    return budget - page_bytes


def _profiled(original: Callable[..., int], configurator: Any, pre_model_load_memory: int) -> int:
    try:
        return original(configurator, pre_model_load_memory)
    except ValueError as error:  # the weights alone are too large
        raise StartupError(str(error)) from error


def _asked_for(kv_bytes: int, configurator: Any) -> int:
    free = _free_bytes(configurator.device, configurator.gpu_id)
    if kv_bytes > free:
        raise StartupError(
            f"--spherical-kv-bytes {kv_bytes}: {configurator.device} has {free} bytes free after "
            "loading the model: use fewer"
        )
    return kv_bytes


def _free_bytes(device: str, gpu_id: int) -> int:
    from sglang.srt.utils import get_available_gpu_memory

    return int(get_available_gpu_memory(device, gpu_id) * (1 << 30))
