"""Windows through a model: once dense, once for every tier and comparator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from sglang_spherical.evaluation import comparators
from sglang_spherical.evaluation.attention import (
    CacheForm,
    CodedRead,
    MeasuredAttention,
    Observer,
)
from sglang_spherical.evaluation.coding import (
    VALUE_BITS_DENSE,
    TierCoder,
    TierRead,
    bits_per_value,
)
from sglang_spherical.evaluation.comparators import Comparator, ComparatorRead
from sglang_spherical.evaluation.scores import LayerErrors, Predictions, RunScores, compare
from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import PageLayout


def learn_frames(model: Any, frames: Frames, windows: Iterable[torch.Tensor]) -> None:
    """Lets frames observe windows int64 [tokens] as if they were prompts, and freezes them."""

    def observe(
        ids: torch.Tensor,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
    ) -> None:
        """What the server's pool does with a prefill before its tokens are written."""
        positions = torch.arange(k.shape[1], device=k.device)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        centre = frames.new_centre(layer, k, v, positions)
        if centre is not None:
            frames.freeze_centre(layer, centre)
        frames.observe(layer, q, k, v, positions, ids, scale)

    for ids in windows:
        _observe(model, partial(observe, ids), [ids])
    frames.calibrate()


def learn_comparators(
    model: Any, compared: Sequence[Comparator], windows: Iterable[torch.Tensor]
) -> None:
    """Lets comparators learn from windows int64 [tokens], each from the last one."""

    def observe(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> None:
        for comparator in compared:
            comparator.learn(layer, KEYS, k.float())
            comparator.learn(layer, VALUES, v.float())

    _observe(model, observe, windows)


def _observe(model: Any, observer: Observer, windows: Iterable[torch.Tensor]) -> None:
    """Dense windows through the model, layer by layer before the observer's eyes."""
    attention = MeasuredAttention()
    attention.install(model)
    attention.observers = [observer]
    with torch.inference_mode():
        for ids in windows:
            model.base_model(ids.unsqueeze(0), use_cache=False)


class Evaluation:
    """A model, and what its runs have scored so far: `dense`, the tiers named, the comparators.

    Pages go down through the tiers named, and no others.
    """

    def __init__(
        self,
        model: Any,
        layout: PageLayout,
        frames: Frames,
        tiers: Sequence[str],
        compared: Sequence[Comparator] = (),
    ) -> None:
        self.model = model
        self.layers = layout.layers
        self.attention = MeasuredAttention()
        self.attention.install(model)
        self.windows = 0
        self.dense = RunScores("dense", VALUE_BITS_DENSE)
        self.coded: list[tuple[CacheForm, RunScores]] = []
        hot, *lower = layout.levels
        stops = hot, *(level for level in lower if level.name in tiers)
        chosen = layout.assignment.at([layout.levels.index(stop) for stop in stops])
        coder = TierCoder(frames, stops, chosen)
        for tier in tiers:
            stop, level = next(x for x in enumerate(stops) if x[1].name == tier)
            bits = bits_per_value(layout, layout.levels.index(level))
            self._add(TierRead(coder, stop), tier, bits)
        shape = layout.kv_heads, layout.page_size, layout.head_dim
        for comparator in compared:
            bits = comparators.bits_per_value(comparator, *shape)
            self._add(ComparatorRead(comparator, layout.page_size), comparator.name, bits)

    def _add(self, form: CacheForm, name: str, bits: float) -> None:
        self.coded.append((form, RunScores(name, bits, LayerErrors(self.layers))))

    def score(self, ids: torch.Tensor, step: Callable[[], object]) -> None:
        """One window int64 [tokens]; calls `step` after every run.

        An interrupted window leaves no trace in the scores.
        """
        exact = self._logits(ids, None)
        done: list[tuple[RunScores, Predictions, LayerErrors | None]] = []
        done.append((self.dense, compare(ids, exact, exact), None))
        step()
        for form, scores in self.coded:
            errors = LayerErrors(self.layers)
            logits = self._logits(ids, CodedRead(form, errors))
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
        runs = self.dense, *(scores for _, scores in self.coded)
        return [scores.summary(self.dense.perplexity) for scores in runs]
