"""Bits where they count: patterns chosen for every layer, KV head and side under a fixed budget.

usage: python benchmarks/head_patterns.py --model DIR --text FILE [--windows 4] [--learn 4]
       [--device cpu] [--json OUT]

A level of the cache gives all slices of a page one pattern of keys and one of values. Here every
(layer, KV head) has its own, for as many bytes on average, chosen by what their errors are expected
to do to the model's predictions (`sglang_spherical/evaluation/gradients.py`). The choice minimises
the sum of these distortions under the budget (a Lagrangian multiplier, found by bisection).

Gradients are of windows behind the scored ones, as frames are. `granularity`: `head` chooses for
every slice, `layer` once for all heads of a layer and side, `uniform` not at all.

    rows[]  budget, granularity, bits_per_value (codes, radii, headers), kl_mean, same_top1,
            chosen [keys, values]: {pattern: slices}
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from client import save
from tqdm import tqdm

from sglang_spherical.config import PAGE_SIZES
from sglang_spherical.evaluation import gradients, inputs, runner
from sglang_spherical.evaluation.attention import CodedRead, MeasuredAttention
from sglang_spherical.evaluation.gradients import Coder
from sglang_spherical.evaluation.scores import LayerErrors, RunScores, compare
from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.choice import under_budget
from sglang_spherical.pool.frames import Frames
from spherical_kernels.codec.patterns import FrameKind, Pattern
from spherical_kernels.codec.slices import slice_layout

PAGE = max(PAGE_SIZES)


def pair(keys: tuple[int, ...], values: tuple[int, ...]) -> tuple[Pattern, Pattern]:
    return Pattern(FrameKind.CALIBRATED, keys), Pattern(FrameKind.CALIBRATED, values)


BUDGETS = {
    "3": pair((4, 4, 2, 2), (4, 4, 2, 2)),
    "2.5": pair((4, 2, 2, 2), (4, 2, 2, 2)),
    "cold": pair((4, 2, 2, 2), (2, 2, 2, 2)),
    "2": pair((2, 2, 2, 2), (2, 2, 2, 2)),
}
"""Uniform patterns whose bytes are the budget."""

GRANULARITIES = ("layer", "head")


def size_bytes(pattern: Pattern, head_dim: int) -> int:
    return slice_layout(pattern, PAGE, head_dim).size_bytes


class Chosen:
    """A cache whose slices have patterns of their own; for `attention.attend_codes`.

    patterns  of [side][layer][kv_head]
    """

    page_size = PAGE

    def __init__(self, coder: Coder, patterns: list[list[list[Pattern]]]) -> None:
        self.coder, self.patterns = coder, patterns

    def reach(self, layer: int, side: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hot = self.coder.store_hot(layer, side, x)
        lowered = torch.empty_like(hot)
        mine = self.patterns[side][layer]
        for pattern in set(mine):
            heads = [head for head, its in enumerate(mine) if its == pattern]
            lowered[heads] = self.coder.lower(layer, side, hot, pattern)[heads]
        return hot, lowered


def choose(distortion: torch.Tensor, sizes: torch.Tensor, budget: float) -> torch.Tensor:
    """The choice [2, layers, kv_heads] of least distortion [2, layers, kv_heads, choices] whose
    slices take `budget` bytes on average. sizes [2, choices] in bytes."""
    loss = distortion.cpu().flatten(0, 2).numpy()
    each = sizes.cpu().repeat_interleave(len(loss) // len(sizes), 0).numpy()
    picked = under_budget(loss, each, budget * len(loss))
    return torch.from_numpy(picked).view(distortion.shape[:-1])


class Study:
    """A model, its frames and dense predictions, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        windows = inputs.load_windows(args.model, args.text)
        count = args.windows + 1 + args.learn
        if len(windows) < count:
            raise SystemExit(f"error: --text {args.text}: shorter than {count} windows")
        self.budgets, self.granularities = args.budgets, args.granularities
        self.model = inputs.load_model(args.model, "float32", args.device)
        self.layers, self.heads, self.d = inputs.cache_shape(self.model)
        frames = Frames(self.layers, self.heads, self.d, PAGE, args.device)
        scored, spare, learnt = windows[:count].split([args.windows, 1, args.learn])
        runner.learn_frames(self.model, frames, spare)
        self.coder = Coder(frames)
        shown = tqdm(learnt, unit="window", desc="gradients")
        self.distortion = gradients.distortion(self.model, self.coder, shown)
        self.scored = scored
        self.attention = MeasuredAttention()
        self.attention.install(self.model)
        self.dense = [self._logits(ids, None) for ids in scored]

    def _logits(self, ids: torch.Tensor, coded: CodedRead | None) -> torch.Tensor:
        self.attention.coded = coded
        with torch.inference_mode():
            return self.model(ids.unsqueeze(0), use_cache=False).logits[0]

    def row(
        self, budget: str, granularity: str, patterns: list[list[list[Pattern]]]
    ) -> dict[str, Any]:
        """Scores one assignment of patterns."""
        scores = RunScores(granularity, 0.0, LayerErrors(self.layers))
        for ids, dense in zip(self.scored, self.dense):
            errors = LayerErrors(self.layers)
            logits = self._logits(ids, CodedRead(Chosen(self.coder, patterns), errors))
            scores.add(compare(ids, dense, logits), errors)
        flat = [its for side in patterns for layer in side for its in layer]
        values = PAGE * self.d
        summary = scores.summary(1.0)
        return {
            "budget": budget,
            "granularity": granularity,
            "bits_per_value": 8 * sum(size_bytes(its, self.d) for its in flat) / len(flat) / values,
            "kl_mean": summary["kl_mean"],
            "same_top1": summary["same_top1"],
            "chosen": [
                dict(Counter(its.name for layer in side for its in layer)) for side in patterns
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Every budget: uniform, by layer, by head; printed as they come."""
        found = []
        choices = [[size_bytes(its, self.d) for its in side] for side in CHOICES]
        sizes = torch.tensor(choices, dtype=torch.float64)
        by_layer = self.distortion.mean(2, keepdim=True).expand_as(self.distortion)
        for budget, even in ((name, BUDGETS[name]) for name in self.budgets):
            uniform = [[[its] * self.heads for _ in range(self.layers)] for its in even]
            most = sum(size_bytes(its, self.d) for its in even) / 2
            runs = {"uniform": uniform}
            for name, table in (("layer", by_layer), ("head", self.distortion)):
                if name not in self.granularities:
                    continue
                picked = choose(table, sizes, most)
                runs[name] = [
                    [[CHOICES[side][i] for i in layer] for layer in picked[side].tolist()]
                    for side in (KEYS, VALUES)
                ]
            rows = [self.row(budget, name, patterns) for name, patterns in runs.items()]
            for row in rows:
                change = row["kl_mean"] / rows[0]["kl_mean"] - 1
                print(
                    f"{budget:5s} {row['granularity']:8s} {row['bits_per_value']:.3f} bits  "
                    f"KL {row['kl_mean']:.5f} {change:+.0%}  {row['chosen']}",
                    flush=True,
                )
            found += rows
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4, help="scored (default: 4)")
    parser.add_argument("--learn", type=int, default=4, help="for gradients (default: 4)")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=GRANULARITIES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with inputs.usable_device(args.device):
        rows = Study(args).rows()
    save(args.json, {"model": args.model.resolve().name, "text": args.text.name, "rows": rows})


if __name__ == "__main__":
    main()
