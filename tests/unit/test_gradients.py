"""Distortions of slices: whose gradients count, and what they predict."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_tools import normal
from torch.nn.functional import scaled_dot_product_attention

from sglang_spherical.calibrate import TEXT
from sglang_spherical.evaluation import gradients, inputs, runner
from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.frames import Frames

PAGE, TOKENS = 16, 64


def test_attention_is_causal_and_only_later_pages_pull() -> None:
    q = normal(4, 3 * PAGE, 16, seed=1)
    k, v = (normal(2, 3 * PAGE, 16, seed=seed).requires_grad_() for seed in (2, 3))
    out = gradients.attend_later(q * 16**-0.5, k, v, PAGE)
    whole = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(out, whole, atol=1e-5)
    out[:, PAGE : 2 * PAGE].square().sum().backward()
    for x in (k, v):
        assert x.grad is not None
        assert bool((x.grad[:, :PAGE] != 0).any())
        assert not bool(x.grad[:, PAGE:].any()), "of the queries' own page, and of the future"


@pytest.mark.parametrize("side", [0, 1])
def test_gradients_are_those_of_moving_what_later_pages_read(side: int) -> None:
    """Against what attention's output becomes when a page's keys or values move a little."""
    q, k, v = (normal(heads, TOKENS, 8, seed=seed).double() for seed, heads in enumerate((4, 2, 2)))
    pulled = k.clone().requires_grad_(), v.clone().requires_grad_()
    gradients.attend_later(q, *pulled, PAGE).sin().sum().backward()
    grad = pulled[side].grad
    assert grad is not None
    page, later = slice(PAGE, 2 * PAGE), slice(2 * PAGE, None)
    step = 1e-6 * normal(2, PAGE, 8, seed=9).double()
    moved = [k.clone(), v.clone()]
    moved[side][:, page] += step
    before, after = (
        scaled_dot_product_attention(q, *read, is_causal=True, scale=1.0, enable_gqa=True)
        for read in ((k, v), moved)
    )
    change = (after[:, later].sin() - before[:, later].sin()).sum()
    torch.testing.assert_close((grad[:, page] * step).sum(), change, rtol=1e-4, atol=0.0)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return inputs.load_model(tiny_model, "float32")


@pytest.fixture(scope="module")
def windows(tiny_model: Path) -> torch.Tensor:
    return inputs.load_windows(tiny_model, TEXT, 4 * TOKENS)


@pytest.fixture(scope="module")
def coder(model: Any, windows: torch.Tensor) -> gradients.Coder:
    frames = Frames(*inputs.cache_shape(model), PAGE, "cpu")
    runner.learn_frames(model, frames, windows[:2])
    return gradients.Coder(frames)


def test_distortions_fall_with_bits_and_are_the_same_again(
    model: Any, coder: gradients.Coder, windows: torch.Tensor
) -> None:
    found = gradients.distortion(model, coder, windows[2:4])
    assert found.shape == (2, 4, 2, len(CHOICES[0])) and found.dtype == torch.float64
    assert bool(found.isfinite().all()) and bool((found > 0).all())
    assert float((found.diff(dim=-1) > 0).double().mean()) > 0.8, "choices go from fine to coarse"
    assert not model.training
    assert torch.equal(gradients.distortion(model, coder, windows[2:4]), found)


def test_a_distortion_is_half_the_square_of_error_times_gradient(
    model: Any, coder: gradients.Coder, windows: torch.Tensor
) -> None:
    """Token by token, from gradients without checkpoints."""
    ids = windows[2]
    found = gradients.distortion(model, coder, [ids])
    plain = gradients.Gradients(PAGE)
    plain.install(model)
    plain.pull(model, ids, torch.Generator().manual_seed(gradients.SEED))
    x = plain.seen[1][0]
    assert x.grad is not None
    hot = coder.store_hot(1, 0, x.detach()[0])
    for place, pattern in enumerate(CHOICES[0]):
        error = coder.lower(1, 0, hot, pattern) - x.detach()[0]
        total = sum(
            float(error[1, t].double() @ x.grad[0, 1, t].double()) ** 2 / 2
            for t in range(PAGE, len(ids))
        )
        assert found[0, 1, 1, place].item() * len(ids) == pytest.approx(total, rel=1e-3)


def test_the_last_page_of_a_window_is_read_by_no_later_one(
    model: Any, windows: torch.Tensor
) -> None:
    seen = gradients.Gradients(PAGE)
    seen.install(model)
    model.requires_grad_(False)
    seen.pull(model, windows[0], torch.Generator().manual_seed(1))
    assert sorted(seen.seen) == [0, 1, 2, 3]
    for sides in seen.seen.values():
        for x in sides:
            assert x.grad is not None
            assert not bool(x.grad[:, :, -PAGE:].any())
            assert bool((x.grad[:, :, :-PAGE] != 0).any())


def test_the_models_dtype_may_be_bfloat16(
    model: Any, coder: gradients.Coder, windows: torch.Tensor
) -> None:
    whole = gradients.distortion(model, coder, windows[2:3])
    short = gradients.distortion(copy.deepcopy(model).bfloat16(), coder, windows[2:3])
    assert short.dtype == torch.float64
    assert short.sum().item() == pytest.approx(whole.sum().item(), rel=0.5)
