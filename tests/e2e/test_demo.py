"""The demo as a user runs it: from the repository root, against a real spherical server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_demo_engages_and_reuses_its_prefixes(tiny_model: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "sglang_spherical", "demo", "--model", str(tiny_model)]
    done = subprocess.run(
        [*command, "--max-tokens", "8"], cwd=repo_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("DEMO ")
    report = json.loads(last.removeprefix("DEMO "))
    assert report["engaged"] is True
    assert report["tok_s"] > 0
    sizes = report["bytes_per_token"]
    assert 0 < sizes["cold"] < sizes["warm"] < sizes["hot"] < sizes["bf16"]
    first, second, third = report["turns"]
    assert first["cached_tokens"] == 0
    for earlier, turn in ((first, second), (second, third)):
        shared = earlier["prompt_tokens"] // 64 * 64  # whole pages of the chat so far
        assert shared <= turn["cached_tokens"] < turn["prompt_tokens"]
