"""Every place where this product changes SGLang, and when each change can go.

`signature` is what `signature_of` reads from the target in each supported release; a test fails
when it drifts, since hooks are called with the target's own arguments. Registries that SGLang
offers for the purpose (radix cache backends, attention backends) are used by `plugin.py` and need
no patch.
"""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass

SGLANG_VERSIONS = ("0.5.17",)
MAX_PARAMETERS = 12  # ServerArgs has hundreds, one per flag: those we rely on have their own test
_SIZER = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_UNTIL_KV_FORMATS = "SGLang lets a plugin register a KV format with a pool, an allocator and a size"


@dataclass(frozen=True)
class Patch:
    """One hook on one SGLang symbol."""

    target: str  # dotted name
    hook_type: str  # AFTER: fn(result, *args); AROUND: fn(original, *args); REPLACE: fn(*args)
    hook: str  # 'module:function', imported when first called
    signature: str  # of the target, in every release of `versions`
    reason: str
    removable_when: str
    versions: tuple[str, ...] = SGLANG_VERSIONS


PATCHES = (
    Patch(
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        hook_type="AFTER",
        hook="spherical_patches.server_args:add_arguments",
        signature="(parser)",
        reason="--kv-format and --spherical-* on every command line of SGLang",
        removable_when="SGLang lets a plugin declare flags",
    ),
    Patch(
        target="sglang.srt.server_args.ServerArgs.from_cli_args",
        hook_type="AROUND",
        hook="spherical_patches.server_args:from_command_line",
        signature="(args)",
        reason="hands those flags to the constructor; errors end as one line",
        removable_when="SGLang lets a plugin declare flags",
    ),
    Patch(
        target="sglang.srt.server_args.ServerArgs.__init__",
        hook_type="AROUND",
        hook="spherical_patches.server_args:construct",
        signature="(self, model_path, tokenizer_path=None, …)",
        reason="kv_format=… in Engine(…); refusals, defaults, and the configuration on the object",
        removable_when="SGLang lets a plugin declare flags",
    ),
    Patch(
        target="sglang.srt.server_args.ServerArgs.get_model_config",
        hook_type="AFTER",
        hook="spherical_patches.server_args:check_model_config",
        signature="(self)",
        reason="refuses a model before SGLang resolves the rest for it",
        removable_when="attention backends can declare what models they serve",
    ),
    Patch(
        target="sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        hook_type="AROUND",
        hook="spherical_patches.startup:launch",
        signature=(
            "(server_args, init_tokenizer_manager_func, run_scheduler_process_func, "
            "run_detokenizer_process_func, port_args=None)"
        ),
        reason="a worker's StartupError reaches the user as one error, its siblings are stopped",
        removable_when="SGLang hands a worker's exception to the launching process",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        hook_type="AROUND",
        hook="spherical_patches.startup:build_scheduler",
        signature=(
            "(self, server_args, port_args, gpu_id, tp_rank, moe_ep_rank, pp_rank, attn_cp_rank, "
            "moe_dp_rank, dp_rank)"
        ),
        reason="proves that the spherical parts are live before the worker reports ready",
        removable_when="SGLang's plugin loader can be told to fail closed",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.run_batch",
        hook_type="AFTER",
        hook="spherical_patches.scheduling:forward_launched",
        signature="(self, batch, pp_proxy_tensors=None)",
        reason="cached prefixes are re-encoded a little behind every forward pass",
        removable_when="SGLang tells its prefix cache of every step",
    ),
    Patch(
        target="sglang.srt.managers.scheduler.Scheduler.on_idle",
        hook_type="BEFORE",
        hook="spherical_patches.scheduling:idles",
        signature="(self)",
        reason="cached prefixes are re-encoded while nothing runs",
        removable_when="SGLang tells its prefix cache of every step",
    ),
    Patch(
        target=f"{_SIZER}._compute_cell_size",
        hook_type="AROUND",
        hook="spherical_patches.pool_sizing:cell_size",
        signature="(self, kvc, num_layers)",
        reason="bytes per token of the hot tier in place of dense keys and values",
        removable_when=_UNTIL_KV_FORMATS,
    ),
    Patch(
        target=f"{_CONFIGURATOR}._profile_available_bytes",
        hook_type="AROUND",
        hook="spherical_patches.pool_sizing:available_bytes",
        signature="(self, pre_model_load_memory)",
        reason="--spherical-kv-bytes sets the pool's memory exactly",
        removable_when="SGLang has a flag for the KV pool's size in bytes",
    ),
    Patch(
        target=f"{_CONFIGURATOR}._build_mha_kv_pool",
        hook_type="AROUND",
        hook="spherical_patches.kv_pool:build_pool",
        signature="(self, *, max_total_num_tokens, mha_pool_class, quant_method=None)",
        reason="SphericalKVPool in place of MHATokenToKVPool",
        removable_when=_UNTIL_KV_FORMATS,
    ),
    Patch(
        target=f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator",
        hook_type="AROUND",
        hook="spherical_patches.kv_pool:build_allocator",
        signature=(
            "(self, *, sizes, token_to_kv_pool, is_dsv4_model, req_to_token_pool, "
            "token_to_kv_pool_allocator)"
        ),
        reason="SphericalAllocator in place of PagedTokenToKVPoolAllocator",
        removable_when=_UNTIL_KV_FORMATS,
    ),
)

# Installed by `cpu.apply()`, only where there is no CUDA. Without one of them a CPU server dies in
# Triton ("0 active drivers"), so nothing needs to look whether they sit.
CPU_PATCHES = (
    Patch(
        target="sglang.srt.utils.common.support_triton",
        hook_type="REPLACE",
        hook="spherical_patches.cpu:support_triton",
        signature="(backend)",
        reason="SGLang asks the backend's name whether Triton kernels can run",
        removable_when="SGLang decides by device",
    ),
    Patch(
        target="sglang.srt.mem_cache.allocation.get_last_loc",
        hook_type="REPLACE",
        hook="spherical_patches.cpu:get_last_loc",
        signature="(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)",
        reason="launches a Triton kernel unless the backend is named torch_native or intel_amx",
        removable_when="SGLang decides by device",
    ),
)


def signature_of(target: str) -> str:
    """`(name, *, name=default)` of the function named `target`, without annotations."""
    signature = inspect.signature(pkgutil.resolve_name(target))
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    if len(parameters) > MAX_PARAMETERS:
        return str(inspect.Signature(parameters[:3]))[:-1] + ", …)"
    return str(inspect.Signature(parameters))
