"""Windows that copy from far back, and what is pulled in them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_tools import normal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import copying_frames
from copying_frames import CopiedOdds, Window, Writer
from probe_items import Prose

from sglang_spherical.evaluation import gradients, inputs, runner
from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.frames import Frames

PAGE = 64


def encode(text: str) -> list[int]:
    """A token per word, the same for the same word."""
    return [sum(ord(c) * 31**i for i, c in enumerate(word)) % 4001 + 9 for word in text.split()]


@pytest.fixture(scope="module")
def prose() -> Prose:
    rng = random.Random(3)
    words = [f"word{rng.randrange(900)}" for _ in range(9000)]
    text = " ".join(" ".join(words[i : i + 20]).capitalize() + "." for i in range(0, 9000, 20))
    return Prose.read(text, encode)


@pytest.mark.parametrize("write", [copying_frames.answers, copying_frames.repeated])
def test_what_is_copied_stands_far_back(prose: Prose, write: Callable[[Writer], Window]) -> None:
    windows = copying_frames.make_windows(write, prose, encode, 3)
    assert windows == copying_frames.make_windows(write, prose, encode, 3)
    for window in windows:
        assert len(window.ids) == len(window.copied) == inputs.WINDOW_TOKENS
        assert 50 < sum(window.copied) < inputs.WINDOW_TOKENS // 2
        first = window.copied.index(True)
        known = set(window.ids[: first - PAGE // 4])
        copied = [token for token, its in zip(window.ids, window.copied) if its]
        assert sum(token in known for token in copied) > 0.9 * len(copied)
    assert windows[0] != windows[1]


@pytest.mark.parametrize("right", [True, False])
def test_odds_pull_where_the_model_copies_rightly(tiny_model: Path, right: bool) -> None:
    model = inputs.load_model(tiny_model, "float32")
    model.requires_grad_(False)
    at = 3 * PAGE + 1
    ids = torch.randint(9, 4000, (4 * PAGE,), generator=torch.Generator().manual_seed(1))
    best = model(ids.unsqueeze(0)).logits[0, at - 1].argmax()
    ids[at] = best if right else (best + 1) % 4000
    odds = CopiedOdds(PAGE, [[i == at for i in range(len(ids))]])
    odds.install(model)
    odds.pull(model, ids, torch.Generator().manual_seed(0))
    for sides in odds.seen.values():
        for x in sides:
            assert x.grad is not None
            assert bool(x.grad[:, :, : 3 * PAGE].any()) == right
            assert not bool(x.grad[:, :, 3 * PAGE :].any())


def test_shares_sum_up_to_one_at_cold() -> None:
    found = copying_frames.share(normal(2, 3, 2, len(CHOICES[0])).square())
    keys, values = (side.index(its) for side, its in zip(CHOICES, copying_frames.COLD))
    total = found[0, ..., keys].sum() + found[1, ..., values].sum()
    assert float(total) == pytest.approx(1.0)


def test_distortions_are_of_the_gradients_given(tiny_model: Path) -> None:
    model = inputs.load_model(tiny_model, "float32")
    ids = torch.randint(9, 4000, (4 * PAGE,), generator=torch.Generator().manual_seed(1))
    frames = Frames(*inputs.cache_shape(model), PAGE, "cpu")
    runner.learn_frames(model, frames, [ids])
    nothing = CopiedOdds(PAGE, [[False] * len(ids)])
    found = gradients.distortion(model, gradients.Coder(frames), [ids], nothing)
    assert not bool(found.any())
