"""Tables and plots of `prefix_sharing.py` and `multi_turn.py`.

usage: python benchmarks/sharing_report.py RESULT.json ... [--json OUT] [--plot OUT.png]

Several results are joined, as of servers that ran side by side, each on a GPU of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {"spherical": "tab:blue", "hot": "tab:red", "bf16": "tab:gray", "fp8": "tab:orange"}
TIER_MAP = "plasma"


def table(rows: list[Row]) -> str:
    """Markdown: a line per workload and working set, the servers side by side."""
    servers = list(dict.fromkeys(row["server"] for row in rows))
    heads = [f"{server} {what}" for what in ("hit rate", "TTFT p50", "tok/s", "KL")
             for server in servers]  # fmt: skip
    lines = ["| workload | working set | " + " | ".join(heads) + " |"]
    lines.append("|---" * (2 + len(heads)) + "|")
    cells = {(row["workload"], row["working_set"], row["server"]): row for row in rows}
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    pairs = {key[:2] for key in cells}
    for workload, working_set in sorted(
        pairs, key=lambda pair: (workloads.index(pair[0]), pair[1])
    ):
        line = [workload, f"{working_set:g}×"]
        for key, form in (
            ("token_hit_rate", "{:.1%}"),
            ("ttft_p50_ms", "{:.0f} ms"),
            ("output_tok_s", "{:.1f}"),
            ("kl_mean", "{:.4f}"),
        ):
            for server in servers:
                value = cells.get((workload, working_set, server), {}).get(key)
                line.append("–" if value is None else form.format(value))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """By workload, one column each: hit rate, TTFT, and the tiers over time of the largest run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    workloads = list(dict.fromkeys(row["workload"] for row in found["rows"]))
    size = 4 * len(workloads) + 1, 9.5
    figure, axes = plt.subplots(3, len(workloads), figsize=size, squeeze=False)
    for column, workload in enumerate(workloads):
        rows = [row for row in found["rows"] if row["workload"] == workload]
        hits, ttft, tiers = axes[:, column]
        for server in dict.fromkeys(row["server"] for row in rows):
            mine = [row for row in rows if row["server"] == server]
            mine.sort(key=lambda row: row["working_set"])
            x = [row["working_set"] for row in mine]
            style = {"color": COLOURS[server], "marker": "o"}
            hits.plot(x, [100 * row["token_hit_rate"] for row in mine], label=server, **style)
            ttft.plot(x, [row["ttft_p50_ms"] for row in mine], label=f"{server} p50", **style)
            p99 = [row["ttft_p99_ms"] for row in mine]
            ttft.plot(x, p99, label=f"{server} p99", linestyle=":", **style)
        for axis in (hits, ttft):
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({row["working_set"] for row in rows}))
            axis.xaxis.set_major_formatter("{x:g}×")
            axis.set_xlabel("working set, in bf16 pools")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        hits.set(title=workload, ylabel="token hit rate, %", ylim=(-3, 103))
        ttft.set(ylabel="time to first token, ms", ylim=(0, None))
        _stack(tiers, found, workload)
    figure.suptitle(
        f"{found['run_id']}: {found['rows'][0]['kv_bytes'] / 2**20:.0f} MiB of KV memory"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def _stack(axis: Any, found: dict[str, Any], workload: str) -> None:
    """Cached tokens by tier in the run of the largest working set."""
    from matplotlib import colormaps

    runs = [run for run in found["tiers"] if run["workload"] == workload]
    if not runs:
        axis.axis("off")
        return
    run = max(runs, key=lambda run: run["working_set"])
    names = [name for name in run["samples"][0] if name != "seconds"]
    tokens = [[sample[name] / 1000 for sample in run["samples"]] for name in names]
    seconds = [sample["seconds"] for sample in run["samples"]]
    colours = [
        colormaps[TIER_MAP](0.9 - 0.8 * i / max(len(names) - 1, 1)) for i in range(len(names))
    ]
    axis.stackplot(seconds, tokens, labels=names, colors=colours)
    pool = found["settings"]["pool_tokens"] / 1000
    axis.axhline(pool, color=COLOURS["bf16"], linestyle="--", label="bf16 pool")
    axis.set(xlabel="seconds", ylabel="thousand tokens by tier")
    axis.set_title(f"spherical at {run['working_set']:g}×", fontsize=10)
    axis.legend(fontsize=8, loc="upper left")


def join(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of one benchmark with the same settings as one: rows and tiers after each other.

    Raises ValueError where the settings differ.
    """
    first = results[0]
    for other in results[1:]:
        if other["settings"] != first["settings"] or other["model"] != first["model"]:
            raise ValueError(f"{other['run_id']}: its settings are not those of {first['run_id']}")
    if len(results) == 1:
        return first
    lists = {key: [x for found in results for x in found[key]] for key in ("rows", "tiers")}
    return {**first, "command": [found["command"] for found in results], **lists}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="the joined results")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    try:
        found = join([json.loads(path.read_text()) for path in args.results])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(table(found["rows"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
