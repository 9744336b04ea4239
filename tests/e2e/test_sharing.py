"""The sharing benchmark end to end, the simulator against it, and the metrics of a real server."""

import json
import random
import subprocess
import sys

import pytest

from sglang_spherical import top
from sglang_spherical.server import launch

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROW = {"server", "workload", "working_set", "kv_bytes", "token_hit_rate", "ttft_p50_ms",
       "ttft_p99_ms", "output_tok_s", "kl_mean"}  # fmt: skip


def run(repo_root, script, *args):
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, args)]
    ran = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.timeout(1000)
def test_a_small_sweep(repo_root, tiny_model, tmp_path):
    found, png, simulated = (tmp_path / name for name in ("run.json", "run.png", "sim.json"))
    shown = run(
        repo_root, "multi_turn", "--model", tiny_model, "--pool-tokens", 1024,
        "--working-sets", 0.5, 2, "--workloads", "round-robin", "--least-requests", 8,
        "--first-tokens", 192, "--question-tokens", 64, "--turns", 2, "--scored", 1,
        "--json", found, "--plot", png,
    )  # fmt: skip
    assert "| round-robin | 2× |" in shown
    assert png.stat().st_size > 10_000
    result = json.loads(found.read_text())
    rows = {(row["server"], row["working_set"]): row for row in result["rows"]}
    assert len(rows) == 4 and all(row.keys() >= ROW for row in rows.values())
    assert len({row["kv_bytes"] for row in rows.values()}) == 1
    assert rows["spherical", 0.5]["page_hit_rate"] == 1.0 == rows["bf16", 0.5]["token_hit_rate"]
    assert rows["spherical", 2]["token_hit_rate"] > rows["bf16", 2]["token_hit_rate"] + 0.3
    assert all(row["kl_mean"] < 0.1 and row["kl_tokens"] == 8 for row in rows.values())
    assert rows["bf16", 0.5]["kl_mean"] < 0.002
    (tiers,) = [run for run in result["tiers"] if run["working_set"] == 2]
    assert len(tiers["samples"]) > 2 and max(s["hot"] for s in tiers["samples"]) > 0
    assert str(tmp_path) not in found.read_text()

    run(repo_root, "simulate", "--model", tiny_model, "--against", found, "--json", simulated)
    for row in json.loads(simulated.read_text())["rows"]:
        assert row["token_hit_rate"] == pytest.approx(row["measured_hit_rate"], abs=0.15), row


def test_metrics_and_the_live_view(repo_root, tiny_model):
    sys.path.insert(0, str(repo_root / "benchmarks"))
    from client import generate

    flags = ["--kv-format", "spherical", "--max-total-tokens", "2048", "--enable-metrics"]
    rng = random.Random(0)
    prompts = [rng.choices(range(1000, 20000), k=600) for _ in range(4)]
    with launch(tiny_model, args=flags) as server:
        before = top.read(server.url)
        cached = sum(generate(server.url, p, 4).cached_tokens for p in prompts for _ in range(2))
        now = top.read(server.url)
        view = run_top(server.url)
        dropped = sum(now.drops.values())
        log = server.log_text()
    assert now.capacity_tokens == 2048 and now.page_size == 64
    assert sum(now.hits.values()) - sum(before.hits.values()) == cached > 0
    assert now.moved_bytes > 0 and sum(now.moves.values()) > 0
    # four prefixes of nine whole pages, less what was dropped; the warm-up left less than a page
    assert sum(now.pages.values()) == 4 * 9 - dropped
    assert now.retention["settle"][0] > before.retention["settle"][0]
    assert "of 2,048 hot-token equivalents" in view and "hot → warm" in view
    for process in ("Scheduler", "Detokenizer Manager", "Tokenizer Manager"):
        assert log.count(f"Freezing GC in {process} process") == 1, process


def run_top(url):
    command = [sys.executable, "-m", "sglang_spherical", "top", "--once", "--url", url]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
