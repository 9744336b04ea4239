"""Mixed requests at a pool too small for them: answered, accounted, nothing left behind."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("flags", [[], ["--page-size", "16"]], ids=["page 64", "page 16"])
def test_a_short_soak(repo_root, tiny_model, tmp_path, flags):
    found, log = tmp_path / "soak.json", tmp_path / "server.log"
    command = [sys.executable, "benchmarks/soak.py", "--model", str(tiny_model)]
    command += ["--requests", "50", "--json", str(found), "--log", str(log), "--", *flags]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    result = json.loads(found.read_text())
    assert result["engaged"] and result["alive"] and not result["faults_in_log"]
    assert sum(result["kinds"].values()) >= 50
    assert result["outcomes"]["answered"] > 25
    assert result["cached_tokens"] > 0
    assert result["retractions"] > 0  # SGLANG_TEST_RETRACT forces them
