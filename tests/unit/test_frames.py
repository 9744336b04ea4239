"""What the frames learn from prefills, and when they may be used."""

from __future__ import annotations

import math

import pytest
import torch
from cache_tools import Layer, normal, random_tokens, read_pages, ready_frames, tiny_pool, write

from sglang_spherical.pool.frames import CENTRE_TOKENS, SINK_TOKENS
from sglang_spherical.pool.kv_pool import SphericalKVPool
from spherical_kernels.testing import assert_close


def prefill(pool: SphericalKVPool, tokens: int, seed: int = 0, spoil: float | None = None) -> None:
    """A prompt's queries, keys and values pass by the frames; one number of each may be spoilt."""
    k, v = random_tokens(pool, tokens, seed)
    q = normal(2, tokens, 4, 32, seed=seed)  # two query heads for every KV head
    for x in (q, k, v) if spoil is not None else ():
        x[:, 20, 1, 3] = spoil
    nothing = torch.zeros(0, dtype=torch.int64)
    for index in range(2):
        layer, at = Layer(index, group=2), torch.arange(tokens)
        pool.observe(layer, q[index], k[index], v[index], at, None, lambda: nothing)


def test_statistics_are_root_mean_squares_without_sinks() -> None:
    pool = tiny_pool(4)
    k, v = random_tokens(pool, 36)
    q = normal(2, 36, 4, 32)
    k[:, :SINK_TOKENS], v[:, :SINK_TOKENS], q[:, :SINK_TOKENS] = 1e4, 1e4, 1e4
    for layer in range(2):
        pool.frames.observe(layer, q[layer], k[layer], v[layer], torch.arange(36), None, 0.125)
    grouped = q[:, 4:].unflatten(2, (2, 2))
    gain = grouped.square().mean((1, 3)).sqrt()
    torch.testing.assert_close(pool.frames.statistics.gain(), gain)
    for side, x in enumerate((k, v)):
        runs = x[:, 4:].unflatten(1, (2, 16))
        spread = (runs - runs.mean(2, keepdim=True)).square().mean((1, 2)).sqrt()
        torch.testing.assert_close(pool.frames.statistics.spread()[side], spread)


def test_frames_are_ready_once_there_is_a_centre_and_a_page_of_statistics() -> None:
    """A page lowered before the centre is frozen would be read around another one than its own."""
    pool = tiny_pool(4)
    assert not pool.frames.ready
    for seed in range(5):
        prefill(pool, CENTRE_TOKENS - 1, seed)
        assert not pool.frames.ready, "no prompt so far was long enough for a centre"
    prefill(pool, CENTRE_TOKENS + 40)
    assert pool.frames.ready
    assert all(pool.frames.centred)


def test_enough_is_learnt_at_some_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_spherical.pool.kv_pool.ENOUGH_TOKENS", 150)
    pool = tiny_pool(4)
    counts = []
    for seed in range(4):
        prefill(pool, 100, seed)
        counts.append(pool.frames.statistics.spread_count[0])
    assert counts == [96, 192, 192, 192] and not pool.learns(Layer(0))
    pool.forget()
    assert pool.learns(Layer(0))


def test_pages_lowered_early_survive_the_first_long_prompt() -> None:
    """Short prompts, memory pressure, then a long prompt: what was lowered still reads the same."""
    pool = tiny_pool(8)
    pages = torch.tensor([1, 2, 3])
    blocks = torch.arange(4, 16).view(3, 4)
    pool.arena.place_pages(pages, blocks)
    loc = (pages.unsqueeze(1) * 16 + torch.arange(16)).flatten()
    write(pool, loc, *random_tokens(pool, 48))
    prefill(pool, 48)
    if pool.frames.ready:
        pool.lower(pages[1:], 0, 1)
    before = read_pages(pool, pages)
    k, v = random_tokens(pool, 100, seed=3)
    for layer in range(2):
        args = k[layer], v[layer], torch.arange(100), None
        pool.observe(Layer(layer), normal(100, 2, 32), *args, lambda: pages)
    torch.testing.assert_close(read_pages(pool, pages), before, atol=0.15, rtol=0)


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf, 1e30])
def test_a_prompt_that_is_not_finite_does_not_spoil_the_frames_of_others(spoil: float) -> None:
    pool = tiny_pool(4)
    prefill(pool, 100, spoil=spoil)
    prefill(pool, 100, seed=1)
    pool.frames.calibrate()
    clean = tiny_pool(4)
    prefill(clean, 100)
    prefill(clean, 100, seed=1)
    clean.frames.calibrate()
    for name in ("centre", "matrix", "dual"):
        assert bool(getattr(pool.frames, name).isfinite().all()), name
    # One number of 96 counts as zero: keys of up to 6 move their channel's mean by at most 6/96.
    assert_close(pool.frames.centre, clean.frames.centre, max_error=6 / 96, rms_error=0.02)


def test_a_flush_forgets_what_was_gathered() -> None:
    pool = tiny_pool(4)
    ready_frames(pool)
    pool.frames.calibrate()
    pool.forget()
    fresh = tiny_pool(4)
    assert not pool.frames.ready
    assert not pool.frames.calibrated
    assert torch.equal(pool.frames.centre, fresh.frames.centre)
    ready_frames(pool)
    ready_frames(fresh)
    pool.frames.calibrate()
    fresh.frames.calibrate()
    assert torch.equal(pool.frames.matrix, fresh.frames.matrix)


def test_calibration_needs_something_to_learn_from() -> None:
    with pytest.raises(RuntimeError, match="before a prefill"):
        tiny_pool(4).frames.calibrate()


def test_a_pool_that_only_warms_up_learns_nothing() -> None:
    pool = tiny_pool(4)
    pool.learning = False  # as the factory leaves it
    prefill(pool, 200)
    assert not pool.frames.ready
    assert pool.frames.statistics.spread_count == [0, 0]
    pool.start(None)
    prefill(pool, 200)
    assert pool.frames.ready


def test_output_channels_are_a_permutation_calibrated_or_not() -> None:
    """A decode step writes the channels that the calibrated frame names, even before it exists."""
    pool = tiny_pool(4)
    each = torch.arange(32).expand_as(pool.frames.picks.channel)
    before = pool.frames.picks.channel
    assert torch.equal(before.sort(-1).values, each.int())
    ready_frames(pool)
    pool.frames.calibrate()
    after = pool.frames.of_layer(1).value_picks
    assert after.channel.data_ptr() == before[1, 1].data_ptr(), "at the same address, for graphs"
    assert torch.equal(before.sort(-1).values, each.int())
    assert not torch.equal(before, each.int()), "no longer in order"
    assert bool((after.weight != 0).all())
