"""Patterns per head: where the bits go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cache_tools import normal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import head_patterns
from head_patterns import CHOICES

SIZES = torch.tensor([[8.0, 6.0, 4.0, 3.0, 2.0]] * 2, dtype=torch.float64)


def mean_bytes(picked: torch.Tensor, sizes: torch.Tensor) -> float:
    return float(torch.stack([sizes[side][picked[side]] for side in range(2)]).mean())


def test_bits_go_where_errors_count() -> None:
    steps = torch.tensor([1.0, 2.0, 5.0, 10.0, 20.0], dtype=torch.float64)
    distortion = torch.ones(2, 3, 2, 1, dtype=torch.float64) * steps
    distortion[1, 2, 0] *= 100
    distortion[0, 0, 1] *= 0.01
    picked = head_patterns.choose(distortion, SIZES, 5.0)
    assert mean_bytes(picked, SIZES) <= 5.0
    assert picked[1, 2, 0] == 0
    assert picked[0, 0, 1] == len(steps) - 1
    uniform = torch.full_like(picked, 2)
    spent = torch.gather(distortion, -1, picked.unsqueeze(-1)).sum()
    assert spent < torch.gather(distortion, -1, uniform.unsqueeze(-1)).sum()


@pytest.mark.parametrize("budget", [2.0, 8.0])
def test_the_ends_of_the_budget(budget: float) -> None:
    distortion = normal(2, 3, 2, len(CHOICES[0])).abs().double().sort(-1).values
    picked = head_patterns.choose(distortion, SIZES, budget)
    assert mean_bytes(picked, SIZES) <= budget
