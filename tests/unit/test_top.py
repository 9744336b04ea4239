"""The live view: what it reads, what it shows, and its one-line errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from cache_tools import tiny_layout
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from rich.console import Console

from sglang_spherical import cli, top
from sglang_spherical.errors import EXIT_CODE
from sglang_spherical.metrics import PrometheusMetrics
from sglang_spherical.server import free_port

LAYOUT = tiny_layout()
TIERS = [level.name for level in LAYOUT.levels]
PAGE = LAYOUT.page_size


def exposition() -> str:
    """What a server says that holds 6 hot pages and 4 of the lowest tier."""
    registry = CollectorRegistry()
    Gauge("sglang:page_size", "", registry=registry).set(PAGE)
    Gauge("sglang:gen_throughput", "", registry=registry).set(12.5)
    metrics = PrometheusMetrics(LAYOUT, 64 * PAGE, {"model_name": "m"}, registry)
    metrics.changed(0, 10, 54 * PAGE)
    metrics.retiered(0, len(TIERS) - 1, 4, 56 * PAGE)
    metrics.promoted(len(TIERS) - 1, 0, 56 * PAGE)
    metrics.started([np.array([0, 0, len(TIERS) - 1], np.uint8)])
    metrics.retained("evict", 0.25)
    metrics.dropped(1, 3)
    return generate_latest(registry).decode()


def screen(now: top.Snapshot, before: top.Snapshot | None = None) -> str:
    console = Console(width=120, force_terminal=False)
    with console.capture() as shown:
        console.print(top.view("http://h:1", now, before))
    return shown.get()


@contextmanager
def serving(status: int, body: str) -> Iterator[str]:
    """A server that answers everything with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_snapshot_is_what_the_metrics_say() -> None:
    now = top.parse(exposition())
    assert list(now.pages) == TIERS, "finest first, only levels that the layout has"
    assert [now.pages[tier] for tier in TIERS] == [6, *[0] * (len(TIERS) - 2), 4]
    assert now.page_size == PAGE
    assert now.capacity_tokens == 64 * PAGE and now.free_tokens == 56 * PAGE
    assert now.hits[TIERS[0]] == 2 * PAGE and now.hits[TIERS[-1]] == PAGE
    assert now.drops[TIERS[1]] == 3
    assert now.moves[TIERS[0], TIERS[-1]] == 4 and now.moves[TIERS[-1], TIERS[0]] == 0
    assert now.retention["evict"] == (1, 0.25)
    blocks = LAYOUT.blocks[0] + LAYOUT.blocks[-1]
    assert now.moved_bytes == 4 * blocks * LAYOUT.block_bytes


def test_data_parallel_ranks_are_summed_and_tensor_parallel_ones_are_not() -> None:
    text = exposition()
    more = [line for line in text.splitlines() if line.startswith(("spherical:", "sglang:"))]

    def of_rank(label: str) -> str:
        return "\n".join(
            line.replace("{", "{" + label + ",") if "{" in line else
            line.replace(" ", "{" + label + "} ", 1)
            for line in more
        )  # fmt: skip

    one = top.parse(text)
    two = top.parse("\n".join(of_rank(f'dp_rank="{rank}",tp_rank="0"') for rank in range(2)))
    assert two.pages == {tier: 2 * pages for tier, pages in one.pages.items()}
    assert two.page_size == PAGE and two.capacity_tokens == 2 * one.capacity_tokens
    same = top.parse("\n".join(of_rank(f'tp_rank="{rank}"') for rank in range(2)))
    assert replace(same, at_seconds=one.at_seconds) == one


def test_totals_are_shown_once() -> None:
    shown = screen(top.parse(exposition()))
    table = [line.split() for line in shown.splitlines()]
    assert [TIERS[0], "6", str(6 * PAGE)] in [line[:3] for line in table]
    assert [TIERS[-1], "4", str(4 * PAGE)] in [line[:3] for line in table]
    assert f"{TIERS[0]} → {TIERS[-1]}" in shown
    assert "250.00" in shown, "milliseconds of the one call"
    assert "12% of 1,024 hot-token equivalents" in shown
    assert "/s" not in shown


def test_rates_are_over_the_interval() -> None:
    now = top.parse(exposition())
    before = replace(
        now,
        at_seconds=now.at_seconds - 2,
        hits=dict.fromkeys(TIERS, 0.0),
        retention=dict.fromkeys(now.retention, (0.0, 0.0)),
    )
    line = next(row for row in screen(now, before).splitlines() if row.startswith(TIERS[0] + " "))
    assert f"{2 * PAGE / 2:.1f}" in line.split()
    assert "hit tokens/s" in screen(now, before)


def test_an_empty_cache_can_be_shown() -> None:
    now = top.parse(exposition())
    empty = dict.fromkeys(TIERS, 0.0)
    assert TIERS[0] in screen(replace(now, pages=empty, bytes=empty, free_tokens=64.0 * PAGE))


@pytest.mark.parametrize(
    "status, body, said",
    [
        (404, "", "/metrics says 404: start the server with --enable-metrics"),
        (200, "# HELP sglang:x y\nsglang:x 1\n", "has no spherical cache: start one with"),
        (200, "<html>", "no metrics of a server"),
    ],
)
def test_a_server_that_does_not_tell_is_one_line(
    status: int, body: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(status, body) as url:
        assert cli.main(["top", "--once", "--url", url]) == EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith(f"error: --url {url}: ")
    assert said in error and error.count("\n") == 1


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for url in (f"http://127.0.0.1:{free_port()}", "nonsense"):
        assert cli.main(["top", "--once", "--url", url]) == EXIT_CODE
        error = capsys.readouterr().err
        assert f"--url {url}: no server answers there" in error and error.count("\n") == 1


def test_an_interval_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--interval", "0"]) == EXIT_CODE
    assert "--interval 0.0: expected more than 0 seconds" in capsys.readouterr().err


def test_once_prints_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(200, exposition()) as url:
        assert cli.main(["top", "--once", "--url", url]) == 0
    assert TIERS[-1] in capsys.readouterr().out
