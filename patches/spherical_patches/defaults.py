"""The server arguments that `--kv-format spherical` sets where the user set none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spherical_patches.refusals import NAME

PAGE_SIZE = 64  # tokens; the largest page has the smallest share of centroids and tables


def fill(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` (fields of ServerArgs) with what was left open filled in; given values stay."""
    filled = dict(arguments)
    _default(filled, "device", _device())
    _default(filled, "attention_backend", NAME)
    _default(filled, "radix_cache_backend", NAME)
    _default(filled, "page_size", PAGE_SIZE)
    # "auto" may become fp8 where the checkpoint says so; our codes do not depend on it
    if filled.get("kv_cache_dtype", "auto") == "auto":
        filled["kv_cache_dtype"] = "bf16"
    if filled["device"] == "cpu" and filled.get("cuda_graph_config") is None:
        # as SGLang does itself for a backend named torch_native
        _default(filled, "cuda_graph_backend_decode", "disabled")
        _default(filled, "cuda_graph_backend_prefill", "disabled")
    return filled


def _default(arguments: dict[str, Any], field: str, value: object) -> None:
    if arguments.get(field) is None:
        arguments[field] = value


def _device() -> str:
    from sglang.srt.utils import get_device

    try:
        return str(get_device())
    except RuntimeError:  # SGLang does not take a CPU for a device unless it is told to
        return "cpu"
