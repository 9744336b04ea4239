"""Rate and distortion of page formats on a dumped window: what each choice of the format is worth.

usage: python benchmarks/format_study.py DUMP.npz [--every 5] [--json OUT.json] [--plot OUT.png]

DUMP.npz is that of key_fidelity.py. Of every fifth layer, keys are scored by the mean KL divergence
of attention (exact keys against coded ones), values by the relative error of attention's output
under exact probabilities, both together by the relative error of the output. Statistics come from
the window's first half, every eighth query of its second half is scored; the first 64 tokens, which
hold the sinks, are exact, all others are coded, from exact tokens unless a label says otherwise.

    runs      one codec each, the product's but for the choice that the group names
    heads     a pattern of its own for every head
    exact     first and newest tokens that stay exact
    by_layer  the product's warm and cold in every layer
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_codecs import Codec
from study_layers import TIERS, Layer, compare, exact_tokens, per_head, tiers_of
from study_runs import COLD, WARM, Run, name, runs
from tqdm import tqdm

from sglang_spherical.evaluation.scores import rounded

SIDES = ("keys", "values", "both")
WORST = 4
"""Layers shown of all: those that cold keys hurt most."""

MARKS = {
    "even pattern": "o",
    "odd pattern": "*",
    "bands of": "s",
    "water-filling": "^",
    "radius": "D",
    "levels": "x",
    "planes": "+",
}
CHOICES = "radius", "levels", "planes"
"""Groups of which the plot shows what starts from the product's patterns."""


def averaged(layers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The same rows of several layers as one: means of what is a float."""
    found = []
    for rows in zip(*layers):
        means = {
            k: rounded(sum(row[k] for row in rows) / len(rows))
            for k, x in rows[0].items()
            if isinstance(x, float)
        }
        found.append(rows[0] | means)
    return found


def report(found: list[dict[tuple[str, str, str], float]], study: list[Run], d: int) -> list[Any]:
    """Rows of the study, distortions averaged over the layers measured."""
    codecs: dict[tuple[str, str], Run] = {(run.group, run.label): run for run in study}
    rows = []
    for key in found[0]:
        side, group, label = key
        figures = [layer[key] for layer in found]
        row: dict[str, Any] = {"side": side, "group": group, "label": label}
        if side == "both":
            halves = [Codec(tuple(map(int, bits.split("-")))) for bits in label.split()]
            row["code_bits"] = sum(c.code_bits() for c in halves) / 2
            row["counted_bits"] = rounded(sum(c.counted_bits(d) for c in halves) / 2)
        else:
            run = codecs[group, label]
            row["code_bits"] = run.codec.code_bits()
            row["counted_bits"] = rounded(run.codec.counted_bits(d))
            row["codec"] = asdict(run.codec)
        row["kl" if side == "keys" else "output_error"] = rounded(sum(figures) / len(figures))
        row["layers"] = [rounded(figure) for figure in figures]
        rows.append(row)
    return rows


def show(found: dict[str, Any]) -> None:
    """The report's tables."""
    show_runs(found["runs"])
    print("keys, a pattern per head: chosen, and the best there is")
    for row in found["heads"]:
        print(
            f"  {row['bits']} bits, {row['among']:18}{row['chosen']:>11.5f}{row['oracle']:>11.5f}"
        )
    print("exact tokens: keys' KL, values' error, error of both")
    for row in found["exact"]:
        label = f"{row['tier']}, first {row['first']}, newest {row['newest']}"
        print(f"  {label:32}{row['kl']:>11.5f}{row['output_error']:>11.4f}{row['both']:>11.4f}")
    print("layers: largest key, and around the centre; by tier keys' KL, error of both")
    layers = found["by_layer"]
    for row in sorted(layers, key=lambda r: -r["cold"]["kl"])[:WORST]:
        sizes = f"{row['largest_key']:>9.1f}{row['largest_centred_key']:>9.1f}"
        tiers = "".join(f"{row[t]['kl']:>11.5f}{row[t]['both']:>9.4f}" for t in TIERS)
        print(f"  {row['layer']:>3}{sizes}{tiers}")
    means = "".join(
        f"{sum(r[t][what] for r in layers) / len(layers):>{width}.{digits}f}"
        for t in TIERS
        for what, width, digits in (("kl", 11, 5), ("both", 9, 4))
    )
    print(f"  mean of all          {means}")


def show_runs(rows: list[dict[str, Any]]) -> None:
    """Keys and values side by side; K:V splits below."""
    sides = {s: {(r["group"], r["label"]): r for r in rows if r["side"] == s} for s in SIDES}
    print(f"{'':34}{'codes':>7}{'counted':>9}{'keys: KL':>11}{'values: error':>15}")
    group = ""
    for key, row in sides["keys"].items():
        if row["group"] != group:
            group = row["group"]
            print(group)
        error = sides["values"][key]["output_error"]
        bits = f"{row['code_bits']:>7.2f}{row['counted_bits']:>9.3f}"
        print(f"  {row['label']:32}{bits}{row['kl']:>11.5f}{error:>15.4f}")
    print("keys and values: error of the output")
    for row in sorted(sides["both"].values(), key=lambda r: (r["code_bits"], r["output_error"])):
        bits = f"{row['code_bits']:>7.2f}{row['counted_bits']:>9.3f}"
        print(f"  {row['label']:32}{bits}{row['output_error']:>26.4f}")


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Distortion (log) against counted bits; one panel per side. Rings: the product."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for place, (axes, measure) in enumerate(zip(panels, ("kl", "output_error"))):
        mine = [r for r in rows if r["side"] == SIDES[place]]
        ours = [name(WARM[place]), name(COLD[place])]
        for group, mark in MARKS.items():
            shown = [r for r in mine if r["group"].startswith(group)]
            if group in CHOICES:
                shown = [r for r in shown if r["label"].split()[0] in ours]
            at = [r["counted_bits"] for r in shown], [r[measure] for r in shown]
            axes.plot(*at, mark, label=group, alpha=0.7, ms=5)
        patterns = [r for r in mine if r["group"].endswith("pattern")]
        product = [r for r in patterns if r["label"] in ours]
        at = [r["counted_bits"] for r in product], [r[measure] for r in product]
        axes.plot(*at, "o", mfc="none", mec="k", ms=12, label="product")
        label_points(axes, [(r["counted_bits"], r[measure], r["label"]) for r in patterns])
        axes.set_yscale("log")
        axes.set_xlabel("bits per value: codes, radii, header")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("keys: mean KL of attention [nat]")
    panels[1].set_ylabel("values: relative error of attention's output")
    panels[1].legend(fontsize=8)
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def label_points(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Labels beside points (x, y, label), left and right in turn so that they stay apart."""
    for place, (x, y, label) in enumerate(sorted(points)):
        side = "left" if place % 2 else "right"
        shift = (7 if place % 2 else -7), -2
        axes.annotate(label, (x, y), shift, textcoords="offset points", ha=side, size=6)


def main() -> int:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("dump", type=Path)
    parser.add_argument("--every", type=int, default=5, help="of how many layers one is measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if not args.dump.is_file():
        print(f"error: {args.dump}: no such file", file=sys.stderr)
        return 2
    with np.load(args.dump) as dump:
        q, k, v = (torch.from_numpy(dump[which]) for which in "qkv")
    study, d = runs(k.shape[-1]), k.shape[-1]
    compared, heads, exact, by_layer = [], [], [], []
    with torch.inference_mode():
        for number in tqdm(range(len(k)), unit="layer"):
            layer = Layer.of(q[number], k[number], v[number])
            by_layer.append(tiers_of(layer, number))
            if number % args.every == 0:
                compared.append(compare(layer, study))
                heads.append(per_head(layer))
                exact.append(exact_tokens(layer))
    found = {
        "dump": args.dump.name,
        "every": args.every,
        "layers": len(compared),
        "head_dim": d,
        "runs": report(compared, study, d),
        "heads": averaged(heads),
        "exact": averaged(exact),
        "by_layer": by_layer,
    }
    title = f"{args.dump.name}: {len(compared)} layers of {k.shape[1]} KV heads, d = {d}"
    print(title)
    show(found)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot is not None:
        plot(args.plot, found["runs"], title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
