"""Windows through a model: once dense, once for every tier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sglang_spherical.evaluation.attention import CodedRead, MeasuredAttention
from sglang_spherical.evaluation.coding import VALUE_BITS_DENSE, TierCoder, bits_per_value
from sglang_spherical.evaluation.scores import LayerErrors, Predictions, RunScores, compare
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import PageLayout


def learn_frames(model: Any, frames: Frames, windows: Iterable[torch.Tensor]) -> None:
    """Lets frames observe windows int64 [tokens] as if they were prompts, and freezes them."""
    attention = MeasuredAttention()
    attention.install(model)
    attention.learner = frames
    with torch.inference_mode():
        for ids in windows:
            model.base_model(ids.unsqueeze(0), use_cache=False)
    frames.calibrate()


class Evaluation:
    """A model, and what its runs have scored so far: `dense` first, then the tiers named."""

    def __init__(
        self, model: Any, layout: PageLayout, frames: Frames, tiers: Sequence[str]
    ) -> None:
        self.model = model
        self.layers = layout.layers
        self.coder = TierCoder(frames, layout.levels)
        self.attention = MeasuredAttention()
        self.attention.install(model)
        self.windows = 0
        self.dense = RunScores("dense", VALUE_BITS_DENSE)
        names = [level.name for level in layout.levels]
        self.coded = {
            names.index(tier): RunScores(
                tier, bits_per_value(layout, names.index(tier)), LayerErrors(self.layers)
            )
            for tier in tiers
        }

    def score(self, ids: torch.Tensor, step: Callable[[], object]) -> None:
        """One window int64 [tokens]; calls `step` after every run.

        An interrupted window leaves no trace in the scores.
        """
        exact = self._logits(ids, None)
        done: list[tuple[RunScores, Predictions, LayerErrors | None]] = []
        done.append((self.dense, compare(ids, exact, exact), None))
        step()
        for level, scores in self.coded.items():
            errors = LayerErrors(self.layers)
            logits = self._logits(ids, CodedRead(self.coder, level, errors))
            done.append((scores, compare(ids, exact, logits), errors))
            step()
        for run, predictions, seen in done:
            run.add(predictions, seen)
        self.windows += 1

    def _logits(self, ids: torch.Tensor, coded: CodedRead | None) -> torch.Tensor:
        self.attention.coded = coded
        with torch.inference_mode():
            return self.model(ids.unsqueeze(0), use_cache=False).logits[0]

    def summaries(self) -> list[dict[str, Any]]:
        """The report's `runs`; empty before the first window is done."""
        if not self.windows:
            return []
        return [
            scores.summary(self.dense.perplexity) for scores in (self.dense, *self.coded.values())
        ]
