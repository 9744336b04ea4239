"""The JSON file, the table and the plot of an evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sglang_spherical.config import TIERS

COLUMNS = (
    ("run", "name", "{}"),
    ("bits/value", "bits_per_value", "{:.2f}"),
    ("perplexity", "ppl", "{:.4f}"),
    ("change", "ppl_change", "{:+.2%}"),
    ("KL mean", "kl_mean", "{:.5f}"),
    ("median", "kl_median", "{:.5f}"),
    ("p99", "kl_p99", "{:.4f}"),
    ("same top-1", "same_top1", "{:.2%}"),
    ("attention KL", "attention_kl", "{:.5f}"),
    ("value error", "value_error", "{:.2%}"),
)

NEAR_BITS, NEAR_KL = 0.5, 1.5
"""Points of the plot closer than this, in bits and as a ratio of divergences, are labelled once."""


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Replaces `path` at once, so that a reader or an interrupt never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as an aligned Markdown table; a run without a figure has a dash."""
    rows = [[title for title, _, _ in COLUMNS]]
    for run in runs:
        rows.append([form.format(run[key]) if key in run else "-" for _, key, form in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _clusters(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs so near each other in the plot that they share a label, upper ones first."""
    clusters: list[list[dict[str, Any]]] = []
    for run in sorted(runs, key=lambda run: -run["kl_mean"]):
        for near in clusters:
            bits = abs(near[-1]["bits_per_value"] - run["bits_per_value"])
            if bits < NEAR_BITS and near[-1]["kl_mean"] < NEAR_KL * run["kl_mean"]:
                near.append(run)
                break
        else:
            clusters.append([run])
    return clusters


def _names(runs: list[dict[str, Any]]) -> str:
    names = [run["name"] for run in runs]
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} to {names[-1]} ({len(names)})"


def plot(path: Path, report: dict[str, Any]) -> None:
    """Divergence of next-token predictions (log) against bits per value, one point per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    coded = [run for run in report["runs"] if run["kl_mean"] > 0]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    ours = [run for run in coded if run["name"] in TIERS]
    for runs, style in (ours, "o-"), ([run for run in coded if run not in ours], "x"):
        axes.plot([run["bits_per_value"] for run in runs], [run["kl_mean"] for run in runs], style)
    labels = [([run], f"{run['name']}: perplexity {run['ppl_change']:+.2%}") for run in ours]
    labels += [(near, _names(near)) for near in _clusters([r for r in coded if r not in ours])]
    for runs, label in labels:
        at = runs[0]["bits_per_value"], runs[0]["kl_mean"]
        offset = (7, -11) if runs[0] in ours else (7, 5)
        axes.annotate(label, at, xytext=offset, textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlim(0, max(run["bits_per_value"] for run in coded) * 1.45)
    axes.set_ylim(top=max(run["kl_mean"] for run in coded) * 3)
    axes.set_xlabel("bits per cached value, all counted (dense: 16)")
    axes.set_ylabel("mean KL of next-token distributions [nat]")
    axes.set_title(f"{report['model']}, {report['windows']} windows of {report['text']}", size=10)
    axes.grid(alpha=0.3, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
