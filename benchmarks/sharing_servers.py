"""The servers that `sharing_run.py` compares, at equal bytes of KV memory."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
from client import TIMEOUT_SECONDS
from serve import COMMON as DUMMY

from sglang_spherical.server import Server, has_gpu, launch

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


def start(name: str, args: argparse.Namespace) -> AbstractContextManager[Server]:
    """A server of that name, while the context lasts."""
    log = args.log_dir / f"{name}.log" if args.log_dir else None
    return launch(args.model, args=flags(name, args), log=log)


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
