"""The servers that `sharing_run.py` compares, at equal bytes of KV memory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests
from client import TIMEOUT_SECONDS, keep_garbage_out
from serve import COMMON as DUMMY
from serve import LLAMA_8B

from sglang_spherical.server import Server, ServerFailed, has_gpu, launch

SERVERS = ("spherical", "hot", "bf16", "fp8")
"""`hot` is spherical with re-tiering switched off: short of memory, it drops hot pages."""
SPHERICAL = ("spherical", "hot")


def flags(name: str, args: argparse.Namespace) -> list[str]:
    """What makes a server of that name, with `args.kv_bytes` of KV memory."""
    dummy = DUMMY if args.dummy else []
    if args.prefill_graphs:
        dummy = [flag for flag in dummy if flag != "--disable-prefill-cuda-graph"]
    more = ["--enable-metrics", *dummy, *args.args]
    if name in SPHERICAL:
        own = ["--kv-format", "spherical", "--spherical-kv-bytes", str(args.kv_bytes)]
        return [*own, *(("--spherical-watermark", "1") if name == "hot" else ()), *more]
    tokens = args.pool_tokens
    dense = ["--attention-backend", "flashinfer" if has_gpu() else "torch_native", *more]
    if name == "fp8":
        dense, tokens = [*dense, "--kv-cache-dtype", "fp8_e4m3"], 2 * tokens
    return [*dense, "--max-total-tokens", str(tokens)]


@contextmanager
def model_at_hand(args: argparse.Namespace) -> Iterator[None]:
    """While the context lasts `args.model` is a folder: without one, a config.json of
    Llama-3.1-8B's shape. Sets `args.dummy` and `args.model_name` too."""
    args.dummy = args.model is None
    args.model_name = "Llama-3.1-8B-shape" if args.dummy else args.model.name
    with TemporaryDirectory() as folder:
        if args.dummy:
            args.model = Path(folder)
            (args.model / "config.json").write_text(json.dumps(LLAMA_8B))
        yield


@contextmanager
def start(name: str, args: argparse.Namespace) -> Iterator[Server]:
    """A server of that name, while the context lasts. Raises ServerFailed where it should be
    spherical and is not."""
    log = args.log_dir / f"{name}.log" if args.log_dir else None
    with launch(args.model, args=flags(name, args), log=log) as server:
        if name not in SPHERICAL:
            keep_garbage_out(server.url)
        elif server.banner() is None:
            raise ServerFailed("the log lacks the line `spherical KV engaged:`: not measured")
        yield server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark lets one say about its servers."""
    parser.add_argument(
        "--model", type=Path, help="without: random weights of Llama-3.1-8B's shape"
    )
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=["spherical", "bf16"])
    parser.add_argument(
        "--prefill-graphs", action="store_true", help="with SGLang's, on a GPU, for random weights"
    )
    parser.add_argument("--log-dir", type=Path, help="keep the servers' logs here")
    parser.add_argument("args", nargs="*", help="after --: further flags of every server")


@contextmanager
def start_together(args: argparse.Namespace) -> Iterator[dict[str, Server]]:
    """All servers at once, started side by side; only one of them is asked at a time."""
    with ThreadPoolExecutor(len(args.servers)) as threads, ExitStack() as stack:
        starting = {
            name: threads.submit(stack.enter_context, start(name, args)) for name in args.servers
        }
        yield {name: server.result() for name, server in starting.items()}


def server_info(url: str) -> dict[str, Any]:
    """A server's arguments, as it has them in the end."""
    reply = requests.get(f"{url}/server_info", timeout=TIMEOUT_SECONDS)
    reply.raise_for_status()
    return reply.json()
