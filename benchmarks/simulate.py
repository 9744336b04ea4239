"""The cache without a model: token hit rates at sizes that fit no test machine.

usage: python benchmarks/simulate.py [--model DIR] [--shape prefix|turns] [--pool-tokens 100000]
       [--working-sets 1 4 16] [--json OUT]
       python benchmarks/simulate.py --against RESULT.json [--json OUT]

Runs the product's own tree, policy and page layout over an allocator that only counts, and SGLang's
LRU tree with the same bytes of bf16 beside it. Clients come in waves of `--at-once`, as those of a
closed loop do once their answers have the same length: a wave is prefilled in batches of
`--prefill-tokens`, holds its prefixes, and finishes together; evictions ask for what SGLang's
scheduler asks for. Not simulated: time, retraction. Without --model the geometry is Llama-3.1-8B's.

--against takes a result of prefix_sharing.py or multi_turn.py, replays the traces of its rows,
whose seed and lengths it records, and prints both hit rates.
"""

from __future__ import annotations

import argparse
import json
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from client import save
from serve import LLAMA_8B
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sharing_run import command
from sharing_workload import VOCABULARY, WORKLOADS, Shape, Source, Workload
from tqdm import tqdm

from sglang_spherical.config import SphericalConfig
from sglang_spherical.metrics import NoMetrics
from sglang_spherical.pool.layout import PageLayout, default_levels
from sglang_spherical.radix.tree import SphericalRadixCache

SHAPES = {"prefix": Shape(1024, 80, 8), "turns": Shape(640, 88, 8, 4)}
Row = dict[str, Any]


class CountingAllocator:
    """What a tree asks of its allocator, with no pages behind it: memory is a number.

    size  capacity in tokens; under a layout in hot-token equivalents
    """

    def __init__(self, size: int, page_size: int, layout: PageLayout | None) -> None:
        self.size = self.free_tokens = size
        self.page_size = page_size
        self.device = torch.device("cpu")
        frames = SimpleNamespace(ready=True)
        self.pool = SimpleNamespace(layout=layout, frames=frames, page_size=page_size, size=size)
        self.metrics = NoMetrics()

    def available_size(self) -> int:
        return self.free_tokens

    def take(self, pages: int) -> None:
        """New pages, hot ones. Raises MemoryError when there is too little."""
        if pages * self.page_size > self.free_tokens:
            raise MemoryError(f"{pages} pages of {self.page_size} do not fit")
        self.free_tokens -= pages * self.page_size

    def free_segment(self, index: torch.Tensor, *, start_pos: int) -> None:
        """Frees what one request wrote from its token `start_pos` on."""
        last = start_pos + len(index)
        self.free_tokens += (-(-last // self.page_size) - start_pos // self.page_size) * (
            self.page_size if len(index) else 0
        )

    def free_segments(self, segments: list[tuple[torch.Tensor, int]]) -> None:
        for index, start_pos in segments:
            self.free_segment(index, start_pos=start_pos)

    def free_at_level(self, pages: torch.Tensor, level: int) -> None:
        self.free_tokens += len(pages) * self.pool.layout.cost_tokens[level]

    def lower(self, pages: torch.Tensor, old: int, new: int) -> None:
        costs = self.pool.layout.cost_tokens
        self.free_tokens += len(pages) * (costs[old] - costs[new])

    def promote(self, pages: torch.Tensor, level: int, originals: torch.Tensor) -> int:
        more = self.page_size - self.pool.layout.cost_tokens[level]
        count = min(len(pages), self.free_tokens // more) if more else len(pages)
        self.free_tokens -= count * more
        return count


class Request:
    """What a tree reads of SGLang's Req, and the answer that it will get."""

    priority = 0
    extra_key = None

    def __init__(self, prompt: list[int], answer: list[int]) -> None:
        self.origin_input_ids = array("q", prompt)
        self.output_ids = array("q")
        self.answer = answer
        self.filled = len(prompt)
        self.hit_tokens = 0

    def get_fill_ids(self) -> array[int]:
        return (self.origin_input_ids + self.output_ids)[: self.filled]


class Simulation:
    """A tree, and what SGLang's scheduler does with it.

    prefill_tokens  of a batch, of which the last request may be a part
    """

    def __init__(self, tree: RadixCache, rows: ReqToTokenPool, prefill_tokens: int) -> None:
        self.tree, self.rows, self.prefill_tokens = tree, rows, prefill_tokens
        self.allocator = tree.token_to_kv_pool_allocator
        self.running: list[Request] = []

    def wave(self, requests: list[Request]) -> None:
        """Serves some requests at once; afterwards all have their answers."""
        waiting = deque(requests)
        while waiting:
            self._prefill(waiting)
        self._finish()

    def _prefill(self, waiting: deque[Request]) -> None:
        """Takes a batch from those who wait; when nothing fits, lets the running ones finish."""
        batch, budget, need = [], self.prefill_tokens, 0
        while waiting and budget > 0:
            self._lock(waiting[0])
            new = waiting[0].filled - waiting[0].hit_tokens
            need += new + self.allocator.page_size  # as SGLang counts: one more page for each
            if need > self.allocator.available_size() + self.tree.evictable_size():
                self.tree.dec_lock_ref(waiting[0].last_node)
                need -= new + self.allocator.page_size
                break
            budget -= new
            batch.append(waiting.popleft())
        self._make_room(need)
        if not batch:
            if not self.running:
                raise ValueError(f"{waiting[0].filled} tokens do not fit: more --pool-tokens")
            self._finish()
        for req in batch:
            req.req_pool_idx = self.rows.free_slots.pop()
            self.allocator.take(self._pages(req.filled) - self._pages(req.hit_tokens))
        self._run_forwards(1)
        for req in batch:
            self.tree.cache_unfinished_req(req)
        self.running += batch

    def _lock(self, req: Request) -> None:
        """Finds and holds the cached prefix; a server computes at least one token."""
        key = RadixKey(req.origin_input_ids[:-1], None)
        match = self.tree.match_prefix(MatchPrefixParams(key=key))
        req.prefix_indices, req.last_node = match.device_indices, match.last_device_node
        req.hit_tokens = req.cache_protected_len = len(req.prefix_indices)
        self.tree.inc_lock_ref(req.last_node)

    def _finish(self) -> None:
        """All running requests get their answers and end.

        The last token is cached too: the overlap scheduler has run a step more.
        """
        ends = [req.filled + len(req.answer) for req in self.running]
        pages = sum(self._pages(end) - self._pages(r.filled) for r, end in zip(self.running, ends))
        self._make_room(pages * self.allocator.page_size)
        self.allocator.take(pages)
        self._run_forwards(max(len(req.answer) for req in self.running))
        for req, end in zip(self.running, ends):
            req.output_ids.extend(req.answer)
            req.filled = end
            self.tree.cache_finished_req(req, kv_len_to_handle=end)
            self.rows.free_slots.append(req.req_pool_idx)
        self.running = []

    def _run_forwards(self, count: int) -> None:
        """Forward passes, behind which a spherical cache re-encodes what waits."""
        if isinstance(self.tree, SphericalRadixCache):
            for _ in range(count):
                self.tree.forward_launched()

    def _make_room(self, tokens: int) -> None:
        short = tokens - self.allocator.available_size()
        if short > 0:
            self.tree.evict(EvictParams(num_tokens=short))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.allocator.page_size)


def geometry(model: Path | None) -> tuple[int, int, int]:
    """Layers, KV heads and head dimension of a model's config.json."""
    config = json.loads((model / "config.json").read_text()) if model else LLAMA_8B
    heads = config["num_attention_heads"]
    return (
        config["num_hidden_layers"],
        config.get("num_key_value_heads", heads),
        config.get("head_dim") or config["hidden_size"] // heads,
    )


def build(server: str, longest: int, settings: Row, args: argparse.Namespace) -> Simulation:
    """A cache for requests of at most `longest` tokens, with the bytes of `pool_tokens` in bf16."""
    at_once, pool_tokens = settings["at_once"], settings["pool_tokens"]
    rows = ReqToTokenPool(at_once + 1, longest + args.page_size, "cpu", False)
    if server == "bf16":
        allocator = CountingAllocator(pool_tokens, 1, None)
        tree = RadixCache(CacheInitParams(False, rows, allocator, 1))
        return Simulation(tree, rows, settings["prefill_tokens"])
    layers, kv_heads, head_dim = geometry(args.model)
    config = SphericalConfig("spherical")
    layout = PageLayout.fit(args.page_size, head_dim, layers, kv_heads, default_levels(config))
    kv_bytes = pool_tokens * layout.dense_bytes_per_token()
    size = kv_bytes // layout.hot_bytes_per_token // args.page_size * args.page_size
    allocator = CountingAllocator(size, args.page_size, layout)
    params = CacheInitParams(False, rows, allocator, args.page_size)
    return Simulation(SphericalRadixCache(params, config), rows, settings["prefill_tokens"])


def answers(length: int) -> Iterator[list[int]]:
    """Token ids that are in no prompt and no other answer."""
    start = VOCABULARY.stop
    while True:
        yield list(range(start, start + length))
        start += length


def waves(work: Workload, at_once: int) -> Iterator[range]:
    """Numbers of the requests that are in flight together; a turn waits for the one before."""
    start, order = 0, work.order
    for number in range(len(order) + 1):
        full = number - start == at_once or number in (len(work.first), len(order))
        if full or (work.shape.turns and order[number] in order[start:number]):
            if number > start:
                yield range(start, number)
            start = number


def simulate(simulation: Simulation, work: Workload, at_once: int) -> Row:
    """Both passes of a workload: its hit rates, and what the cache holds at the end."""
    cached = possible = 0
    source = answers(work.shape.answer)
    for numbers in tqdm(waves(work, at_once), leave=False, unit="wave"):
        wave = [Request(work.prompt(number), next(source)) for number in numbers]
        simulation.wave(wave)
        for number, req in zip(numbers, wave):
            if number >= len(work.first):
                # Random prompts share nothing else, and the first pass has asked every group.
                possible += len(work.histories[work.order[number]])
                cached += req.hit_tokens
            work.answered(number, req.origin_input_ids.tolist(), req.answer)
    return {"token_hit_rate": cached / possible, "requests": len(work.picks)} | held(simulation)


def held(simulation: Simulation) -> Row:
    """Tokens in the tree, by tier where it has tiers."""
    layout = simulation.allocator.pool.layout
    if layout is None:
        return {"tokens": {"bf16": simulation.tree.total_size()}}
    counts: Counter[str] = Counter({level.name: 0 for level in layout.levels})
    stack = list(simulation.tree.root_node.children.values())
    while stack:
        node = stack.pop()
        for level, pages in zip(*np.unique(node.levels, return_counts=True)):
            counts[layout.levels[level].name] += int(pages) * layout.page_size
        stack += node.children.values()
    return {"tokens": dict(counts)}


def cell(
    server: str,
    workload: str,
    working_set: float,
    shape: Shape,
    settings: Row,
    args: argparse.Namespace,
) -> Row:
    """One row: a workload at a working set on one kind of cache."""
    source = Source(None, settings["seed"])
    tokens = round(working_set * settings["pool_tokens"])
    work = Workload.build(workload, shape, tokens, settings["least_requests"], source)
    longest = shape.prefix + max(shape.turns, 1) * (shape.question + shape.answer)
    simulation = build(server, longest, settings, args)
    started = time.perf_counter()
    found = simulate(simulation, work, settings["at_once"])
    seconds = time.perf_counter() - started
    row = {"server": server, "workload": workload, "working_set": working_set}
    return row | {"groups": len(work.histories)} | found | {"seconds": round(seconds, 1)}


def compare(path: Path, args: argparse.Namespace) -> list[Row]:
    """The rows of a measured result, each with what the simulator makes of its trace."""
    measured = json.loads(path.read_text())
    settings = measured["settings"]
    shape = Shape(**settings["shape"])
    rows = []
    for real in measured["rows"]:
        if real["server"] not in ("spherical", "bf16"):
            continue
        key = real["server"], real["workload"], real["working_set"]
        row = cell(*key, shape, settings, args)
        row["measured_hit_rate"] = real["token_hit_rate"]
        rows.append(row)
        say(row)
    errors = [100 * abs(row["token_hit_rate"] - row["measured_hit_rate"]) for row in rows]
    print(f"points off: mean {np.mean(errors):.1f}, most {np.max(errors):.1f}")
    return rows


def say(row: Row) -> None:
    real = row.get("measured_hit_rate")
    beside = "" if real is None else f"  measured {real:6.1%}"
    print(
        f"{row['server']:9s} {row['workload']:11s} {row['working_set']:5.1f}x  {row['groups']:7d} "
        f"groups  hit rate {row['token_hit_rate']:6.1%}{beside}  in {row['seconds']} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder with a config.json")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--against", type=Path, help="a measured result to replay")
    parser.add_argument("--shape", choices=SHAPES, default="prefix")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--working-sets", nargs="+", type=float, default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--pool-tokens", type=int, default=100_000, help="of bf16")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="of a batch")
    parser.add_argument("--least-requests", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.against:
        rows = compare(args.against, args)
    else:
        rows = []
        for workload in args.workloads:
            for working_set in args.working_sets:
                for server in ("spherical", "bf16"):
                    shape = SHAPES[args.shape]
                    rows.append(cell(server, workload, working_set, shape, vars(args), args))
                    say(rows[-1])
    layers, kv_heads, head_dim = geometry(args.model)
    shown = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
    save(args.json, {"command": command(), "geometry": shown, "rows": rows})


if __name__ == "__main__":
    main()
