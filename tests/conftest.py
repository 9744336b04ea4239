"""Shared fixtures; GPU tests are skipped where there is no GPU, servers start one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_spherical import models

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.keywords:  # one after the other: they take free ports, and much memory
            item.add_marker(pytest.mark.xdist_group("servers"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def smollm2_model() -> Path:
    """SmolLM2-135M-Instruct: 30 layers, 9 query and 3 KV heads of 64. Fetched once (93 MB)."""
    return models.smollm2(ROOT / models.DEFAULT_ROOT)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A random Llama with SmolLM2's tokenizer: 4 layers, 4 query and 2 KV heads of 64."""
    return models.tiny(ROOT / models.DEFAULT_ROOT)
