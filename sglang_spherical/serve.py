"""Serve a model with the spherical KV cache in the foreground; Ctrl-C stops it.

This becomes `python -m sglang.launch_server --kv-format spherical …`, printed first, with the
arguments and environment filled in that a machine without a GPU needs. Arguments after `--` go to
SGLang.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from sglang_spherical import models
from sglang_spherical.server import server_command, server_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="a model directory (default: SmolLM2-135M-Instruct, from PyPI)"
    )
    parser.add_argument("--port", type=int, default=30000, help="default: %(default)s")
    parser.add_argument("args", nargs="*", help="more arguments for sglang.launch_server")


def run(args: argparse.Namespace) -> int:
    """Replace this process by the server. Raises ValueError when there is no such model."""
    model = args.model or models.smollm2()
    if not model.is_dir():
        raise ValueError(f"--model {model}: expected a model directory")
    kv_format = [] if "--kv-format" in args.args else ["--kv-format", "spherical"]
    command = server_command(model, args.port, [*kv_format, *args.args])
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.execve(command[0], command, server_environment())
