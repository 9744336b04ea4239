"""Patterns per head: the budget is kept, the loss falls, and a rank's choice is its own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_spherical.config import SphericalConfig
from sglang_spherical.pool.assignment import Assignment, pack_mixed
from sglang_spherical.pool.choice import choose_kinds, expected_change
from sglang_spherical.pool.layout import PageLayout, default_levels, split_descriptor

LEVELS = default_levels(SphericalConfig("spherical"))


def layout_of(layers: int = 6, kv_heads: int = 4, head_dim: int = 64) -> PageLayout:
    return PageLayout.fit(64, head_dim, layers, kv_heads, LEVELS)


def distortion_of(layout: PageLayout, seed: int = 0, unlike: float = 1.5) -> torch.Tensor:
    """Of heads whose errors weigh e**(unlike * normal); more bits always lose less."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, layout.layers, layout.kv_heads, 1, generator=rng) * unlike
    by_choice = torch.tensor([[0.1, 1.0, 4.0, 9.0, 20.0], [0.1, 1.0, 4.0, 9.0, 16.0]])
    return weight.exp() * by_choice.view(2, 1, 1, 5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 8), st.sampled_from([64, 80, 128]), st.integers(0, 1 << 20),
    st.floats(0, 4),
)  # fmt: skip
def test_every_choice_can_be_packed_and_loses_no_more(
    layers: int, kv_heads: int, head_dim: int, seed: int, unlike: float
) -> None:
    layout = layout_of(layers, kv_heads, head_dim)
    distortion = distortion_of(layout, seed, unlike)
    changes = []
    for finer in (False, True):
        chosen = layout.with_kinds(choose_kinds(layout, distortion, finer))
        assert chosen.blocks == layout.blocks and chosen.cost_tokens == layout.cost_tokens
        for level in range(len(LEVELS)):
            check_places(chosen, level)
        changes.append(expected_change(chosen, distortion))
        if not finer:
            assert chosen.assignment.kinds == layout.assignment.kinds, "nothing new is compiled"
            assert changes[0][0] == 0, "warm's own pair is the finest"
    assert max(changes[0]) <= 1e-9
    # what is coarser than warm in warm's blocks stays so below: measured, up to 0.001
    assert max(changes[1]) <= 0.01
    assert changes[1][0] <= changes[0][0] + 1e-9


def check_places(layout: PageLayout, level: int) -> None:
    """Slices lie inside the level's blocks and do not overlap."""
    _, slot, offset = split_descriptor(layout.descriptors(level))
    ends: dict[int, list[tuple[int, int]]] = {}
    for where, start, size in zip(slot.flatten(), offset.flatten(), layout.slice_bytes(level)):
        ends.setdefault(int(where), []).append((int(start), int(start) + size))
    assert max(ends) < layout.blocks[level]
    for pieces in ends.values():
        pieces.sort()
        assert pieces[-1][1] <= layout.block_bytes
        assert all(end <= start for (_, end), (start, _) in pairwise(pieces))


def test_where_errors_weigh_more_there_are_more_bits() -> None:
    layout = layout_of()
    distortion = distortion_of(layout, unlike=0)
    distortion[:, 0] *= 100
    distortion[:, 1] /= 100
    of = torch.tensor(choose_kinds(layout, distortion).of).view(len(LEVELS), 6, 4)
    assert bool((of[1, 0] == 1).all()), "finer than warm in a warm page"
    assert bool((of[2, 0] <= 2).all()), "warm or finer in a cool page"
    assert bool((of[2, 1] > 3).all()), "and others pay for it"


def test_expected_change_is_of_the_losses() -> None:
    layout = layout_of()
    distortion = distortion_of(layout)
    chosen = layout.with_kinds(choose_kinds(layout, distortion))
    assert expected_change(layout, distortion) == (0.0,) * 4
    cool = expected_change(chosen, distortion)[1]
    loss = torch.stack([distortion[0, ..., i] + distortion[1, ..., j]
                        for i, j in ((0, 0), (1, 1), (2, 2), (3, 4), (4, 4))], -1)  # fmt: skip
    kinds = torch.tensor(chosen.assignment.of[2]).view(6, 4, 1) - 1
    wanted = float(loss.gather(-1, kinds).sum() / loss[..., 2].sum()) - 1
    assert cool == pytest.approx(wanted, rel=1e-5) and cool < -0.2


def test_a_table_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="distortion"):
        choose_kinds(layout_of(), torch.zeros(2, 6, 3, 5))


def test_an_assignment_says_what_it_expects() -> None:
    pairs = tuple(level.pair for level in LEVELS)
    with pytest.raises(ValueError, match="finer"):
        Assignment(pairs, ((0, 0), (1, 2), (2, 1)))
    with pytest.raises(ValueError, match="level 0"):
        Assignment(pairs, ((0, 1), (1, 2)))
    with pytest.raises(ValueError, match="exceed"):
        fine = ((0,) * 24, *[(1,) * 24] * 4)
        layout_of().with_kinds(Assignment(pairs, fine))


def test_packing_needs_room() -> None:
    assert pack_mixed([5, 3, 4], 2, 8) == [(0, 0), (0, 5), (1, 0)]
    assert pack_mixed([5, 5, 5], 2, 8) is None


@pytest.mark.parametrize(
    ("hot", "warm", "finer"), [(8, 4, "8-6-6-4"), (8, 3, "6-4-4-2"), (4, 3, None)]
)
def test_a_pair_finer_than_warm_is_smaller_than_hot(hot: int, warm: int, finer: str | None) -> None:
    config = SphericalConfig("spherical", hot_bits=hot, warm_bits=warm, cold_bits=2)
    layout = PageLayout.fit(64, 64, 2, 2, default_levels(config))
    own = layout.assignment.kinds[1:]
    more = [pair[0].name for pair in layout.choices if pair not in own]
    assert more == ([] if finer is None else [finer])
    assert layout.choices[-len(own) :] == own
