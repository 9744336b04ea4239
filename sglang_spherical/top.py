"""A live view of a spherical server's cache, from the server's own metrics.

The server must have been started with --kv-format spherical --enable-metrics. Rates are over the
last interval; with --once everything is a total since the server started.
"""

from __future__ import annotations

import argparse
import time
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang_spherical.config import TIERS
from sglang_spherical.metrics import PREFIX

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

TIMEOUT_SECONDS = 10.0
KEYS = ("tier", "from_tier", "to_tier", "trigger")
BAR_CELLS = 32
COLOURS = ("red", "dark_orange", "yellow3", "green3", "cyan", "blue", "magenta", "white")
"""Of the tiers, finest first; the last one is also that of free memory."""


@dataclass(frozen=True)
class Snapshot:
    """What a server said at one moment; counts of data-parallel ranks are summed.

    pages, bytes, hits, drops  by tier, finest first
    moves                      pages re-encoded or promoted, by (from, to) tier
    retention                  (calls, seconds) by trigger
    own                        some of SGLang's own gauges, by name
    """

    at_seconds: float
    page_size: int
    capacity_tokens: float
    free_tokens: float
    moved_bytes: float
    pages: dict[str, float]
    bytes: dict[str, float]
    hits: dict[str, float]
    drops: dict[str, float]
    moves: dict[tuple[str, str], float]
    retention: dict[str, tuple[float, float]]
    own: dict[str, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default="http://127.0.0.1:30000", help="the server's address; default: %(default)s"
    )
    parser.add_argument("--interval", type=float, default=1.0, help="seconds; default: %(default)s")
    parser.add_argument("--once", action="store_true", help="print totals once and end")


def run(args: argparse.Namespace) -> int:
    """Until interrupted, or once. Raises ValueError when the server does not tell what is shown."""
    if not args.interval > 0:
        raise ValueError(f"--interval {args.interval}: expected more than 0 seconds")
    from rich.console import Console
    from rich.live import Live

    now = read(args.url)
    if args.once:
        Console().print(view(args.url, now, None))
        return 0
    with Live(view(args.url, now, None), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(args.interval)
            before, now = now, read(args.url)
            live.update(view(args.url, now, before), refresh=True)


def read(url: str) -> Snapshot:
    """Asks a server. Raises ValueError, one line, when it is absent, silent or not spherical."""
    try:
        with urllib.request.urlopen(
            f"{url.rstrip('/')}/metrics", timeout=TIMEOUT_SECONDS
        ) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"--url {url}: /metrics says {error.code}: start the server with --enable-metrics"
        ) from None
    except (OSError, ValueError) as error:  # no such host, refused, timed out; not a URL
        reason = getattr(error, "reason", error)
        raise ValueError(f"--url {url}: no server answers there: {reason}") from None
    return parse(text, url)


def parse(text: str, url: str = "") -> Snapshot:
    """A snapshot from Prometheus's text format. Raises ValueError when nothing there is ours."""
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
    ranks: dict[str, set[str | None]] = defaultdict(set)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = sample.labels
                if labels.get("tp_rank", "0") == "0":  # the others of a group say the same
                    key = tuple(labels[name] for name in KEYS if name in labels)
                    sums[sample.name][key] += sample.value
                    ranks[sample.name].add(labels.get("dp_rank"))
    except ValueError as error:
        raise ValueError(f"--url {url}: no metrics of a server: {error}") from None
    if f"{PREFIX}capacity_tokens" not in sums:
        raise ValueError(
            f"--url {url}: the server there has no spherical cache: "
            "start one with --kv-format spherical --enable-metrics"
        )

    def one(name: str) -> float:
        return sums[name][()]

    def by_tier(name: str) -> dict[str, float]:
        return {key[0]: value for key, value in sums[PREFIX + name].items()}

    calls, seconds = (sums[f"{PREFIX}retention_seconds_{what}"] for what in ("count", "sum"))
    own = ("num_running_reqs", "num_queue_reqs", "gen_throughput")
    return Snapshot(
        at_seconds=time.monotonic(),
        page_size=round(one("sglang:page_size") / max(len(ranks["sglang:page_size"]), 1)),
        capacity_tokens=one(f"{PREFIX}capacity_tokens"),
        free_tokens=one(f"{PREFIX}free_tokens"),
        moved_bytes=one(f"{PREFIX}moved_bytes_total"),
        pages=by_tier("pages"),
        bytes=by_tier("bytes"),
        hits=by_tier("hit_tokens_total"),
        drops=by_tier("dropped_pages_total"),
        moves={(k[0], k[1]): v for k, v in sums[f"{PREFIX}retiered_pages_total"].items()}
        | {(tier, TIERS[0]): v for tier, v in by_tier("promoted_pages_total").items()},
        retention={key[0]: (calls[key], seconds[key]) for key in calls},
        own={name: one(f"sglang:{name}") for name in own if f"sglang:{name}" in sums},
    )


def view(url: str, now: Snapshot, before: Snapshot | None) -> Group:
    """The screen: what is held, by tier, and what was done; rates where there is a `before`."""
    from rich.console import Group
    from rich.text import Text

    tokens = sum(now.pages.values()) * now.page_size
    used = 1 - now.free_tokens / now.capacity_tokens
    head = Text.assemble(("spherical cache ", "bold"), url)
    bar = _bar(now).append(
        f" {used:.0%} of {now.capacity_tokens:,.0f} hot-token equivalents", "not dim"
    )
    held = Text(f"{tokens:,.0f} tokens in {sum(now.bytes.values()) / 2**20:,.1f} MiB")
    own = Text("   ".join(f"{name} {value:,.0f}" for name, value in now.own.items()), "dim")
    parts = (head, bar, held, "", _tiers(now, before), "", _moves(now, before), "")
    return Group(*parts, _host_time(now, before), "", own)


def _tiers(now: Snapshot, before: Snapshot | None) -> Table:
    per = "/s" if before else ""
    table = _table("tier", "pages", "tokens", "MiB", "of bytes", f"hit tokens{per}", f"drops{per}")
    held = sum(now.bytes.values())
    for tier, colour in _coloured(now):
        hits = _rate(now, before, now.hits[tier], before.hits[tier] if before else 0)
        drops = _rate(now, before, now.drops[tier], before.drops[tier] if before else 0)
        table.add_row(
            f"[{colour}]{tier}[/]",
            f"{now.pages[tier]:,.0f}",
            f"{now.pages[tier] * now.page_size:,.0f}",
            f"{now.bytes[tier] / 2**20:,.1f}",
            f"{now.bytes[tier] / held:.0%}" if held else "–",
            hits,
            drops,
        )
    return table


def _moves(now: Snapshot, before: Snapshot | None) -> Table:
    """Pages re-encoded or promoted, by way, and the bytes that took."""
    per = "/s" if before else ""
    table = _table("re-tiered", f"pages{per}", f"MiB moved{per}")
    for key, pages in now.moves.items():
        if pages:
            was = before.moves.get(key, 0) if before else 0
            table.add_row(f"{key[0]} → {key[1]}", _rate(now, before, pages, was), "")
    counts = sum(now.moves.values()), sum(before.moves.values()) if before else 0
    moved = now.moved_bytes / 2**20, before.moved_bytes / 2**20 if before else 0
    table.add_row("all", _rate(now, before, *counts), _rate(now, before, *moved))
    return table


def _host_time(now: Snapshot, before: Snapshot | None) -> Table:
    """How often the retention was called, and how long the host was busy with it."""
    per = "/s" if before else ""
    table = _table("retention at", f"calls{per}", "ms a call")
    for trigger, (calls, seconds) in now.retention.items():
        was_calls, was_seconds = before.retention[trigger] if before else (0.0, 0.0)
        mean = (seconds - was_seconds) / (calls - was_calls) if calls > was_calls else 0.0
        table.add_row(trigger, _rate(now, before, calls, was_calls), f"{1e3 * mean:,.2f}")
    return table


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), title_justify="left")
    table.add_column(first, min_width=14)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _rate(now: Snapshot, before: Snapshot | None, value: float, was: float) -> str:
    """A total, or what it grew by per second since `before`."""
    if before is None:
        return f"{value:,.0f}"
    return f"{(value - was) / max(now.at_seconds - before.at_seconds, 1e-9):,.1f}"


def _bar(now: Snapshot) -> Text:
    """The memory as a bar: a stretch per tier by its bytes, then what is free."""
    from rich.text import Text

    held = sum(now.bytes.values())
    used = 1 - now.free_tokens / now.capacity_tokens
    bar, cells = Text(), 0
    filled = 0.0
    for tier, colour in _coloured(now):
        filled += now.bytes[tier] / held * used * BAR_CELLS if held else 0
        bar.append("█" * (round(filled) - cells), colour)
        cells = round(filled)
    return bar.append("░" * (BAR_CELLS - cells), "dim")


def _coloured(now: Snapshot) -> list[tuple[str, str]]:
    return [(tier, COLOURS[i % len(COLOURS)]) for i, tier in enumerate(now.pages)]
