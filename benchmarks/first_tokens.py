"""How long short turns over cached prefixes wait for their first token, alone and several at once.

usage: python benchmarks/first_tokens.py [--model DIR] [--servers spherical bf16]
       [--turns 512,2048 128,4096] [--at-once 1 4] [--rounds 7] [--prefill-graphs] [--json OUT]
       [-- FLAGS of every server]

A turn is NEW,CACHED tokens: new ones behind a prefix that every server has cached, and settled, by
then. All servers are up at once and asked in turns, one token each. A row of the JSON has medians
over the rounds, in milliseconds from sending:

    server, new, cached, at_once
    first_ms, mean_ms, last_ms  of the requests of a round
    cached_tokens               of all of them, as the server says
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from capacity import dense_bytes_per_token
from client import Reply, generate, save
from serve import REST_S, TOKEN_IDS
from sharing_servers import add_arguments, model_at_hand, start_together

from sglang_spherical.server import Server

UNCOUNTED = 2  # rounds before those that count
ROOM = 3  # a server holds so many times the tokens of all requests at once

Row = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--turns", nargs="+", type=turn, default=[(512, 2048), (128, 4096)])
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def turn(text: str) -> tuple[int, int]:
    """NEW,CACHED as two numbers."""
    try:
        new, cached = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected NEW,CACHED tokens") from None
    return new, cached


def ask_together(url: str, prompts: list[list[int]]) -> tuple[list[float], list[Reply]]:
    """Milliseconds until each prompt, all sent at once, has its token; and the replies."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = list(pool.map(lambda prompt: generate(url, prompt, 1), prompts))
    return sorted(reply.seconds * 1e3 for reply in replies), replies


def measure(
    servers: dict[str, Server], new: int, cached: int, at_once: int, rounds: int
) -> list[Row]:
    """A row for every server."""
    rng = random.Random(new * 1000 + at_once)

    def tokens(count: int) -> list[int]:
        return rng.choices(TOKEN_IDS, k=count)

    prefixes = [tokens(cached) for _ in range(at_once)]
    for server in servers.values():
        for prefix in prefixes:
            generate(server.url, prefix, 1)
    time.sleep(REST_S)  # until what was cached is settled
    waited: dict[str, list[list[float]]] = {name: [] for name in servers}
    hits: dict[str, int] = {}
    for _ in range(UNCOUNTED + rounds):
        prompts = [prefix + tokens(new) for prefix in prefixes]
        for name, server in servers.items():
            ms, replies = ask_together(server.url, prompts)
            waited[name].append(ms)
            hits[name] = sum(reply.cached_tokens for reply in replies)
    rows = []
    for name, all_rounds in waited.items():
        ms = np.array(all_rounds[UNCOUNTED:])
        of_rounds = {"first_ms": ms[:, 0], "mean_ms": ms.mean(1), "last_ms": ms[:, -1]}
        medians = {key: float(np.median(column)) for key, column in of_rounds.items()}
        row = {"server": name, "new": new, "cached": cached, "at_once": at_once, **medians}
        rows.append(row | {"cached_tokens": hits[name]})
    return rows


def run(args: argparse.Namespace) -> None:
    """All cells; what is done is saved after each."""
    most = max(args.at_once)
    tokens = sum(new * (UNCOUNTED + args.rounds) + cached for new, cached in args.turns)
    args.pool_tokens = ROOM * most * tokens
    args.kv_bytes = args.pool_tokens * dense_bytes_per_token(args.model)
    rows: list[Row] = []
    with start_together(args) as up:
        for new, cached in args.turns:
            for at_once in args.at_once:
                found = measure(up, new, cached, at_once, args.rounds)
                for row in found:
                    say(row)
                rows += found
                save(args.json, {"model": args.model_name, "rows": rows})


def say(row: Row) -> None:
    print(
        f"{row['server']:9s} {row['new']:5d} over {row['cached']:6d}, {row['at_once']} at once:  "
        f"first {row['first_ms']:7.1f}  mean {row['mean_ms']:7.1f}  last {row['last_ms']:7.1f} ms  "
        f"({row['cached_tokens']} cached)",
        flush=True,
    )


if __name__ == "__main__":
    arguments = parse()
    with model_at_hand(arguments):
        run(arguments)
