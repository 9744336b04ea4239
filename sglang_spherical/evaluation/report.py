"""The JSON file, the table and the plot of an evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TIERS = ("hot", "warm", "cold")
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


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Replaces `path` at once, so that a reader or an interrupt never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as aligned columns; a run without a figure has a dash."""
    rows = [[title for title, _, _ in COLUMNS]]
    for run in runs:
        rows.append([form.format(run[key]) if key in run else "-" for _, key, form in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:]))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


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
    for run in coded:
        change = f": perplexity {run['ppl_change']:+.2%}" if run in ours else ""
        at = run["bits_per_value"], run["kl_mean"]
        label = f"{run['name']}{change}"
        axes.annotate(label, at, xytext=(7, 5), textcoords="offset points", fontsize=8)
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
