"""Rate and distortion of page formats on a dumped window: what each choice of the format is worth.

usage: python benchmarks/format_study.py DUMP.npz [--every 5] [--json OUT.json] [--plot OUT.png]

DUMP.npz is that of key_fidelity.py. Of every fifth layer, keys are scored by the mean KL divergence
of attention (exact keys against coded ones), values by the relative error of attention's output
under exact probabilities, both together by the relative error of the output. Statistics come from
the window's first half, every eighth query of its second half is scored; the first 64 tokens, which
hold the sinks, are exact, all others are coded.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_codecs import RADIUS_BITS, Codec, Head
from tqdm import tqdm

from sglang_spherical.evaluation.attention import SAMPLE_EVERY, causal_attention
from sglang_spherical.evaluation.scores import kl_divergence, rounded

EXACT_TOKENS = 64
SINK_TOKENS = 4
AVERAGES = (4.0, 3.0, 2.5, 2.0, 1.5)
PATTERNS = (
    *((6, 4, 4, 2), (4, 4, 4, 4), (8, 4, 2, 2), (6, 4, 2, 2), (6, 4, 4, 0), (4, 4, 2, 2)),
    *((6, 4, 2, 0), (4, 2, 2, 2), (4, 4, 2, 0), (4, 2, 2, 0), (2, 2, 2, 2), (4, 4, 0, 0)),
    *((4, 2, 0, 0), (2, 2, 2, 0)),
)
ODD_PATTERNS = (
    *((5, 4, 4, 3), (5, 5, 3, 3), (4, 4, 4, 3), (4, 4, 3, 3), (4, 3, 3, 2), (5, 3, 3, 1)),
    *((3, 3, 3, 3), (4, 3, 2, 1), (3, 3, 2, 2), (3, 2, 2, 1), (3, 3, 1, 1), (2, 2, 1, 1)),
)
BASES = (Codec((6, 4, 4, 2)), Codec((4, 4, 4, 4)), Codec((4, 2, 2, 2)), Codec((2, 2, 2, 2)))
SPLITS = ((5, 4, 4, 3), (4, 4, 4, 4), (4, 3, 3, 2), (4, 2, 2, 2), (2, 2, 2, 2), (3, 2, 2, 1))


@dataclass(frozen=True)
class Run:
    """A codec in its part of the study. `after`: what the tokens have been through before."""

    group: str
    label: str
    codec: Codec
    after: Codec | None = None


def runs(d: int) -> list[Run]:
    """All parts of the study that look at one side alone."""
    found = [Run("pattern", name(bits), Codec(bits)) for bits in PATTERNS]
    found += [Run("odd pattern", name(bits), Codec(bits)) for bits in ODD_PATTERNS]
    found += widths(d) + choices() + planes() + cheaper()
    return found


def name(bits: tuple[int, ...]) -> str:
    return "-".join(map(str, bits))


def widths(d: int) -> list[Run]:
    """Bands of 16, 32 and 64 channels, with a radius each: patterns, and water-filling."""
    found = []
    for width in (w for w in (16, 32, 64, 128) if w <= d):
        count = d // width
        patterns = [b.bits for b in BASES if b.bits] if count >= 4 else []
        patterns += [(6, 2), (4, 4), (4, 2), (4, 0), (2, 2)] if count == 2 else []
        patterns += [(4,), (2,)] if count == 1 else []
        for bits in patterns:
            spread = tuple(b for b in bits for _ in range(max(count // 4, 1)))
            found.append(Run(f"bands of {width}", name(bits), Codec(spread)))
        for average in AVERAGES if count > 1 else ():
            codec = Codec(average=average, bands=count)
            found.append(Run(f"water-filling, bands of {width}", f"{average:g}", codec))
    return found


def choices() -> list[Run]:
    """One choice at a time, beside the product's."""
    found = []
    changes: tuple[tuple[str, tuple[dict[str, Any], ...]], ...] = (
        ("page", tuple({"page": page} for page in (16, 32, 64, 128))),
        ("weight", tuple({"weight": weight} for weight in ("sqrt", "gain", "none"))),
        ("step", ({"step": "search"}, {"step": "gaussian"})),
        ("radius", tuple({"radius": r} for r in RADIUS_BITS)),
        (
            "shared radii",
            tuple({"radii": n, "radius": r} for n in (2, 1) for r in ("log8", "log4")),
        ),
        ("centroid", tuple({"centroid": c} for c in ("bf16", "coded", "coded4", "none"))),
        ("levels", tuple({"levels": x} for x in ("uniform", "lloyd", "pair", "polar"))),
    )
    for group, options in changes:
        for change in options:
            for base in BASES:
                uneven = base.bits is not None and len(set(base.bits)) > 1
                if change.get("levels") in ("pair", "polar") and uneven:
                    continue
                label = " ".join(map(str, change.values()))
                found.append(
                    Run(group, f"{name(base.bits or ())} {label}", replace(base, **change))
                )
    return found


def planes() -> list[Run]:
    """Two bits less: dropped in place, or coded anew."""
    found = []
    for fine, coarse in (((6, 4, 4, 2), (4, 2, 2, 0)), ((4, 4, 4, 4), (2, 2, 2, 2))):
        for levels in ("dropped", "refitted"):
            codec = Codec(coarse, levels=levels)
            found.append(Run("planes", f"{name(coarse)} {levels}", codec))
        found.append(Run("planes", f"{name(coarse)} coded anew", Codec(coarse), Codec(fine)))
        found.append(Run("planes", f"{name(coarse)} from exact", Codec(coarse)))
    return found


def cheaper() -> list[Run]:
    """Patterns with fewer and smaller radii and a 4-bit centroid, by counted bits."""
    patterns = ((5, 4, 4, 3), (4, 4, 4, 4), (4, 3, 3, 2), (4, 2, 2, 2))
    patterns += ((3, 3, 2, 2), (3, 2, 2, 1), (2, 2, 2, 2))
    radii = ((0, "e4m4"), (0, "e3m3"), (0, "e2m2"), (2, "e3m3"), (2, "e2m2"), (1, "log8"))
    found = []
    for bits in patterns:
        for count, radius in radii:
            codec = Codec(bits, radii=count, radius=radius, centroid="coded4")
            found.append(Run("cheaper", f"{name(bits)} {count or 4} {radius}", codec))
    for bits, radius in (((4, 4), "e3m3"), ((2, 2), "e3m3"), ((4,), "log8"), ((2,), "log8")):
        codec = Codec(bits, radius=radius, centroid="coded4")
        found.append(Run("cheaper", f"{name(bits)} own {radius}", codec))
    return found


@dataclass(frozen=True)
class Layer:
    """One layer of the dump, and what its exact attention gives.

    q [kv_heads, group, queries, d] scaled; k, v [kv_heads, tokens, d]; p [.., queries, tokens]
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: Head
    values: Head
    p: torch.Tensor
    out: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Layer:
        """From the dump: q [q_heads, tokens, d], k and v [kv_heads, tokens, d]."""
        q, k, v = q.float(), k.float(), v.float()
        half = k.shape[1] // 2
        q = q.unflatten(0, (len(k), -1))
        gain = q[:, :, SINK_TOKENS:half].square().mean((1, 2)).sqrt() + 1e-6
        q = q[:, :, half:] * k.shape[-1] ** -0.5
        p = causal_attention(q, k, SAMPLE_EVERY)
        sides = [statistics(k, gain), statistics(v, torch.ones_like(gain))]
        return cls(q, k, v, *sides, p, p @ v.unsqueeze(1))

    def keys_read(self, codec: Codec, after: Codec | None) -> torch.Tensor:
        """Probabilities with coded keys."""
        return causal_attention(self.q, coded(self.k, self.keys, codec, after), SAMPLE_EVERY)

    def values_read(self, codec: Codec, after: Codec | None) -> torch.Tensor:
        return coded(self.v, self.values, codec, after)

    def output_error(self, p: torch.Tensor, v: torch.Tensor) -> float:
        """Relative error of attention's output."""
        return float((p @ v.unsqueeze(1) - self.out).norm() / self.out.norm())


def statistics(x: torch.Tensor, gain: torch.Tensor) -> Head:
    """What a calibrated frame rests on, from the first half of x [kv_heads, tokens, d]."""
    seen = x[:, : x.shape[1] // 2]
    pages = seen[:, EXACT_TOKENS:].unflatten(1, (-1, 64))
    spread = (pages - pages.mean(2, keepdim=True)).square().mean((1, 2)).sqrt() + 1e-6
    return Head(seen[:, SINK_TOKENS:].mean(1), gain, spread)


def coded(x: torch.Tensor, head: Head, codec: Codec, after: Codec | None) -> torch.Tensor:
    if after is not None:
        x = coded(x, head, after, None)
    read = codec.code(x, head)
    read[:, :EXACT_TOKENS] = x[:, :EXACT_TOKENS]
    return read


def measure(layer: Layer, study: list[Run]) -> dict[tuple[str, str, str], float]:
    """Distortion in one layer by (side, group, label)."""
    found: dict[tuple[str, str, str], float] = {}
    known: dict[tuple[Codec, Codec | None], tuple[float, float]] = {}
    for run in study:
        key = run.codec, run.after
        if key not in known:
            divergence = kl_divergence(layer.p, layer.keys_read(*key)).mean()
            known[key] = (
                float(divergence),
                layer.output_error(layer.p, layer.values_read(*key)),
            )
        for side, figure in zip(("keys", "values"), known[key]):
            found[side, run.group, run.label] = figure
    values = {bits: layer.values_read(Codec(bits), None) for bits in SPLITS}
    for keys in SPLITS:
        p = layer.keys_read(Codec(keys), None)
        for bits, v in values.items():
            found["both", "split", f"{name(keys)} {name(bits)}"] = layer.output_error(p, v)
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


def show(rows: list[dict[str, Any]]) -> None:
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


SIDES = ("keys", "values", "both")
MARKS = {
    "pattern": "o",
    "odd pattern": "*",
    "bands of": "s",
    "water-filling": "^",
    "cheaper": "D",
    "levels": "x",
    "planes": "+",
}


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Distortion (log) against counted bits; one panel per side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes, side, measure in zip(panels, SIDES, ("kl", "output_error")):
        for group, mark in MARKS.items():
            mine = [r for r in rows if r["side"] == side and r["group"].startswith(group)]
            at = [r["counted_bits"] for r in mine], [r[measure] for r in mine]
            axes.plot(*at, mark, label=group, alpha=0.7, ms=5)
            for row in mine if group.endswith("pattern") else ():
                where = row["counted_bits"], row[measure]
                axes.annotate(
                    row["label"], where, xytext=(4, 3), textcoords="offset points", size=7
                )
        axes.set_yscale("log")
        axes.set_xlabel("bits per value: codes, radii, header")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("keys: mean KL of attention [nat]")
    panels[1].set_ylabel("values: relative error of attention's output")
    panels[1].legend(fontsize=8)
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
        q, k, v = (torch.from_numpy(dump[which])[:: args.every] for which in "qkv")
    study, d = runs(k.shape[-1]), k.shape[-1]
    with torch.inference_mode():
        layers = tqdm(zip(q, k, v), total=len(k), unit="layer")
        found = [measure(Layer.of(*layer), study) for layer in layers]
    rows = report(found, study, d)
    title = f"{args.dump.name}: {len(k)} layers of {k.shape[1]} KV heads, d = {d}"
    print(title)
    show(rows)
    if args.json is not None:
        head = {"dump": args.dump.name, "every": args.every, "layers": len(k), "head_dim": d}
        args.json.write_text(json.dumps(head | {"runs": rows}, indent=1) + "\n")
    if args.plot is not None:
        plot(args.plot, rows, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
