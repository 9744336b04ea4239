"""The study of attention mass: its budgets, its masks and its turned queries."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cache_tools import normal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from attention_mass import (
    COLD,
    LEVEL,
    TOKEN_COUNTS,
    WARM,
    captured,
    cheapest,
    mixed_bytes,
    page_bytes,
    ranked,
)
from attention_reader import PAGE, PREFIX, CodedPrefix, Prefix, turned_back


def test_the_cheapest_choice_is_that_of_all_choices() -> None:
    loss, sizes = normal(4, 3, seed=1).square(), [8, 4, 2]
    best = min(
        (choice for choice in itertools.product(range(3), repeat=4)
         if sum(sizes[level] for level in choice) <= 18),
        key=lambda choice: sum(float(loss[page, level]) for page, level in enumerate(choice)),
    )  # fmt: skip
    assert cheapest(loss, sizes, 18) == list(best)


@pytest.mark.parametrize("budget", TOKEN_COUNTS)
def test_designs_take_the_bytes_of_their_budget(budget: str) -> None:
    whole = page_bytes(LEVEL[budget], 64)
    for counts in TOKEN_COUNTS[budget]:
        assert sum(count for count, _ in counts) == PAGE
        assert mixed_bytes(counts, 64) == pytest.approx(whole, rel=0.01)
    assert mixed_bytes([(PAGE, LEVEL[budget])], 64) == whole


def test_ranks_and_shares() -> None:
    utility = torch.tensor([[0.1, 0.9, 0.5, 0.3]])
    assert ranked(utility, [1, 2, 1]).tolist() == [[2, 0, 1, 1]]
    assert captured(utility, torch.tensor([[1.0, 2.0, 4.0, 8.0]])).tolist() == [2.0]


def test_dropped_tokens_are_not_read_and_others_in_their_own_pattern() -> None:
    """A coder that adds one where it lowers to warm, two elsewhere."""
    exact = normal(1, PREFIX, 8, seed=2), normal(1, PREFIX, 8, seed=3)
    coder = SimpleNamespace(
        store_hot=lambda layer, side, x: x,
        lower=lambda layer, side, x, pattern: x + (1 if pattern == WARM[side] else 2),
    )
    of = torch.zeros(1, 1, PREFIX, dtype=torch.int64)
    of[..., PAGE + 1], of[..., PAGE + 2] = 2, 1
    prefix = CodedPrefix(Prefix(coder, [exact]), [WARM, COLD, None], of)
    for read, x in zip(prefix.read(0), exact):
        assert read.shape == (1, PREFIX - 1, 8)
        assert torch.equal(read[:, :PAGE], x[:, :PAGE]), "the first page is hot"
        assert torch.equal(read[:, PAGE], x[:, PAGE] + 1)
        assert torch.equal(read[:, PAGE + 1], x[:, PAGE + 3] + 1), "the dropped one is skipped"
        assert torch.equal(read[:, -1], x[:, PAGE + 2] + 2), "the coarser one comes last"


def test_queries_are_turned_back_to_where_they_stood() -> None:
    angle = normal(5, 4, seed=4).repeat(1, 2)
    cos, sin, x = angle.cos(), angle.sin(), normal(5, 8, seed=5)
    first, second = x.chunk(2, -1)
    turned = x * cos + torch.cat([-second, first], -1) * sin  # as rotary embedding does
    torch.testing.assert_close(turned_back(turned, cos, sin), x)
