"""A real SGLang server as a subprocess, for the demo, the tests and the benchmarks.

`with launch(model) as server:` waits until the server answers, and stops it, workers included, on
every way out of the block. Other servers on the machine are never touched: what is stopped is the
process group that this call created.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sglang_spherical.banner import Banner, parse

HOST = "127.0.0.1"
READY_SECONDS = 900.0  # kernels compile during a first start on a GPU
POLL_SECONDS = 0.5
# What a machine without a GPU needs: without a cap SGLang sizes the cache by the free memory; more
# than one thread per process collapses on few cores; rotary tables in float32 as on CUDA.
CPU_ARGS = {"--device": "cpu", "--max-total-tokens": "16384", "--sleep-on-idle": None}
CPU_ENV = {"OMP_NUM_THREADS": "1", "SGLANG_ROPE_CACHE_FP32": "1"}
# Asking whether the server is ready must not put a request of its own into the cache.
ENV = {"PYTHONUNBUFFERED": "1", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
STAGE_LINE = re.compile(r"^\[\d{4}-[^\]]*\] (?!INFO: )(.*)$", re.MULTILINE)  # not of uvicorn
PORT_TAKEN = "error while attempting to bind on address"  # uvicorn; SGLang goes on waiting
ERROR_LINE = re.compile(r"(error: |\S*(Error|Exception): )")


class ServerFailed(ValueError):
    """The server ended, or did not answer in time; the message holds its last words."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path  # standard output and standard error together

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def banner(self) -> Banner | None:
        """What the workers engaged; None on a dense server."""
        return parse(self.log_text())


@contextmanager
def launch(
    model: Path | str,
    port: int = 0,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    ready_seconds: float = READY_SECONDS,
) -> Iterator[Server]:
    """Serve `model` on 127.0.0.1 through `sglang.launch_server`; yields once requests are answered.

    `port` 0 takes a free one. `args` go to `sglang.launch_server` and win over the defaults for
    machines without a GPU, as `env` does over the environment. `log` is overwritten; without it the
    log lives in a temporary file that is kept only when the server failed.
    Raises ServerFailed with the server's last error line.
    """
    port = port or free_port()
    kept = log is not None
    log = log or _temporary_log()
    with _exit_on_sigterm():
        process = _start(server_command(model, port, args), env or {}, log)
        try:
            server = Server(process, port, log)
            _wait_until_ready(server, ready_seconds)
            yield server
        except ServerFailed:
            kept = True
            raise
        finally:
            _stop(process)
            if not kept:
                log.unlink(missing_ok=True)


PORTS = 20000, 32000
"""That `free_port` chooses among."""


def free_port() -> int:
    """Below those that the system gives to connections: a server binds its port long after this."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            return port


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def server_command(model: Path | str, port: int, args: Sequence[str]) -> list[str]:
    """SGLang's command line for `model`, with `CPU_ARGS` where `args` is silent on them."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", HOST, "--port", str(port), *args]
    given = {arg.partition("=")[0] for arg in args}
    if "--spherical-kv-bytes" in given:  # sizes the cache too
        given.add("--max-total-tokens")
    for flag, value in ({} if has_gpu() else CPU_ARGS).items():
        if flag not in given:
            command += [flag] if value is None else [flag, value]
    return command


def server_environment() -> dict[str, str]:
    """This process's environment, with `ENV` and `CPU_ENV` where it is silent on them."""
    return {**ENV, **({} if has_gpu() else CPU_ENV), **os.environ}


def _start(command: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        return subprocess.Popen(
            command,
            env={**server_environment(), **env},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group, so that Ctrl-C reaches only us
        )


def _wait_until_ready(server: Server, ready_seconds: float) -> None:
    started = time.monotonic()
    with _Progress(server.log) as progress:
        while not _healthy(server.url):
            waited = time.monotonic() - started
            code = _exit_code(server.process)
            if code is not None:
                raise ServerFailed(_last_words(server, f"the server ended with exit code {code}"))
            if PORT_TAKEN in server.log_text():
                raise ServerFailed(
                    f"port {server.port}: taken by another process meanwhile, start again "
                    f"(log: {server.log})"
                )
            if waited > ready_seconds:
                raise ServerFailed(_last_words(server, f"no answer within {ready_seconds:.0f} s"))
            progress.show(waited)
            time.sleep(POLL_SECONDS)


def _healthy(url: str) -> bool:
    """True once the warm-up request has been answered; SGLang says 503 until then."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _last_words(server: Server, what: str) -> str:
    lines = [line.strip() for line in server.log_text().splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    said = errors[-1] if errors else " | ".join(lines[-3:])
    return f"{what}: {said} (log: {server.log})"


class _Progress:
    """One status line on standard error: elapsed seconds and what the server says it is doing."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._terminal = sys.stderr.isatty()
        self._next_seconds = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, waited_seconds: float) -> None:
        if waited_seconds < self._next_seconds:
            return
        self._next_seconds = waited_seconds + (1.0 if self._terminal else 10.0)
        stages = STAGE_LINE.findall(self._log.read_text(errors="replace"))
        doing = stages[-1][:60] if stages else ""
        text = f"starting the server: {waited_seconds:3.0f} s  {doing}"
        sys.stderr.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        sys.stderr.flush()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM to us into SystemExit, so that `finally` runs and the server goes too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group at once, and reap its leader: until then its id is not reused.

    SIGTERM first would cost seconds and gain nothing: SGLang waits for requests to drain, and then
    kills its own workers with SIGKILL.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """Like `poll`, but leaves the process to be reaped by `_stop`."""
    if process.returncode is not None:
        return process.returncode
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if ended is None else ended.si_status


def _temporary_log() -> Path:
    descriptor, name = tempfile.mkstemp(prefix="sglang-spherical-", suffix=".log")
    os.close(descriptor)
    return Path(name)
