"""What `prefix_sharing.py` and `multi_turn.py` share: servers at equal bytes, requests, figures.

Each server gets the same bytes of KV memory and the same trace; its cache is flushed before every
cell (workload, working set). A row of the JSON:

    server, workload, working_set   working set in multiples of the bf16 pool
    kv_bytes                        of KV memory, the same for all servers
    token_hit_rate                  cached_tokens, as the server reports them, over what a limitless
                                    cache of page size 1 would serve on the same trace
    page_hit_rate                   the same against a limitless cache of the server's page size
    ttft_p50_ms, ttft_p99_ms        from sending a request to its first token
    output_tok_s                    answered tokens over the time of the measured pass
    kl_mean                         mean KL(dense || server) over the tokens of `--scored` answers
    kl_mass                         mean probability that the dense server gives the compared tokens
    groups, requests, prompt_tokens, moved_bytes, retention_s

KL: the answers are the measured ones, given under pressure, with their `--top` likeliest tokens at
every step. A dense server whose memory holds everything then reads the same prompt and answer and
tells its own probabilities of those tokens. Compared are the distributions over them and one more
event, any other token: a lower bound of the full KL. The bf16 rows show what noise is in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import aiohttp
import numpy as np
import requests
import sharing_servers
from capacity import dense_bytes_per_token
from client import TIMEOUT_SECONDS, command, save
from sharing_report import plot, table
from sharing_servers import flags, model_at_hand, server_info, start, start_together
from sharing_workload import WORKLOADS, Limitless, Shape, Source, Workload, read_text
from tqdm import tqdm

from sglang_spherical import top
from sglang_spherical.server import Server, launch

WORKING_SETS = [0.5, 1.0, 2.0, 4.0, 8.0]
SAMPLE_SECONDS = 0.5
TINY = 1e-9  # of probability: what rounding may leave of "any other token"

Row = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """A request and its answer. tops: by answer token, {token id: log probability}."""

    prompt: list[int]
    answer: list[int]
    cached_tokens: int
    ttft_s: float
    tops: list[dict[int, float]]


@dataclass
class Cell:
    """One row in the making, with what only the plots and the reference server need."""

    row: Row
    scored: list[Served]
    tiers: list[dict[str, float]] = field(default_factory=list)


async def ask(
    session: aiohttp.ClientSession, url: str, prompt: list[int], new_tokens: int, tops: int
) -> Served:
    """Streams a greedy answer; `tops` > 0 asks for so many log probabilities per token."""
    sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    if tops:
        body |= {"return_logprob": True, "top_logprobs_num": tops}
    started, ttft, last = time.perf_counter(), 0.0, b""
    async with session.post(f"{url}/generate", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                ttft = ttft or time.perf_counter() - started
                last = line
    found = json.loads(last[len(b"data: ") :])
    meta = found["meta_info"]
    steps = meta.get("output_top_logprobs") or []
    return Served(
        prompt,
        found["output_ids"],
        meta["cached_tokens"],
        ttft,
        [{token: logprob for logprob, token, _ in step} for step in steps],
    )


async def ask_all(
    url: str, work: Workload, numbers: range, at_once: int, scored: set[int], tops: int
) -> list[Served]:
    """Requests `numbers` in order, `at_once` at a time; a group's turns wait for each other."""
    gate = asyncio.Semaphore(at_once)
    locks = [asyncio.Lock() for _ in work.histories]
    session = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
        connector=aiohttp.TCPConnector(force_close=True),  # the server closes idle ones itself
        read_bufsize=1 << 26,  # a stream's lines hold all log probabilities so far
    )
    async with session:

        async def one(number: int) -> Served:
            turn = locks[work.order[number]] if work.shape.turns else nullcontext()
            async with gate, turn:
                prompt = work.prompt(number)
                wanted = tops if number in scored else 0
                served = await ask(session, url, prompt, work.shape.answer, wanted)
                work.answered(number, prompt, served.answer)
                progress.update()
                return served

        with tqdm(total=len(numbers), unit="request", leave=False) as progress:
            return await asyncio.gather(*(one(number) for number in numbers))


@contextmanager
def tiers_over_time(url: str) -> Iterator[list[dict[str, float]]]:
    """Tokens by tier, read from the server's metrics every now and then while the block runs."""
    samples: list[dict[str, float]] = []
    done, started = Event(), time.monotonic()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            now = top.read(url)
            tokens = {tier: pages * now.page_size for tier, pages in now.pages.items()}
            samples.append({"seconds": round(time.monotonic() - started, 2), **tokens})

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def run_cell(server: Server, name: str, work: Workload, args: argparse.Namespace) -> Cell:
    """Both passes of a workload on a server with an empty cache."""
    requests.post(f"{server.url}/flush_cache", timeout=TIMEOUT_SECONDS).raise_for_status()
    first, count = len(work.first), len(work.picks)
    scored = {first + i * count // args.scored for i in range(min(args.scored, count))}
    spherical = name == "spherical"
    before = top.read(server.url) if spherical else None

    def run(numbers: range) -> list[Served]:
        asking = ask_all(server.url, work, numbers, args.at_once, scored, args.top)
        return asyncio.run(asking)

    with tiers_over_time(server.url) if spherical else nullcontext([]) as samples:
        warm = run(range(first))
        started = time.perf_counter()
        served = run(range(first, first + count))
        seconds = time.perf_counter() - started
    row = figures(warm, served, seconds, server_info(server.url)["page_size"])
    if before is not None:
        now = top.read(server.url)
        spent = sum(s for _, s in now.retention.values())
        row["moved_bytes"] = now.moved_bytes - before.moved_bytes
        row["retention_s"] = spent - sum(s for _, s in before.retention.values())
    return Cell(row, [s for s in served if s.tops], samples)


def figures(warm: list[Served], served: list[Served], seconds: float, page_tokens: int) -> Row:
    """Of a measured pass: the row's figures but for what the reference server has to say."""
    hits = []
    for size in (1, page_tokens):
        limitless = Limitless(size)
        for request in warm:
            limitless.serve(request.prompt, request.answer)
        hits.append(sum(limitless.serve(request.prompt, request.answer) for request in served))
    cached = sum(request.cached_tokens for request in served)
    p50, p99 = np.percentile([request.ttft_s * 1e3 for request in served], [50, 99])
    return {
        "token_hit_rate": cached / hits[0],
        "page_hit_rate": cached / hits[1],
        "ttft_p50_ms": float(p50),
        "ttft_p99_ms": float(p99),
        "output_tok_s": sum(len(request.answer) for request in served) / seconds,
        "requests": len(served),
        "prompt_tokens": sum(len(request.prompt) for request in served),
    }


def divergence(own: dict[int, float], reference: dict[int, float]) -> tuple[float, float]:
    """KL(reference || own) over the tokens of `own` and any other; the reference's mass on them.

    own, reference  {token id: log probability}; `reference` knows all of `own`'s tokens
    """
    q = np.exp([own[token] for token in own])
    p = np.exp([reference[token] for token in own])
    p_all, q_all = (np.append(x, max(1 - x.sum(), TINY)) for x in (p, q))
    return float((p_all * np.log(np.maximum(p_all, TINY) / np.maximum(q_all, TINY))).sum()), float(
        p.sum()
    )


def reference_logprobs(url: str, served: Served) -> list[dict[int, float]]:
    """What the server at `url` gives the tokens of `served.tops`, by answer token."""
    ids = sorted({token for step in served.tops for token in step})
    body = {
        "input_ids": served.prompt + served.answer,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "token_ids_logprob": ids,
        "logprob_start_len": len(served.prompt) - 1,  # the first has no prediction of its own
    }
    reply = requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_SECONDS)
    reply.raise_for_status()
    steps = reply.json()["meta_info"]["input_token_ids_logprobs"][1:]
    return [{token: logprob for logprob, token, _ in step} for step in steps]


def score(url: str, cells: list[Cell]) -> None:
    """Adds the fidelity of the answers to the rows, against the dense server at `url`."""
    for cell in tqdm(cells, unit="cell", leave=False, desc="fidelity"):
        pairs = [
            divergence(own, reference)
            for served in cell.scored
            for own, reference in zip(served.tops, reference_logprobs(url, served), strict=True)
        ]
        kl, mass = np.mean(pairs, axis=0) if pairs else (math.nan, math.nan)
        cell.row |= {"kl_mean": float(kl), "kl_mass": float(mass), "kl_tokens": len(pairs)}


def serve(
    server: Server, name: str, shape: Shape, text: list[int] | None, args: argparse.Namespace
) -> Iterator[Cell]:
    """All cells of a server, as they come."""
    args.prefill_tokens = server_info(server.url)["chunked_prefill_size"]
    for workload in args.workloads:
        for working_set in args.working_sets:
            source = Source(text, args.seed)
            tokens = round(working_set * args.pool_tokens)
            work = Workload.build(workload, shape, tokens, args.least_requests, source)
            cell = run_cell(server, name, work, args)
            cell.row = {
                "server": name,
                "workload": workload,
                "working_set": working_set,
                "kv_bytes": args.kv_bytes,
                "groups": len(work.histories),
                **cell.row,
            }
            say(cell.row)
            yield cell


def served(shape: Shape, text: list[int] | None, args: argparse.Namespace) -> Iterator[Cell]:
    """All cells, one server after the other."""
    for name in args.servers:
        with start(name, args) as server:
            yield from serve(server, name, shape, text, args)


def served_together(
    shape: Shape, text: list[int] | None, args: argparse.Namespace
) -> Iterator[Cell]:
    """All cells, every one by all servers in turn, so that what drifts drifts for all."""
    with start_together(args) as up:
        by_server = [serve(server, name, shape, text, args) for name, server in up.items()]
        for cells in zip(*by_server, strict=True):
            yield from cells


def say(row: Row) -> None:
    print(
        f"{row['server']:9s} {row['workload']:11s} {row['working_set']:4.1f}x  "
        f"hit rate {row['token_hit_rate']:6.1%} (of pages {row['page_hit_rate']:6.1%})  "
        f"TTFT {row['ttft_p50_ms']:7.1f} / {row['ttft_p99_ms']:7.1f} ms  "
        f"{row['output_tok_s']:7.1f} tok/s",
        flush=True,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sharing_servers.add_arguments(parser)
    parser.add_argument("--text", type=Path, help="prompts are cut from it; random ids without")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--working-sets", nargs="+", type=float, default=WORKING_SETS)
    parser.add_argument("--pool-tokens", type=int, default=8192, help="of the bf16 server")
    parser.add_argument("--at-once", type=int, default=4, help="requests in flight")
    parser.add_argument(
        "--together", action="store_true", help="start all servers at once, ask them in turns"
    )
    parser.add_argument("--least-requests", type=int, default=24, help="measured, per cell")
    parser.add_argument("--scored", type=int, default=8, help="answers per cell with KL; 0: none")
    parser.add_argument("--top", type=int, default=128, help="likeliest tokens compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)


def run(benchmark: str, shape: Shape, args: argparse.Namespace) -> None:
    """The whole benchmark: servers one after the other, then fidelity, JSON, table and plot."""
    if args.text and not args.model:
        raise SystemExit("error: --text needs the tokenizer of a --model")
    with model_at_hand(args):
        measure(benchmark, shape, args)


def measure(benchmark: str, shape: Shape, args: argparse.Namespace) -> None:
    """`run` with a model folder. What is done is saved after every cell."""
    args.kv_bytes = args.pool_tokens * dense_bytes_per_token(args.model)
    args.run_id = f"{benchmark}-{args.model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    text = read_text(args.model, args.text)
    cells: list[Cell] = []
    for cell in served_together(shape, text, args) if args.together else served(shape, text, args):
        cells.append(cell)
        save(args.json, result(shape, cells, args))
    if args.scored:
        longest = max(len(s.prompt) + len(s.answer) for c in cells for s in c.scored)
        room = max(2 * longest, args.pool_tokens)  # it reads one at a time
        reference = flags("bf16", argparse.Namespace(**{**vars(args), "pool_tokens": room}))
        with launch(args.model, args=reference) as server:
            score(server.url, cells)
        save(args.json, result(shape, cells, args))
    print(table([cell.row for cell in cells]))
    if args.plot:
        plot(result(shape, cells, args), args.plot)


def result(shape: Shape, cells: list[Cell], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON."""
    tiers = [
        {key: cell.row[key] for key in ("workload", "working_set")} | {"samples": cell.tiers}
        for cell in cells
        if cell.tiers
    ]
    return {
        "command": command(),
        "run_id": args.run_id,
        "model": args.model_name,
        "settings": settings(shape, args),
        "rows": [cell.row for cell in cells],
        "tiers": tiers,
    }


def settings(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """What `simulate.py` needs to see the same trace."""
    kept = ("pool_tokens", "at_once", "prefill_tokens", "least_requests", "seed", "scored", "top")
    return {"shape": vars(shape), "text": args.text is not None} | {
        key: getattr(args, key) for key in kept
    }


def main(benchmark: str, doc: str, shape: Callable[[argparse.Namespace], Shape],
         lengths: dict[str, int]) -> None:  # fmt: skip
    """Entry point of a benchmark: its own lengths as flags, then the shared ones."""
    parser = argparse.ArgumentParser(
        description=f"{doc}\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in lengths.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    add_arguments(parser)
    args = parser.parse_args()
    run(benchmark, shape(args), args)
