"""Mixed requests at a pool too small for them: answered, accounted, nothing left behind."""

import json
import subprocess
import sys

import pytest
import torch

from sglang_spherical import frame_file

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("unlike", [False, True], ids=["without a file", "with a file, page 16"])
def test_a_short_soak(repo_root, tiny_model, tmp_path, unlike):
    found, log = tmp_path / "soak.json", tmp_path / "server.log"
    command = [sys.executable, "benchmarks/soak.py", "--model", str(tiny_model)]
    command += ["--requests", "30", "--json", str(found), "--log", str(log), "--"]
    if unlike:
        command += ["--page-size", "16", "--spherical-frames", made_up_frames(tiny_model, tmp_path)]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    result = json.loads(found.read_text())
    assert result["engaged"] and result["alive"] and not result["faults_in_log"]
    assert sum(result["kinds"].values()) >= 30
    assert result["outcomes"]["answered"] > 15
    assert result["cached_tokens"] > 0
    assert result["retractions"] > 0  # SGLANG_TEST_RETRACT forces them
    assert ("patterns chosen per head" in log.read_text()) == unlike


def made_up_frames(model, folder):
    """A calibration file of the model, in which the errors of some heads weigh more."""
    identity = frame_file.model_identity(model)
    heads, d = (identity["layers"], identity["kv_heads"]), identity["head_dim"]
    weight = torch.randn(2, *heads, 1, generator=torch.Generator().manual_seed(0)).exp()
    statistics = frame_file.FrameStatistics(
        torch.zeros(2, *heads, d),
        torch.ones(2, *heads, d),
        torch.ones(*heads, d),
        16,
        weight * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0]),
    )
    frame_file.save(folder / "frames.safetensors", statistics, identity)
    return str(folder / "frames.safetensors")
