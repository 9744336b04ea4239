"""Let SGLang serve on a machine without a GPU.

Targets:  `sglang.srt.layers.rotary_embedding.base._is_cpu`
          `sglang.srt.utils.common.support_triton`
          `sglang.srt.mem_cache.allocation.get_last_loc`
Versions: SGLang 0.5.17.
Reason:   SGLang's own CPU engine (SGLANG_USE_CPU_ENGINE) needs `sgl_kernel` built for CPUs, which
          no registry carries. Without it SGLang takes every machine for a GPU machine in three
          places: rotary embeddings import vllm, and two helpers launch Triton kernels for every
          attention backend whose NAME is not torch_native or intel_amx ("0 active drivers").
Goes:     when SGLang decides by device rather than by backend name.

Serving with `--kv-format dense --attention-backend torch_native` works with the same patches: the
torch helpers chosen here are the ones SGLang itself takes for that backend.
"""

from __future__ import annotations

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

ROTARY_MODULE = "sglang.srt.layers.rotary_embedding.base"
SUPPORT_TRITON = "sglang.srt.utils.common.support_triton"
GET_LAST_LOC = "sglang.srt.mem_cache.allocation.get_last_loc"


def needed() -> bool:
    """True where nothing can run a Triton kernel."""
    return not torch.cuda.is_available()


def apply() -> None:
    """Register the hooks and set the flag. Call once per process, from the plugin.

    The hooks take effect with `HookRegistry.apply_hooks()`, which SGLang calls after its plugins;
    it also rebinds the copies that other modules imported by name.
    """
    from sglang.srt.layers.rotary_embedding import base

    # Not a function, so no hook: read once per RotaryEmbedding, at model construction.
    base._is_cpu = True
    HookRegistry.register(SUPPORT_TRITON, support_triton, HookType.REPLACE)
    HookRegistry.register(GET_LAST_LOC, get_last_loc, HookType.REPLACE)


def support_triton(backend: str) -> bool:
    """SGLang asks by backend name; on this machine the answer is the same for every backend."""
    return False


def get_last_loc(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, prefix_lens: torch.Tensor
) -> torch.Tensor:
    """Slot of each request's last prefix token, -1 where there is none.

    `req_to_token` [num_slots, max_context_tokens], the others and the result [batch].
    """
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    last: torch.Tensor = get_last_loc_torch(req_to_token, req_pool_indices, prefix_lens)
    return last
