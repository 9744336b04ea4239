"""The launcher against stand-ins for SGLang: what it waits for, says, and leaves behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglang_spherical import server
from sglang_spherical.server import ServerFailed, launch

# Answers /health after starting a worker process of its own, whose pid goes to the log.
STAND_IN = """
import http.server, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"worker {worker.pid}", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def command(model: object, port: int, args: object) -> list[str]:
        return [sys.executable, "-c", code, str(port)]

    monkeypatch.setattr(server, "server_command", command)


def gone(pid: int) -> bool:
    """True once `pid` has ended; a zombie that its new parent has not reaped yet counts."""
    for _ in range(100):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def worker_pid(log: Path) -> int:
    return int(log.read_text().split("worker ")[1].split()[0])


def test_serves_and_stops_the_workers_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, STAND_IN)
    log = tmp_path / "server.log"
    with launch("model", log=log) as running:
        assert running.url == f"http://127.0.0.1:{running.port}"
        assert running.banner() is None
    assert gone(running.process.pid)
    assert gone(worker_pid(log))


def test_a_port_that_somebody_else_took_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SGLang itself would wait for ten minutes."""
    said = "[Errno 98] error while attempting to bind on address ('127.0.0.1', 1): in use"
    stand_in(monkeypatch, f"import time; print({said!r}, flush=True); time.sleep(600)")
    log = tmp_path / "server.log"
    with pytest.raises(ServerFailed, match=r"port \d+: taken by another"), launch("model", log=log):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_stops_on_every_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException]
) -> None:
    stand_in(monkeypatch, STAND_IN)
    log = tmp_path / "server.log"
    with pytest.raises(error), launch("model", log=log):
        raise error
    assert gone(worker_pid(log))


def test_sigterm_to_the_caller_stops_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, STAND_IN)
    log = tmp_path / "server.log"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, launch("model", log=log):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert gone(worker_pid(log))


def test_a_server_that_ends_is_reported_with_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "print('loading'); print('ValueError: no such tier', flush=True); print('bye'); exit(3)"
    stand_in(monkeypatch, code)
    log = tmp_path / "server.log"
    with pytest.raises(ServerFailed) as failed, launch("model", log=log):
        pass
    assert str(failed.value) == (
        f"the server ended with exit code 3: ValueError: no such tier (log: {log})"
    )


def test_silence_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, "import time; print('hm', flush=True); time.sleep(600)")
    with (
        pytest.raises(ServerFailed, match=r"no answer within 2 s: hm"),
        launch("model", log=tmp_path / "log", ready_seconds=2),
    ):
        pass


def test_defaults_yield_to_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "has_gpu", lambda: False)
    plain = server.server_command("m", 7, [])
    assert plain[-5:] == ["--device", "cpu", "--max-total-tokens", "16384", "--sleep-on-idle"]
    capped = server.server_command("m", 7, ["--max-total-tokens=512"])
    assert "16384" not in capped
    in_bytes = server.server_command("m", 7, ["--spherical-kv-bytes", "1000000"])
    assert "--max-total-tokens" not in in_bytes
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert server.server_environment()["OMP_NUM_THREADS"] == "3"


def test_a_gpu_gets_no_cpu_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "has_gpu", lambda: True)
    assert server.server_command("m", 7, [])[-2:] == ["--port", "7"]


@pytest.mark.e2e
def test_real_sglang_refuses_a_model_path_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    with (
        pytest.raises(ServerFailed, match=r"exit code 1: .*no-model"),
        launch(missing, log=tmp_path / "log"),
    ):
        pass
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in running if str(missing) in words]
