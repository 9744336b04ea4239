"""Needles and quotations over a coded haystack, without a server: how sure is each answer?

usage: python benchmarks/needle_margins.py --model DIR --text FILE --frames FILE
       [--runs hot warm cool cold] [--lengths 2048 4096] [--haystacks 4] [--device cpu] [--json OUT]

The items of `probes.py` (`probe_items.py`; no chains of variables, which no model here follows), 12
in each haystack. A haystack is computed densely; its pages are then lowered in the codec that
writes the server's, but for the first one and the newest 256 tokens of haystack and question. The
answer is given token by token behind the question, both exact. An item is *found* when each token
of the answer is the most likely one, so that greedy decoding would say it; its *margin* is the
least difference, over these tokens, between the answer's logit and the best other one. Other runs
are asked what the dense one finds: as much of the text should not be in the calibration file's.

Runs are given by name:

    hot, warm, cool, cold, frozen   a tier, coded from the one before it among these: all of them
                                    for pages that have gone through all, one alone for what
                                    `--spherical-budget` does
    cold:keys, cold:values          one side of it, the other one hot
    2.5bits, 3bits+hot, ...         every (layer, KV head, side) in a pattern of its own, of the
                                    least distortion for so many bits per value (codes, radii,
                                    headers); `+hot`: hot codes are one of the patterns
    bf16, fp8                       a dense cache of these floats: what rounding alone loses

Patterns per head are those of the calibration file's distortions; --alike leaves them out of tiers.

    runs{}   bits_per_value; by kind and of all: asked, found; of what dense finds, the rms of what
             the run adds to margins, and the mean log probability of an answer's tokens, in nat
    items[]  kind, length, depth, question, expected, runs {run: {margin, logp}}
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import probe_items
import torch
from client import save
from needle_reader import CachedHaystack, HaystackReader
from needle_runs import DENSE, PAGE, Form, forms
from probe_items import Encode, Haystack, Item
from probes import load_encode
from tqdm import tqdm

from sglang_spherical import frame_file
from sglang_spherical.config import SphericalConfig
from sglang_spherical.evaluation import inputs
from sglang_spherical.evaluation.scores import rounded
from sglang_spherical.pool.choice import choose_kinds
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import PageLayout, default_levels

KINDS = "single", "multikey", "quote"
PER_HAYSTACK = 12
ALL = "all"


@dataclass(frozen=True)
class Answer:
    """How sure a run is of an answer, in nat: see the module."""

    margin: float
    logp: float


@dataclass
class Probe:
    """An item, and the runs' answers to it."""

    item: Item
    answers: dict[str, Answer] = field(default_factory=dict)  # by run

    def found(self, run: str) -> bool:
        return self.answers[run].margin > 0

    def shift(self, run: str) -> float:
        """What a run adds to the dense one's margin."""
        return self.answers[run].margin - self.answers[DENSE].margin


def make_haystacks(args: argparse.Namespace, encode: Encode) -> list[Haystack]:
    """As `probes.py` makes them. Raises ValueError on bad input."""
    for length in args.lengths:
        if length % PAGE:
            raise ValueError(f"--lengths {length}: expected a multiple of {PAGE}")
    prose = probe_items.Prose.read(args.text.read_text("utf-8", errors="replace"), encode)
    groups = [PER_HAYSTACK] * args.haystacks
    return [
        haystack
        for length in args.lengths
        for haystack in probe_items.make_haystacks(prose, encode, KINDS, length, groups, args.seed)
    ]


def prepare(args: argparse.Namespace) -> tuple[HaystackReader, dict[str, Form]]:
    """The model, and the runs. Raises ValueError on bad input."""
    known = frame_file.load(args.frames, frame_file.model_identity(args.model))
    model = inputs.load_model(args.model, args.dtype, args.device)
    layers, kv_heads, head_dim = inputs.cache_shape(model)
    frames = Frames(layers, kv_heads, head_dim, PAGE, args.device)
    frames.load(known.centre, known.gain, known.spread)
    levels = default_levels(SphericalConfig())
    layout = PageLayout.fit(PAGE, head_dim, layers, kv_heads, levels)
    if known.distortion is not None and not args.alike:
        layout = layout.with_kinds(choose_kinds(layout, known.distortion))
    return HaystackReader(model), forms(args.runs, frames, layout, known)


def answered(
    reader: HaystackReader, runs: dict[str, Form], encode: Encode, haystacks: Sequence[Haystack]
) -> Iterator[list[Probe]]:
    """The items of one haystack after the other, with the answers of all runs."""
    for haystack in haystacks:
        probes = [Probe(item) for item in haystack.items]
        exact = reader.take_in(haystack.tokens)
        for name, form in runs.items():
            cached = CachedHaystack(exact, form.cache)
            for probe in probes:
                if name == DENSE or probe.found(DENSE):
                    question = encode(f"\n\n{probe.item.question}")
                    answer = encode(f" {probe.item.expected}")
                    logits = reader.continued(cached, question, answer)
                    probe.answers[name] = judge(logits, torch.tensor(answer))
        yield probes


def judge(logits: torch.Tensor, answer: torch.Tensor) -> Answer:
    """logits [tokens, vocabulary] of an answer int64 [tokens]."""
    place = answer.unsqueeze(1)
    others = logits.scatter(1, place, -torch.inf).amax(1)
    margin = (logits.gather(1, place).squeeze(1) - others).min()
    logp = logits.log_softmax(-1).gather(1, place).mean()
    return Answer(rounded(margin), rounded(logp))


def summarise(probes: Sequence[Probe], runs: dict[str, Form]) -> dict[str, dict[str, Any]]:
    """By run, over what the dense one finds."""
    asked = [probe for probe in probes if probe.found(DENSE)]
    table: dict[str, dict[str, Any]] = {}
    for name, form in runs.items():
        row: dict[str, Any] = {"bits_per_value": rounded(form.bits)}
        for kind in (*KINDS, ALL):
            those = [probe for probe in asked if kind in (probe.item.kind, ALL)]
            row[kind] = {"asked": len(those), "found": sum(probe.found(name) for probe in those)}
        count = max(len(asked), 1)
        square = sum(probe.shift(name) ** 2 for probe in asked) / count
        row["shift_rms"] = rounded(square**0.5)
        row["logp"] = rounded(sum(probe.answers[name].logp for probe in asked) / count)
        table[name] = row
    return table


def shown(table: dict[str, dict[str, Any]]) -> str:
    heads = "".join(f"{head:>10}" for head in (*KINDS, ALL, "shift", "log p"))
    lines = [f"{'run':<14}{'bits':>6}{heads}"]
    for name, row in table.items():
        cells = [f"{row[kind]['found']}/{row[kind]['asked']}" for kind in (*KINDS, ALL)]
        cells += [f"{row['shift_rms']:.3f}", f"{row['logp']:.3f}"]
        line = "".join(f"{cell:>10}" for cell in cells)
        lines.append(f"{name:<14}{row['bits_per_value']:>6.2f}{line}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    encode = load_encode(args.model)
    haystacks = make_haystacks(args, encode)
    reader, runs = prepare(args)
    probes: list[Probe] = []
    for some in tqdm(
        answered(reader, runs, encode, haystacks), total=len(haystacks), unit="haystack"
    ):
        probes += some
    table = summarise(probes, runs)
    print(shown(table))
    items = [
        asdict(probe.item) | {"runs": {name: asdict(its) for name, its in probe.answers.items()}}
        for probe in probes
    ]
    settings = {"model": args.model.resolve().name, "text": args.text.name, "alike": args.alike}
    settings |= {"frames": args.frames.name, "seed": args.seed, "dtype": args.dtype}
    save(args.json, settings | {"runs": table, "items": items})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="prose for the haystacks, UTF-8")
    parser.add_argument("--frames", type=Path, required=True, help="calibration file")
    parser.add_argument("--alike", action="store_true", help="all heads of a tier alike")
    parser.add_argument("--runs", nargs="+", default=["hot", "warm", "cool", "cold"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--haystacks", type=int, default=4, help="of each length (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        with inputs.usable_device(args.device):
            run(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
