"""Tables and a plot of what `run.py` measured.

usage: python benchmarks/report.py RESULT.json [--plot OUT.png]

Prints Markdown: every row beside its peers, ratios in brackets. The plot has two parts: the share
of the copy bandwidth by bytes read, which a roof of 1 bounds, and the time of the warm rows by
tokens read, of one request and of several; its slope is what a token costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PEERS = {
    "flashinfer_bf16_us": "FlashInfer bf16",
    "flashinfer_fp8_us": "FlashInfer fp8",
    "sglang_triton_us": "SGLang Triton bf16",
}
COLOURS = {
    "hot": "tab:red", "warm": "tab:orange", "cold": "tab:blue", "mixed": "tab:green",
    "random": "tab:purple",
}  # fmt: skip
Row = dict[str, Any]


def shape_name(row: Row) -> str:
    """Batch, context, heads and head dimension, for people."""
    shape = row["shape"]
    context = shape["context"]
    size = f"{context // 1024}K" if context % 1024 == 0 else str(context)
    heads = f"{shape['kv_heads']} × {shape['group']}"
    return f"{shape['batch']} × {size}, {heads} heads, d={shape['head_dim']}"


def peer_cell(row: Row, peer: str) -> str:
    """A peer's time, and in brackets how many times ours it is."""
    if not row.get(peer):
        return "–"
    return f"{row[peer]:.1f} ({row[peer] / row['ours_us']:.2f}×)"


def markdown(rows: list[Row]) -> str:
    timed = {key: name for key, name in PEERS.items() if any(row.get(key) for row in rows)}
    head = ["batch × context", "tier", "µs", "of copy", *timed.values(), "max error", "rms error"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [shape_name(row), row["tier"], f"{row['ours_us']:.1f}"]
        cells.append(f"{row['fraction_of_copy']:.3f}")
        cells += [peer_cell(row, peer) for peer in timed]
        cells += [f"{row['max_error']:.1e}", f"{row['rms_error']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """The roof and the slope, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (roof, slope) = plt.subplots(1, 2, figsize=(11, 4.2))
    for tier, colour in COLOURS.items():
        mine = [row for row in found["rows"] if row["tier"] == tier]
        if not mine:
            continue
        sizes = [row["bytes"] / 1e6 for row in mine]
        fractions = [row["fraction_of_copy"] for row in mine]
        roof.scatter(sizes, fractions, color=colour, label=tier)
    roof.axhline(1.0, color="black", linewidth=0.8)
    roof.set(xscale="log", xlabel="megabytes read", ylabel="of copy bandwidth", ylim=(0, 1.05))
    roof.set_title(f"{found['device']}: copy {found['copy_gb_s'] / 1000:.2f} TB/s", fontsize=10)
    roof.legend()
    warm = [row for row in found["rows"] if row["tier"] == "warm" and _usual(row["shape"])]
    warm.sort(key=_tokens)
    for key, name in {"ours_us": "ours, warm", **PEERS}.items():
        known = [row for row in warm if row.get(key)]
        if not known:
            continue
        alone = [row for row in known if row["shape"]["batch"] == 1]
        several = [row for row in known if row["shape"]["batch"] > 1]
        (line,) = slope.plot(
            [_tokens(row) / 1024 for row in alone], [row[key] for row in alone],
            marker="o", label=name,
        )  # fmt: skip
        slope.scatter(
            [_tokens(row) / 1024 for row in several], [row[key] for row in several],
            color=line.get_color(), marker="x",
        )  # fmt: skip
    slope.set(xscale="log", yscale="log", xlabel="thousand tokens read", ylabel="µs of a layer")
    slope.set_title("8 KV heads × 4, d = 128 (lines: one request, crosses: more)", fontsize=10)
    slope.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _tokens(row: Row) -> int:
    return int(row["shape"]["batch"] * row["shape"]["context"])


def _usual(shape: dict[str, int]) -> bool:
    return (shape["kv_heads"], shape["group"], shape["head_dim"]) == (8, 4, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = json.loads(args.result.read_text())
    print(f"{found['device']}, copy {found['copy_gb_s']:.0f} GB/s; `{found['command']}`\n")
    print(markdown(found["rows"]))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
