"""Patterns per head without gradients: what estimates of errors' harm choose, and what it costs.

usage: python benchmarks/head_estimates.py --model DIR --text FILE --frames FILE [--windows 2]
       [--choices NAME ...] [--device cpu] [--json OUT]

Every choice is the product's (`pool/choice.py`), for the blocks of the level; only the distortions
that it minimises differ. FILE is a calibration file with gradients, of text that is not scored.
Frames and estimates are of the window behind the scored ones, as a server without a file has them.

    alike      all heads have the level's own pair
    gradients  the file's distortions
    spreads    errors of logits, and of values relative to their spread, as if all heads attended
               alike: nothing but what frames are made of
    even       the same by how evenly a head attends
    estimate   and by what it reads to copy: what a server goes by (`pool/estimate.py`)
    written    how far the sum that attention adds to the residual stream moves: an estimate times
               the head's spread of values and size of its output projection
    stream     the same relative to the residual stream there

    rows[]  choice, rank_keys, rank_values (rank correlation with gradients over heads, of 4-2-2-2
            and 2-2-2-2), by_level: {level: {kl_mean, change, by_gradients (change of the loss that
            gradients expect)}}
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from client import save
from tqdm import tqdm

from sglang_spherical import frame_file
from sglang_spherical.config import PAGE_SIZES, SphericalConfig
from sglang_spherical.evaluation import inputs, runner
from sglang_spherical.evaluation.attention import CodedRead, MeasuredAttention
from sglang_spherical.evaluation.coding import TierCoder, TierRead
from sglang_spherical.evaluation.scores import LayerErrors, RunScores, compare
from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.choice import choose_kinds, expected_change
from sglang_spherical.pool.estimate import expected_distortion
from sglang_spherical.pool.frames import SINK_TOKENS, Frames
from sglang_spherical.pool.layout import PageLayout, default_levels

PAGE = max(PAGE_SIZES)
CHOICES = ("alike", "gradients", "spreads", "even", "estimate", "written", "stream")
STOPS = ("hot", "warm", "cool", "cold")
SCORED = ("cool", "cold")


def stream_square(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Median squared norm of the residual stream that each layer leaves: float32 [layers]."""
    found = []

    def look(module: Any, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        found.append(hidden.float().square().sum(-1).flatten()[SINK_TOKENS:].median())

    hooks = [layer.register_forward_hook(look) for layer in model.base_model.layers]
    with torch.inference_mode():
        model.base_model(ids.unsqueeze(0), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def projected(model: Any, kv_heads: int) -> torch.Tensor:
    """Squared size of the output projection of a KV head's queries: float32 [layers, kv_heads]."""
    weights = [layer.self_attn.o_proj.weight for layer in model.base_model.layers]
    sizes = [w.detach().float().square().sum(0).view(kv_heads, -1).mean(-1) for w in weights]
    return torch.stack(sizes)


def estimates(model: Any, frames: Frames, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Distortions [2, layers, kv_heads, choices] by the name of the estimate."""
    estimate, seen = expected_distortion(frames), frames.statistics
    weight = seen.weight().unsqueeze(-1)
    alike = torch.ones_like(weight)
    alike[KEYS] = weight[KEYS].sum() / weight[VALUES].sum()  # the square of the logits' scale
    spread = seen.spread()[VALUES].square().sum(-1)
    written = estimate * (spread * projected(model, spread.shape[1])).unsqueeze(-1)
    stream = stream_square(model, ids).view(-1, 1, 1)
    return {
        "spreads": estimate / weight * alike,
        "even": estimate / weight * seen.read().unsqueeze(-1),
        "estimate": estimate,
        "written": written,
        "stream": written / stream,
    }


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    ranks = torch.stack([x.flatten().double().argsort().argsort().double() for x in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


class Study:
    """A model, its frames, and the loss that gradients expect."""

    def __init__(self, args: argparse.Namespace) -> None:
        windows = inputs.load_windows(args.model, args.text)[: args.windows + 1]
        if len(windows) <= args.windows:
            raise SystemExit(f"error: --text {args.text}: shorter than {args.windows + 1} windows")
        known = frame_file.load(args.frames, frame_file.model_identity(args.model))
        if known.distortion is None:
            raise SystemExit(f"error: --frames {args.frames}: holds no distortions")
        self.scored, spare = windows[:-1], windows[-1]
        self.model = inputs.load_model(args.model, "float32", args.device)
        layers, heads, d = inputs.cache_shape(self.model)
        self.frames = Frames(layers, heads, d, PAGE, args.device)
        runner.learn_frames(self.model, self.frames, [spare])
        self.gradients = known.distortion.to(args.device)
        self.distortions = estimates(self.model, self.frames, spare)
        self.distortions["gradients"] = self.gradients
        levels = default_levels(SphericalConfig())
        self.layout = PageLayout.fit(PAGE, d, layers, heads, levels)
        self.stops = [i for i, level in enumerate(levels) if level.name in STOPS]
        self.attention = MeasuredAttention()
        self.attention.install(self.model)
        self.dense = [self._logits(ids, None) for ids in self.scored]

    def _logits(self, ids: torch.Tensor, coded: CodedRead | None) -> torch.Tensor:
        self.attention.coded = coded
        with torch.inference_mode():
            return self.model(ids.unsqueeze(0), use_cache=False).logits[0]

    def row(self, choice: str) -> dict[str, Any]:
        """Scores one choice, level by level."""
        table, layout = self.distortions.get(choice), self.layout
        if table is not None:
            layout = layout.with_kinds(choose_kinds(layout, table, finer=False))
        expected = expected_change(layout, self.gradients)
        stops = tuple(layout.levels[i] for i in self.stops)
        coder = TierCoder(self.frames, stops, layout.assignment.at(self.stops))
        by_level = {}
        for name in SCORED:
            read = TierRead(coder, STOPS.index(name))
            scores = RunScores(name, 0.0, LayerErrors(layout.layers))
            for ids, dense in zip(self.scored, self.dense):
                errors = LayerErrors(layout.layers)
                scores.add(compare(ids, dense, self._logits(ids, CodedRead(read, errors))), errors)
            by_level[name] = {
                "kl_mean": scores.summary(1.0)["kl_mean"],
                "by_gradients": expected[self.stops[STOPS.index(name)] - 1],
            }
        row: dict[str, Any] = {"choice": choice, "by_level": by_level}
        if table is not None:
            for side, name, place in ((KEYS, "rank_keys", 2), (VALUES, "rank_values", 3)):
                row[name] = rank_correlation(
                    table[side, ..., place], self.gradients[side, ..., place]
                )
        return row

    def rows(self, choices: list[str]) -> list[dict[str, Any]]:
        """Every choice; printed as they come, changes against the first."""
        found: list[dict[str, Any]] = []
        for choice in tqdm(choices, unit="choice"):
            row = self.row(choice)
            found.append(row)
            said = []
            for name, level in row["by_level"].items():
                level["change"] = level["kl_mean"] / found[0]["by_level"][name]["kl_mean"] - 1
                said.append(
                    f"{name} {level['kl_mean']:.4f} {level['change']:+.0%} "
                    f"(by gradients {level['by_gradients']:+.0%})"
                )
            ranks = (f"{row.get(name, 1):.2f}" for name in ("rank_keys", "rank_values"))
            print(f"{choice:9s} {'  '.join(said)}  ranks {' '.join(ranks)}", flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--frames", type=Path, required=True, help="a calibration file")
    parser.add_argument("--windows", type=int, default=2, help="scored (default: 2)")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with inputs.usable_device(args.device):
        rows = Study(args).rows(args.choices)
    shown = {"model": args.model.resolve().name, "text": args.text.name, "windows": args.windows}
    save(args.json, shown | {"rows": rows})


if __name__ == "__main__":
    main()
