"""Real starts of SGLang: what engages, what refuses, and that nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from seam_tools import write_model

from sglang_spherical.banner import PREFIX, parse

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LIMIT_SECONDS = 240
# weights out of thin air, no tokenizer: nothing is downloaded
MODEL_ARGS = ["--load-format", "dummy", "--skip-tokenizer-init", "--device", "cpu"]
READY = "The server is fired up and ready to roll!"

# A second plugin, as another package might bring one: in workers it keeps SGLang from applying one
# hook. SGLang logs that and goes on.
BREAKER = """
import multiprocessing

def register():
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry
    apply = HookRegistry._apply_target

    def apply_but_one(target, hooks):
        if target.endswith({broken!r}):
            raise RuntimeError("broken on purpose")
        return apply(target, hooks)

    HookRegistry._apply_target = staticmethod(apply_but_one)
"""
# The same, for a plugin that is not loaded in workers at all. Without its patches for machines that
# have no GPU a worker would die sooner, of another cause.
ALONE = """
import multiprocessing, os

def register():
    os.environ["SGLANG_PLUGINS"] = "breaker"
    if multiprocessing.parent_process() is not None:
        from spherical_patches import cpu
        cpu.apply()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("llama"))


def add_plugin(folder: Path, source: str) -> dict[str, str]:
    """Environment in which SGLang finds one more plugin."""
    info = folder / "breaker-0.dist-info"
    info.mkdir()
    (folder / "breaker.py").write_text(source)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: breaker\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nbreaker = breaker:register\n")
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}


def run(command: list[str], **environment: str) -> tuple[int, str]:
    """Exit code and output of a command that is expected to end; fails if it leaves a process."""
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        # reads until every descendant has closed the pipe: a process left behind is a time-out
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {LIMIT_SECONDS} s:\n{output[-3000:]}")
    return process.returncode, output


def serve(model: str, *args: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, *MODEL_ARGS]
    return run([*command, "--kv-format", "spherical", "--port", "31945", *args], **environment)


def test_a_hook_missing_in_a_worker_stops_the_server(model, tmp_path):
    """One of them in a real server; every one in tests/unit/test_engagement.py."""
    environment = add_plugin(tmp_path, BREAKER.format(broken="._build_mha_kv_pool"))
    code, output = serve(model, "--max-total-tokens", "2048", **environment)
    assert code != 0
    assert "broken on purpose" in output
    assert "SGLang did not take the hook on" in output
    assert PREFIX not in output
    assert READY not in output


def test_a_plugin_missing_in_a_worker_stops_the_server(model, tmp_path):
    environment = add_plugin(tmp_path, ALONE)
    code, output = serve(model, "--max-total-tokens", "2048", **environment)
    assert code != 0
    assert "Invalid attention backend: spherical" in output
    assert PREFIX not in output
    assert READY not in output


def test_an_error_in_a_worker_is_one_line(model):
    code, output = serve(model, "--spherical-kv-bytes", "9" * 15)
    assert code == 2
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: --spherical-kv-bytes {'9' * 15}: cpu has ")
    assert "Traceback" not in output


def test_sglang_serve_takes_the_flags(model):
    command = [str(Path(sys.executable).with_name("sglang")), "serve", model, *MODEL_ARGS]
    code, output = run([*command, "--kv-format", "spherical", "--page-size", "48"])
    assert code == 2
    assert "\nerror: --page-size 48: spherical pages hold 16, 32, 64 tokens" in output


ENGINE = """
import sys
import sglang

if __name__ == "__main__":
    options = dict(model_path=sys.argv[1], load_format="dummy", skip_tokenizer_init=True,
                   device="cpu", kv_format="spherical", spherical_warm_bits=3)
    try:
        sglang.Engine(**options, spherical_kv_bytes=10**15)
    except ValueError as error:
        print("refused:", error)
    with sglang.Engine(**options, page_size=16, max_total_tokens=2048) as engine:
        prompt = list(range(3, 90))
        for _ in range(2):
            answer = engine.generate(input_ids=prompt, sampling_params={"max_new_tokens": 4,
                                     "ignore_eos": True, "temperature": 0})
            print("cached:", answer["meta_info"]["cached_tokens"])
"""


def test_engine_takes_the_keywords_and_serves(model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(ENGINE))
    code, output = run([sys.executable, str(script), model])
    assert code == 0, output[-3000:]
    assert "refused: --spherical-kv-bytes 1000000000000000: cpu has" in output
    banner = parse(output)
    assert banner is not None
    assert banner.page_size == 16
    assert banner.capacity_tokens == 2048
    assert "cached: 0" in output
    assert "cached: 80" in output  # whole pages of the 87 prompt tokens
