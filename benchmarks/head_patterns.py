"""Bits where they count: patterns chosen for every layer, KV head and side under a fixed budget.

usage: python benchmarks/head_patterns.py --model DIR --text FILE [--windows 4] [--learn 4]
       [--device cpu] [--json OUT]

A level of the cache gives all slices of a page one pattern of keys and one of values. Here every
(layer, KV head) has its own, for as many bytes on average, chosen by what their errors are expected
to do to the model's predictions:

    D(slice, pattern) = 1/2 E[(e_t . g_t)^2]    summed over the tokens t of a window

with e_t the error that coding leaves in a key or value and g_t the gradient of the log probability
of tokens drawn from the model's own predictions, through queries of later pages only: the second
order of KL(dense || coded), with errors of different tokens and slices taken as independent. The
choice minimises the sum of D under the budget (a Lagrangian multiplier, found by bisection).
Patterns without a band are left out for values: their errors are not independent.

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

from sglang_spherical.config import PAGE_SIZES, SphericalConfig
from sglang_spherical.evaluation import inputs, runner
from sglang_spherical.evaluation.attention import CodedRead, MeasuredAttention
from sglang_spherical.evaluation.coding import TierCoder
from sglang_spherical.evaluation.scores import LayerErrors, RunScores, compare
from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import Level, default_levels
from spherical_kernels.codec.patterns import FrameKind, Pattern
from spherical_kernels.codec.slices import slice_layout

PAGE = max(PAGE_SIZES)
CHOICES = (
    ((6, 4, 4, 2), (4, 4, 2, 2), (4, 2, 2, 2), (4, 2, 2, 0)),
    ((4, 4, 4, 4), (4, 4, 2, 2), (4, 2, 2, 2), (2, 2, 2, 2)),
)
"""Of keys and of values."""

BUDGETS = {
    "3": ((4, 4, 2, 2), (4, 4, 2, 2)),
    "2.5": ((4, 2, 2, 2), (4, 2, 2, 2)),
    "cold": ((4, 2, 2, 2), (2, 2, 2, 2)),
    "2": ((2, 2, 2, 2), (2, 2, 2, 2)),
}
"""Uniform patterns whose bytes are the budget."""

GRANULARITIES = ("layer", "head")

Distortion = torch.Tensor
"""float64 [2 (sides), layers, kv_heads, choices]."""


def pattern(bits: tuple[int, ...]) -> Pattern:
    return Pattern(FrameKind.CALIBRATED, bits)


def size_bytes(bits: tuple[int, ...], head_dim: int) -> int:
    return slice_layout(pattern(bits), PAGE, head_dim).size_bytes


class Coder:
    """Hot pages, and from them any pattern."""

    def __init__(self, frames: Frames) -> None:
        self.hot = default_levels(SphericalConfig())[0]
        self.frames = frames
        self._coders: dict[tuple[int, ...], TierCoder] = {}

    def lower(self, layer: int, side: int, x: torch.Tensor, bits: tuple[int, ...]) -> torch.Tensor:
        """x [kv_heads, tokens, d] as read from hot pages, coded in a pattern and read back."""
        if bits not in self._coders:
            levels = self.hot, Level("lowered", pattern(bits), pattern(bits))
            self._coders[bits] = TierCoder(self.frames, levels)
        return self._coders[bits].store(layer, side, x, 1)

    def store_hot(self, layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
        return TierCoder(self.frames, (self.hot,)).store(layer, side, x, 0)


class Chosen:
    """A cache whose slices have patterns of their own; for `attention.attend_codes`.

    bits  of [side][layer][kv_head]
    """

    page_size = PAGE

    def __init__(self, coder: Coder, bits: list[list[list[tuple[int, ...]]]]) -> None:
        self.coder, self.bits = coder, bits

    def reach(self, layer: int, side: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hot = self.coder.store_hot(layer, side, x)
        lowered = torch.empty_like(hot)
        mine = self.bits[side][layer]
        for bits in set(mine):
            heads = [head for head, its in enumerate(mine) if its == bits]
            lowered[heads] = self.coder.lower(layer, side, hot, bits)[heads]
        return hot, lowered


class Gradients:
    """Attention that keeps keys and values, whose gradients come from later pages alone."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def install(self, model: Any) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register("spherical_gradients", self.forward)
        AttentionMaskInterface.register("spherical_gradients", sdpa_mask)
        model.set_attn_implementation("spherical_gradients")

    def forward(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: object, scaling: float, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """transformers' interface: query [1, q_heads, tokens, d], key and value alike."""
        if module.layer_idx not in self.seen:  # else it is done again, for the way back
            key.retain_grad()
            value.retain_grad()
            self.seen[module.layer_idx] = key, value
        out = attend(query[0] * scaling, key[0], value[0])
        return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention, q [q_heads, tokens, d]; keys and values of a query's own page take no
    gradient."""
    page = torch.arange(q.shape[1]) // PAGE
    own = page[:, None] == page
    future = torch.ones(len(page), len(page), dtype=torch.bool).triu(1)
    q = q.unflatten(0, (len(k), -1))
    k, v = k.unsqueeze(1), v.unsqueeze(1)
    logits = torch.where(own, q @ k.detach().mT, q @ k.mT).masked_fill(future, -torch.inf)
    p = logits.softmax(-1)
    return (p.masked_fill(own, 0) @ v + p.masked_fill(~own, 0) @ v.detach()).flatten(0, 1)


def distortion(model: Any, coder: Coder, windows: torch.Tensor) -> Distortion:
    """D of every slice and choice, per token; the first page, which stays hot, is left out."""
    gradients = Gradients()
    gradients.install(model)
    model.requires_grad_(False).train()  # no model served here drops anything
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers, heads, _ = inputs.cache_shape(model)
    found = torch.zeros(2, layers, heads, len(CHOICES[0]), dtype=torch.float64)
    for ids in tqdm(windows, unit="window", desc="gradients"):
        rows = model.get_input_embeddings()(ids.unsqueeze(0)).detach().requires_grad_()
        logits = model(inputs_embeds=rows, use_cache=False).logits[0]
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        logits.log_softmax(-1).gather(-1, drawn.unsqueeze(1)).sum().backward()
        for layer, sides in gradients.seen.items():
            for side, x in enumerate(sides):
                hot = coder.store_hot(layer, side, x.detach()[0])
                for i, bits in enumerate(CHOICES[side]):
                    error = coder.lower(layer, side, hot, bits) - x.detach()[0]
                    moved = (error * x.grad[0]).sum(-1)[:, PAGE:]
                    found[side, layer, :, i] += moved.double().square().sum(-1) / 2
        gradients.seen.clear()
    model.gradient_checkpointing_disable()
    model.eval()
    return found / windows.numel()


def choose(distortion: Distortion, sizes: torch.Tensor, budget: float) -> torch.Tensor:
    """The choice [2, layers, kv_heads] of least distortion whose slices take `budget` bytes on
    average. sizes [2, choices] in bytes."""
    price = sizes[:, None, None]
    low, high = 0.0, float(distortion.max())
    for _ in range(100):
        middle = (low + high) / 2
        picked = (distortion + middle * price).argmin(-1)
        if mean_bytes(picked, sizes) > budget:
            low = middle
        else:
            high = middle
    return (distortion + high * price).argmin(-1)


def mean_bytes(picked: torch.Tensor, sizes: torch.Tensor) -> float:
    """Bytes of a slice on average."""
    return float(torch.stack([sizes[side][picked[side]] for side in (KEYS, VALUES)]).mean())


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
        self.distortion = distortion(self.model, self.coder, learnt)
        self.scored = scored
        self.attention = MeasuredAttention()
        self.attention.install(self.model)
        self.dense = [self._logits(ids, None) for ids in scored]

    def _logits(self, ids: torch.Tensor, coded: CodedRead | None) -> torch.Tensor:
        self.attention.coded = coded
        with torch.inference_mode():
            return self.model(ids.unsqueeze(0), use_cache=False).logits[0]

    def row(
        self, budget: str, granularity: str, bits: list[list[list[tuple[int, ...]]]]
    ) -> dict[str, Any]:
        """Scores one assignment of patterns."""
        scores = RunScores(granularity, 0.0, LayerErrors(self.layers))
        for ids, dense in zip(self.scored, self.dense):
            errors = LayerErrors(self.layers)
            logits = self._logits(ids, CodedRead(Chosen(self.coder, bits), errors))
            scores.add(compare(ids, dense, logits), errors)
        flat = [its for side in bits for layer in side for its in layer]
        values = PAGE * self.d
        summary = scores.summary(1.0)
        return {
            "budget": budget,
            "granularity": granularity,
            "bits_per_value": 8 * sum(size_bytes(its, self.d) for its in flat) / len(flat) / values,
            "kl_mean": summary["kl_mean"],
            "same_top1": summary["same_top1"],
            "chosen": [
                dict(Counter("-".join(map(str, its)) for layer in side for its in layer))
                for side in bits
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Every budget: uniform, by layer, by head; printed as they come."""
        found = []
        choices = [[size_bytes(its, self.d) for its in side] for side in CHOICES]
        sizes = torch.tensor(choices, dtype=torch.float64)
        by_layer = self.distortion.mean(2, keepdim=True).expand_as(self.distortion)
        for budget, pair in ((name, BUDGETS[name]) for name in self.budgets):
            uniform = [[[its] * self.heads for _ in range(self.layers)] for its in pair]
            most = sum(size_bytes(its, self.d) for its in pair) / 2
            runs = {"uniform": uniform}
            for name, table in (("layer", by_layer), ("head", self.distortion)):
                if name not in self.granularities:
                    continue
                picked = choose(table, sizes, most)
                runs[name] = [
                    [[CHOICES[side][i] for i in layer] for layer in picked[side].tolist()]
                    for side in (KEYS, VALUES)
                ]
            rows = [self.row(budget, name, bits) for name, bits in runs.items()]
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
