"""What SGLang can be asked for that a spherical KV cache does not serve yet.

Each line of `REFUSALS` names a field of `ServerArgs`, the values that are served (SGLang's default
always among them), what the others ask for, and the remedy. `check` runs twice: on what the user
gave, before SGLang resolves it and perhaps complains in its own words, and on what it resolved to.
What depends on the model is in `sglang_spherical.model_support`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_spherical.config import PAGE_SIZES, SphericalConfig
from sglang_spherical.errors import StartupError

NAME = "spherical"  # of our attention backend and of our radix cache backend
SERVED_DEVICES = ("cpu", "cuda")

LEAVE_OUT = "leave the flag out, or use --kv-format dense"


@dataclass(frozen=True)
class Refusal:
    """A field of ServerArgs and the values of it that a spherical cache serves."""

    field: str
    served: tuple[object, ...]
    feature: str
    remedy: str = LEAVE_OUT

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")


OFF = (False, None)

REFUSALS = (
    # other owners of the KV cache
    Refusal("enable_hierarchical_cache", OFF, "HiCache"),
    Refusal("hicache_storage_backend", (None,), "HiCache storage"),
    Refusal("enable_lmcache", OFF, "LMCache"),
    Refusal("enable_flexkv", OFF, "FlexKV"),
    Refusal("enable_unified_memory", OFF, "the unified memory pool"),
    Refusal("enable_page_major_kv_layout", OFF, "the page-major layout of dense pools"),
    Refusal("enable_hisparse", OFF, "hierarchical sparse attention"),
    Refusal("prefill_only_disable_kv_cache", OFF, "a pool that holds nothing"),
    Refusal(
        "radix_cache_backend",
        (None, NAME),
        "another radix cache",
        "leave the flag out: --kv-format spherical brings its own",
    ),
    Refusal("radix_eviction_policy", ("lru", None), "another order of eviction", "use lru"),
    Refusal(
        "kv_cache_dtype",
        ("auto", "bf16", "bfloat16"),
        "another KV format",
        "use auto: the bits are set by --spherical-hot-bits, -warm-bits and -cold-bits",
    ),
    Refusal("kv_canary", ("none", None), "the KV canary, which reads dense slots", "use none"),
    # attention
    *(
        Refusal(
            field,
            (None, NAME),
            "an attention backend that reads dense keys",
            "leave the flag out: --kv-format spherical brings its own for prefill and decode",
        )
        for field in (
            "attention_backend",
            "prefill_attention_backend",
            "decode_attention_backend",
        )
    ),
    Refusal("enable_two_batch_overlap", OFF, "two-batch overlap"),
    Refusal("enable_mis", OFF, "multi-item scoring"),
    Refusal("enable_deterministic_inference", OFF, "deterministic inference"),
    Refusal("rl_on_policy_target", (None,), "on-policy reinforcement learning"),
    Refusal("enable_torch_compile", OFF, "torch.compile"),
    Refusal(
        "cuda_graph_backend_prefill",
        (None, "breakable", "disabled"),
        "a prefill graph of this kind",
        "use breakable or disabled",
    ),
    Refusal(
        "cuda_graph_backend_decode",
        (None, "full", "disabled"),
        "a decode graph of this kind",
        "use full or disabled",
    ),
    Refusal("debug_cuda_graph", OFF, "debugging of CUDA graphs"),
    # who decodes
    Refusal("speculative_algorithm", (None,), "speculative decoding"),
    Refusal("decoupled_spec_role", ("null", None), "speculative decoding"),
    Refusal("dllm_algorithm", (None,), "diffusion language models"),
    # scheduling and serving
    Refusal("enable_mixed_chunk", OFF, "prefill and decode in one batch"),
    Refusal("enable_pdmux", OFF, "PD multiplexing"),
    Refusal("disaggregation_mode", ("null", None), "PD disaggregation"),
    Refusal("encoder_only", OFF, "encoder disaggregation"),
    Refusal("enable_streaming_session", OFF, "streaming sessions"),
    Refusal("enable_session_radix_cache", OFF, "session references in the radix cache"),
    Refusal("use_ray", OFF, "Ray actors, which lose the configuration on the way"),
    # parallelism
    Refusal("pp_size", (1,), "pipeline parallelism", "use 1, and --tp-size instead"),
    Refusal("dcp_size", (1,), "decode context parallelism", "use 1"),
    Refusal("attn_cp_size", (1,), "attention context parallelism", "use 1"),
    Refusal("enable_prefill_cp", OFF, "prefill context parallelism"),
    Refusal("enable_dp_attention", OFF, "data-parallel attention", "use --tp-size, or --dp-size"),
)

# Switches of SGLang that have no flag. Read from the environment by name, as SGLang does.
ENVIRONMENT = {
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "a pool that is sized after graph capture",
    "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE": "the C++ radix tree",
    "SGLANG_ENABLE_UNIFIED_RADIX_TREE": "the unified radix tree",
}
_TRUE = ("true", "1", "yes", "y")


def check(
    arguments: Mapping[str, Any], config: SphericalConfig, environment: Mapping[str, str]
) -> None:
    """Refuse what cannot be served, with one line that names the flag, its value and the remedy.

    `arguments` maps fields of ServerArgs to values; a missing field has SGLang's default.
    Raises StartupError for the first refusal found.
    """
    for refusal in REFUSALS:
        if refusal.field in arguments:
            _check_value(refusal, arguments[refusal.field])
    _check_graphs(arguments.get("cuda_graph_config"))
    _check_pages(arguments)
    _check_device(arguments.get("device"))
    if config.kv_bytes is not None and arguments.get("max_total_tokens") is not None:
        raise StartupError(
            f"--max-total-tokens {arguments['max_total_tokens']}: --spherical-kv-bytes "
            f"{config.kv_bytes} already sets the pool's size: leave one of them out"
        )
    if config.frames is not None and not Path(config.frames).is_file():
        raise StartupError(
            f"--spherical-frames {config.frames}: no such file: name a calibration file, or leave "
            "the flag out to calibrate online"
        )
    for name, feature in ENVIRONMENT.items():
        if environment.get(name, "").lower() in _TRUE:
            raise StartupError(
                f"{name}={environment[name]}: {feature} does not work with --kv-format spherical: "
                "unset the variable"
            )


def check_dense(arguments: Mapping[str, Any]) -> None:
    """Without `--kv-format spherical` our registered backends have no cache to read.

    Raises StartupError. Reached by a copy of spherical arguments that lost the configuration, too.
    """
    for field in (
        "attention_backend",
        "prefill_attention_backend",
        "decode_attention_backend",
        "radix_cache_backend",
    ):
        if arguments.get(field) == NAME:
            flag = "--" + field.replace("_", "-")
            raise StartupError(
                f"{flag} {NAME}: works only inside --kv-format spherical: give that flag instead"
            )


def _check_value(refusal: Refusal, value: object) -> None:
    if value not in refusal.served:
        shown = refusal.flag if value is True else f"{refusal.flag} {value}"
        raise StartupError(
            f"{shown}: {refusal.feature} does not work with --kv-format spherical: {refusal.remedy}"
        )


def _check_graphs(graphs: Any) -> None:
    """`graphs`: the dict that --cuda-graph-config was given as, or what SGLang makes of it."""
    if graphs is None:
        return
    phases = graphs if isinstance(graphs, Mapping) else graphs.to_dict()
    for refusal in REFUSALS:
        if refusal.field not in ("cuda_graph_backend_prefill", "cuda_graph_backend_decode"):
            continue
        phase = refusal.field.rpartition("_")[2]
        backend = (phases.get(phase) or {}).get("backend")
        if backend not in refusal.served:
            raise StartupError(
                f'--cuda-graph-config {{"{phase}": {{"backend": "{backend}"}}}}: {refusal.feature} '
                f"does not work with --kv-format spherical: {refusal.remedy}"
            )


def _check_pages(arguments: Mapping[str, Any]) -> None:
    page_size = arguments.get("page_size")
    if page_size is None:
        return
    if page_size not in PAGE_SIZES:
        raise StartupError(
            f"--page-size {page_size}: spherical pages hold "
            f"{', '.join(map(str, PAGE_SIZES))} tokens: use one of these"
        )
    capacity = arguments.get("max_total_tokens")
    if capacity is not None and capacity < page_size:
        raise StartupError(
            f"--max-total-tokens {capacity}: less than one page: use a multiple of --page-size "
            f"{page_size}"
        )
    chunk = arguments.get("chunked_prefill_size")
    if chunk is not None and chunk > 0 and chunk % page_size:
        raise StartupError(
            f"--chunked-prefill-size {chunk}: not a multiple of --page-size {page_size}: use "
            f"{max(chunk // page_size, 1) * page_size}"
        )


def _check_device(device: object) -> None:
    name = str(device).partition(":")[0]
    if device is not None and name not in SERVED_DEVICES:
        raise StartupError(
            f"--device {device}: a spherical KV cache is served on NVIDIA GPUs and on CPUs: use "
            "--device cuda or cpu, or --kv-format dense"
        )
