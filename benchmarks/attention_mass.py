"""Precision by attention: pages, or tokens of a slice, that later queries need get more bytes.

usage: python benchmarks/attention_mass.py --model DIR --text FILE [--windows 8] [--learn 4]
       [--learn-text FILE] [--device cpu] [--json OUT]

A window's first half is a cached prefix, its second half the next reader: it reads the prefix as it
is coded, and its own half hot. The prefix was computed densely and is lowered from hot codes at
once; its first page stays hot. *Utility* of a token for a (layer, KV head) says how much attention
the reader is going to pay to it:

    random
    newest       the later, the more
    position     what its page got in other windows
    measured64   attention mass by the last 64 queries of the prefix
    measured256  by its last 256
    estimate     E[exp(q.k)] over normal queries, whose mean and covariance are a query head's in
                 other windows before they are turned to their positions; turned to positions of
                 the reader and normalised at each. No attention has to be stored
    sum, product arithmetic and geometric mean of measured256 and the estimate
    oracle       the mass that the reader pays, which nobody knows beforehand

`prediction` says how well each foresees the oracle. `rows` spend the bytes of cool, or of cold, in
other ways than alike on everything:

    uniform      one pair of patterns for all; those of the ladder, and some between its levels
    halves       by page: as many of the best pages at the level above as pay for those below
    lagrangian   by page: the levels of least sum of utility times the ladder's divergence
    the rest     by token: counts and patterns of a slice's tokens in order of utility, keys and
                 values alike; `-` is dropped, and attention does not see it

What a slice of several patterns takes is a header (centroid, scales) and radii and codes of every
token in its own pattern. Which token is where is not counted: attention does not ask for the order
of tokens, so that those of a slice are stored in the order of their utility. All of a slice's
tokens share its centroid, dropped ones included, and its unit, but for patterns that leave a band
out.

    prediction[]  utility, share of the oracle's mass behind the first page that the utility's best
                  quarter has: tokens_by_head (mean over layers and heads), tokens (of the mass of
                  all of them), pages (best 4 of 15, all layers and heads together)
    rows[]        budget, design, utility, bytes (of the budget's), kl_mean, same_top1,
                  change (of kl_mean against uniform), change_windows [], kl_windows []
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_reader import (
    PAGE,
    PREDICTORS,
    PREFIX,
    CodedPrefix,
    Grade,
    Prefix,
    Queries,
    Reader,
    utilities,
)
from client import save
from head_patterns import pair
from tqdm import tqdm

from sglang_spherical.config import SphericalConfig
from sglang_spherical.evaluation import inputs, runner
from sglang_spherical.evaluation.gradients import Coder
from sglang_spherical.evaluation.scores import Predictions, compare, rounded
from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import default_levels
from sglang_spherical.retention.distortion import distortions
from spherical_kernels.codec.slices import slice_layout

PAGES = PREFIX // PAGE - 1
"""Pages that are lowered: all of the prefix but the first."""

LEVELS = default_levels(SphericalConfig())
LEVEL = {level.name: (level.keys, level.values) for level in LEVELS}
WARM, COOL, COLD, FROZEN = (LEVEL[name] for name in ("warm", "cool", "cold", "frozen"))

ABOVE_WARM = pair((6, 4, 4, 4), (6, 4, 4, 4))
ABOVE_COOL = pair((6, 4, 4, 2), (4, 4, 2, 2))
ABOVE_COLD = pair((4, 2, 2, 2), (4, 2, 2, 2))

PAGE_COUNTS = {
    "cool": (("warm", 6), ("cool", 1), ("cold", 8)),
    "cold": (("cool", 3), ("cold", 3), ("frozen", 9)),
}
"""`halves`, best pages first: exactly the budget's bytes."""

TOKEN_COUNTS: dict[str, tuple[tuple[tuple[int, Grade], ...], ...]] = {
    "cool": (
        ((49, WARM), (15, None)),
        ((32, WARM), (32, FROZEN)),
        ((32, ABOVE_COOL), (32, ABOVE_COLD)),
        ((16, ABOVE_WARM), (48, ABOVE_COLD)),
    ),
    "cold": (
        ((49, COOL), (15, None)),
        ((16, WARM), (37, COLD), (11, None)),
        ((16, COOL), (48, FROZEN)),
        ((8, WARM), (56, FROZEN)),
        ((32, ABOVE_COLD), (32, FROZEN)),
    ),
}
"""Tokens of a slice, best first: within 1 % of the budget's bytes."""

PAGE_UTILITIES = ("random", "position", "measured256", "estimate", "oracle")
TOKEN_UTILITIES = ("random", "measured256", "estimate", "product", "oracle")


def page_bytes(grade: Grade, head_dim: int) -> int:
    """Keys and values of one (layer, KV head) of a page."""
    return sum(slice_layout(its, PAGE, head_dim).size_bytes for its in grade or ())


def mixed_bytes(counts: Iterable[tuple[int, Grade]], head_dim: int) -> float:
    """The same where tokens have calibrated patterns of their own: one header a slice."""
    used = 0.0
    for side in (KEYS, VALUES):
        header = slice_layout(COLD[side], PAGE, head_dim).radii_offset_bytes
        used += header
        for count, grade in counts:
            if grade is not None:
                layout = slice_layout(grade[side], PAGE, head_dim)
                used += count * (layout.size_bytes - header) / PAGE
    return used


def name_of(counts: Iterable[tuple[int, Grade]]) -> str:
    """For people: `32 x 6-4-4-2/4-4-4-4 + 32 x -`."""
    return " + ".join(
        f"{count} x " + ("-" if grade is None else "/".join(its.name for its in grade))
        for count, grade in counts
    )


def by_page(utility: torch.Tensor) -> torch.Tensor:
    """Utility [PAGES] of the pages behind the first, of all layers and heads; of mean 1."""
    pages = utility[..., PAGE:].sum((0, 1)).unflatten(0, (PAGES, PAGE)).sum(-1)
    return pages / pages.mean()


def captured(utility: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
    """The sum [...] of `future` [..., n] over the quarter of largest utility [..., n]."""
    best = utility.topk(round(utility.shape[-1] / 4), -1).indices
    return future.gather(-1, best).sum(-1)


def cheapest(loss: torch.Tensor, sizes: Sequence[int], budget: int) -> list[int]:
    """The choice for every page of least loss [pages, levels] within a budget of bytes, exactly."""
    unit = int(np.gcd.reduce(sizes))
    least = np.zeros(budget // unit + 1)
    picks = []
    for row in loss.tolist():
        tried = np.full((len(sizes), len(least)), np.inf)
        for level, (its, size) in enumerate(zip(row, sizes)):
            tried[level, size // unit :] = least[: len(least) - size // unit] + its
        picks.append(tried.argmin(0))
        least = tried.min(0)
    left, chosen = len(least) - 1, []
    for pick in reversed(picks):
        chosen.append(int(pick[left]))
        left -= sizes[chosen[-1]] // unit
    return chosen[::-1]


def ranked(utility: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Places [..., n] of things in groups of these sizes, those of largest utility [..., n] in the
    first."""
    places = torch.repeat_interleave(torch.tensor(counts, device=utility.device))
    order = utility.argsort(-1, descending=True)
    return torch.empty_like(order).scatter_(-1, order, places.expand_as(order))


@dataclass
class Row:
    """One way to spend a budget, window by window."""

    budget: str
    design: str
    utility: str
    bytes_used: list[float] = field(default_factory=list)
    windows: list[Predictions] = field(default_factory=list)

    def kl_windows(self) -> list[float]:
        return [float(its.kl.double().mean()) for its in self.windows]


class Study:
    """A model, what has been learnt for it, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        windows = inputs.load_windows(args.model, args.text)
        learnt = windows[args.windows :]
        if args.learn_text is not None:
            learnt = inputs.load_windows(args.model, args.learn_text)
        if len(windows) < args.windows or len(learnt) < args.learn:
            raise SystemExit("error: the text is shorter than --windows and --learn")
        self.scored, learnt = windows[: args.windows], learnt[-args.learn :]
        self.page_utilities, self.token_utilities = args.page_utilities, args.token_utilities
        self.model = inputs.load_model(args.model, "float32", args.device)
        self.layers, self.heads, self.d = inputs.cache_shape(self.model)
        frames = Frames(self.layers, self.heads, self.d, PAGE, args.device)
        runner.learn_frames(self.model, frames, learnt)
        self.reader = Reader(Coder(frames))
        self.reader.install(self.model)
        positions = torch.arange(inputs.WINDOW_TOKENS).unsqueeze(0)
        cos, sin = self.model.base_model.rotary_emb(torch.zeros(1), positions)
        self.queries = Queries(self.layers, (cos[0], sin[0]))
        with torch.inference_mode():
            for ids in tqdm(learnt, unit="window", desc="queries"):
                self.model.base_model(ids.unsqueeze(0), use_cache=False)
                for layer, (q, k, _) in self.reader.seen.items():
                    self.queries.add(layer, q, k)
                self.queries.windows += 1
        self.draw = torch.Generator("cpu").manual_seed(0)
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.shares: dict[str, list[list[float]]] = {name: [] for name in PREDICTORS}
        self.page_spread: list[list[float]] = []

    @torch.inference_mode()
    def score(self, ids: torch.Tensor) -> None:
        """One window through every design."""
        self.reader.prefix = None
        dense = self.model(ids.unsqueeze(0), use_cache=False).logits[0, PREFIX:]
        its = utilities(self.reader, self.queries, self.draw)
        exact = [(k[:, :PREFIX], v[:, :PREFIX]) for _, k, v in self.reader.seen.values()]
        prefix = Prefix(self.reader.coder, exact)
        self._predict(its)
        positions = torch.arange(PREFIX, len(ids), device=ids.device).unsqueeze(0)
        done: list[tuple[CodedPrefix, Predictions]] = []
        for row, grades, of, used in tqdm(list(self._designs(its)), unit="run", leave=False):
            coded = CodedPrefix(prefix, grades, of)
            scores = next((scores for other, scores in done if coded.same(other)), None)
            if scores is None:
                self.reader.prefix = coded
                out = self.model(ids[None, PREFIX:], position_ids=positions, use_cache=False)
                scores = compare(ids[PREFIX:], dense, out.logits[0])
                done.append((coded, scores))
            mine = self.rows.setdefault((row.budget, row.design, row.utility), row)
            mine.windows.append(scores)
            mine.bytes_used.append(used)

    def _predict(self, its: dict[str, torch.Tensor]) -> None:
        """Adds what each utility foresees of a window."""
        future, pages = its["oracle"][..., PAGE:], by_page(its["oracle"])
        ordered = pages.sort().values
        self.page_spread.append([float(ordered[0]), float(ordered.median()), float(ordered[-1])])
        for name in PREDICTORS:
            tokens = captured(its[name][..., PAGE:], future)
            by_head = (tokens / future.sum(-1)).mean()
            best = captured(by_page(its[name]), pages) / pages.sum()
            self.shares[name].append(
                [float(x) for x in (by_head, tokens.sum() / future.sum(), best)]
            )

    def _designs(
        self, its: dict[str, torch.Tensor]
    ) -> Iterable[tuple[Row, Sequence[Grade], torch.Tensor, float]]:
        """Every row with the grades, and how much of its budget it takes."""
        shape, device = its["oracle"].shape, its["oracle"].device
        names = [level.name for level in LEVELS]
        grades: list[Grade] = [LEVEL[name] for name in names]
        for place, name in enumerate(names):
            yield Row(name, "uniform", "none"), grades, torch.full(shape, place), 1.0
        pages = {name: by_page(its[name]) for name in self.page_utilities}
        if "random" in pages:  # by_page of noise is all the same: the oracle's, out of order
            shuffled = torch.randperm(PAGES, generator=self.draw, device="cpu")
            pages["random"] = by_page(its["oracle"])[shuffled]
        sizes = [page_bytes(grade, self.d) for grade in grades]
        for budget, mixed in PAGE_COUNTS.items():
            most = PAGES * sizes[names.index(budget)]
            places = torch.tensor([names.index(name) for name, _ in mixed])
            for name, utility in pages.items():
                halves = places[ranked(utility, [count for _, count in mixed]).cpu()].tolist()
                loss = utility.double().unsqueeze(-1).cpu() * torch.tensor(distortions(LEVELS))
                least = cheapest(loss, sizes, most)
                for design, chosen in (("halves", halves), ("lagrangian", least)):
                    of = torch.tensor([names.index(budget), *chosen], device=device)
                    of = of.repeat_interleave(PAGE)
                    used = sum(sizes[level] for level in chosen) / most
                    yield Row(budget, design, name), grades, of.expand(shape), used
        for budget, designs in TOKEN_COUNTS.items():
            whole = page_bytes(LEVEL[budget], self.d)
            same = (PAGE // 2, LEVEL[budget]), (PAGE // 2, LEVEL[budget])
            for counts in (*designs, same):
                grades = [grade for _, grade in counts]
                for name in self.token_utilities if counts != same else ("oracle",):
                    if name == "random" and None in grades:
                        continue  # nobody would
                    slices = its[name].unflatten(-1, (-1, PAGE))
                    of = ranked(slices, [count for count, _ in counts]).flatten(2)
                    used = mixed_bytes(counts, self.d) / whole
                    yield Row(budget, name_of(counts), name), grades, of, used

    def result(self) -> dict[str, Any]:
        """Of the windows scored so far."""
        rows = []
        for row in self.rows.values():
            uniform = self.rows[row.budget, "uniform", "none"].kl_windows()
            kl = row.kl_windows()
            same = torch.cat([its.same for its in row.windows])
            rows.append(
                {
                    "budget": row.budget,
                    "design": row.design,
                    "utility": row.utility,
                    "bytes": rounded(sum(row.bytes_used) / len(kl)),
                    "kl_mean": rounded(sum(kl) / len(kl)),
                    "same_top1": rounded(same.mean()),
                    "change": rounded(sum(kl) / sum(uniform) - 1),
                    "change_windows": [rounded(x / y - 1) for x, y in zip(kl, uniform)],
                    "kl_windows": [rounded(x) for x in kl],
                }
            )
        measures = "tokens_by_head", "tokens", "pages"
        prediction = [
            {"utility": name, **dict(zip(measures, map(rounded, torch.tensor(x).mean(0))))}
            for name, x in self.shares.items()
        ]
        spread = torch.tensor(self.page_spread).mean(0)
        return {
            "prediction": prediction,
            "page_mass": dict(zip(("least", "median", "most"), map(rounded, spread))),
            "rows": rows,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8, help="scored (default: 8)")
    parser.add_argument(
        "--learn", type=int, default=4, help="the text's last, for frames and queries (default: 4)"
    )
    parser.add_argument("--learn-text", type=Path, help="learn from the last of this instead")
    utilities: dict[str, Any] = {"nargs": "*", "choices": PREDICTORS}
    parser.add_argument("--page-utilities", default=PAGE_UTILITIES, **utilities)
    parser.add_argument("--token-utilities", default=TOKEN_UTILITIES, **utilities)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with inputs.usable_device(args.device):
        study = Study(args)
        for ids in tqdm(study.scored, unit="window"):
            study.score(ids)
            result = study.result()
            result |= {"model": args.model.resolve().name, "text": args.text.name}
            save(args.json, result | {"windows": len(result["rows"][0]["kl_windows"])})
    for its in result["prediction"]:
        print(its)
    for row in result["rows"]:
        print(
            f"{row['budget']:5s} {row['utility']:12s} {row['bytes']:.3f}  KL {row['kl_mean']:.5f} "
            f"{row['change']:+.0%} [{min(row['change_windows']):+.0%} "
            f"{max(row['change_windows']):+.0%}]  {row['design']}"
        )


if __name__ == "__main__":
    main()
