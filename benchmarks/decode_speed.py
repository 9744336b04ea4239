"""Decode speed of a dense and a spherical server on this machine, side by side.

usage: python benchmarks/decode_speed.py --model DIR [--context 1500] [--batch 1 8] [--json OUT]

Both servers run at once and are measured in turns, so that both see the same machine. A point's
inter-token latency is the difference between a long and a short continuation of cached prompts:
prefill and HTTP cancel. Reported is the median over the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

from client import generate_together, save

from sglang_spherical.server import launch

SHORT, LONG = 2, 34
SERVERS = {
    "dense": ["--attention-backend", "torch_native"],
    "spherical": ["--kv-format", "spherical"],
}


def inter_token_ms(url: str, prompts: list[list[int]]) -> float:
    """Milliseconds between tokens of one request, all of `prompts` decoding together."""
    short = generate_together(url, prompts, SHORT)
    return (generate_together(url, prompts, LONG) - short) / (LONG - SHORT) * 1e3


def measure(urls: dict[str, str], context: int, batch: int, rounds: int) -> dict[str, object]:
    """One point, measured on every server in turns."""
    rng = random.Random(context + batch)
    prompts = [[rng.randrange(1000, 20000) for _ in range(context)] for _ in range(batch)]
    for url in urls.values():
        generate_together(url, prompts, SHORT)  # fills the prefix cache
    times: dict[str, list[float]] = {name: [] for name in urls}
    for _ in range(rounds):
        for name, url in urls.items():
            times[name].append(inter_token_ms(url, prompts))
    itl = {name: statistics.median(values) for name, values in times.items()}
    ratio = itl["dense"] / itl["spherical"]
    print(
        f"context {context} batch {batch}: dense {itl['dense']:.1f} ms, "
        f"spherical {itl['spherical']:.1f} ms, {ratio:.2f}x the speed of dense",
        flush=True,
    )
    return {"context": context, "batch": batch, "itl_ms": itl, "speed_ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--context", type=int, default=1500, help="tokens of each cached prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with (
        launch(args.model, args=SERVERS["dense"]) as dense,
        launch(args.model, args=SERVERS["spherical"]) as spherical,
    ):
        print(spherical.banner())
        urls = {"dense": dense.url, "spherical": spherical.url}
        points = [measure(urls, args.context, batch, args.rounds) for batch in args.batch]
    save(args.json, {"model": args.model.name, "points": points})


if __name__ == "__main__":
    main()
