"""Patterns per head: whose gradients count, and where the bits go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cache_tools import normal
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import head_patterns
from head_patterns import CHOICES, PAGE

SIZES = torch.tensor([[8.0, 6.0, 4.0, 2.0]] * 2, dtype=torch.float64)


def test_attention_is_causal_and_only_later_pages_pull() -> None:
    q = normal(4, 3 * PAGE, 16, seed=1)
    k, v = (normal(2, 3 * PAGE, 16, seed=seed).requires_grad_() for seed in (2, 3))
    out = head_patterns.attend(q * 16**-0.5, k, v)
    whole = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(out, whole, atol=1e-5)
    out[:, PAGE : 2 * PAGE].square().sum().backward()
    for x in (k, v):
        assert x.grad is not None
        assert bool((x.grad[:, :PAGE] != 0).any())
        assert not bool(x.grad[:, PAGE:].any()), "of the queries' own page, and of the future"


def test_bits_go_where_errors_count() -> None:
    steps = torch.tensor([1.0, 2.0, 5.0, 20.0], dtype=torch.float64)
    distortion = torch.ones(2, 3, 2, 1, dtype=torch.float64) * steps
    distortion[1, 2, 0] *= 100
    distortion[0, 0, 1] *= 0.01
    picked = head_patterns.choose(distortion, SIZES, 5.0)
    assert head_patterns.mean_bytes(picked, SIZES) <= 5.0
    assert picked[1, 2, 0] == 0
    assert picked[0, 0, 1] == len(steps) - 1
    uniform = torch.full_like(picked, 2)
    spent = torch.gather(distortion, -1, picked.unsqueeze(-1)).sum()
    assert spent < torch.gather(distortion, -1, uniform.unsqueeze(-1)).sum()


@pytest.mark.parametrize("budget", [2.0, 8.0])
def test_the_ends_of_the_budget(budget: float) -> None:
    distortion = normal(2, 3, 2, len(CHOICES[0])).abs().double().sort(-1).values
    picked = head_patterns.choose(distortion, SIZES, budget)
    assert head_patterns.mean_bytes(picked, SIZES) <= budget
