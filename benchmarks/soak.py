"""Many mixed requests at a server whose memory is too small for them: nothing may leak or crash.

usage: python benchmarks/soak.py --model DIR [--requests 500] [--seconds 0] [--json OUT] [-- FLAGS]

Chats that grow turn by turn over a few shared prefixes, private prompts, prompts longer than a
prefill chunk, streams that the client leaves, aborts by id, separate name spaces (extra_key) and
flushes, with SGLang's strict memory checks on in every step and forced retractions. Every request
that is not given up must be answered; at the end the server must be idle with all memory accounted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from client import save
from tqdm import tqdm

from sglang_spherical.server import launch

STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_DEBUG_MEMORY_POOL": "1",
    "SGLANG_TEST_RETRACT": "1",
}
FLAGS = ["--kv-format", "spherical", "--max-total-tokens", "4096", "--chunked-prefill-size", "512"]
FAULTS = re.compile(r"Traceback|leak|AssertionError|out of memory", re.IGNORECASE)
VOCABULARY = range(1000, 20000)
LONGEST_PROMPT = 1800  # tokens; a request must fit the pool at hot size


@dataclass
class Workload:
    """What is asked next; all choices come from one seeded generator."""

    rng: random.Random
    shared: list[list[int]] = field(default_factory=list)
    chats: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shared = [self.tokens(length) for length in (130, 400, 900)]
        self.chats = [[*self.rng.choice(self.shared)] for _ in range(12)]

    def tokens(self, count: int) -> list[int]:
        return self.rng.choices(VOCABULARY, k=count)

    def prompt(self) -> tuple[str, list[int]]:
        """A kind and the token ids of the next prompt."""
        kind = self.rng.choices(["turn", "shared", "private", "long"], [5, 3, 3, 1])[0]
        if kind == "turn":
            index = self.rng.randrange(len(self.chats))
            chat = self.chats[index]
            if len(chat) > LONGEST_PROMPT - 200:
                chat = self.chats[index] = [*self.rng.choice(self.shared)]
            chat += self.tokens(self.rng.randint(5, 120))
            return kind, [*chat]
        if kind == "shared":
            return kind, self.rng.choice(self.shared) + self.tokens(self.rng.randint(1, 80))
        low, high = (900, LONGEST_PROMPT) if kind == "long" else (1, 300)
        return kind, self.tokens(self.rng.randint(low, high))


class Soak:
    """Sends the workload to one server and counts what became of it."""

    def __init__(self, url: str, session: aiohttp.ClientSession, seed: int) -> None:
        self.url, self.session = url, session
        self.work = Workload(random.Random(seed))
        self.outcomes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.cached_tokens = 0

    async def one(self, number: int) -> None:
        """One request, in one of the ways a client may behave."""
        rng = self.work.rng
        kind, prompt = self.work.prompt()
        self.kinds[kind] += 1
        body: dict[str, object] = {
            "rid": f"soak-{number}",
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": rng.randint(1, 60), "temperature": 0.7},
        }
        if rng.random() < 0.1:
            body["extra_key"] = f"space-{rng.randrange(3)}"
        manner = rng.choices(["whole", "stream", "leave", "abort"], [6, 3, 1, 1])[0]
        self.outcomes[await getattr(self, f"_{manner}")(body)] += 1

    async def _whole(self, body: dict[str, object]) -> str:
        async with self.session.post(f"{self.url}/generate", json=body) as answer:
            answer.raise_for_status()
            meta = (await answer.json())["meta_info"]
            self.cached_tokens += meta.get("cached_tokens", 0)  # missing when aborted early
            return "answered" if meta.get("completion_tokens") else "empty"

    async def _stream(self, body: dict[str, object], leave_after: int = 0) -> str:
        seen = 0
        async with self.session.post(
            f"{self.url}/generate", json=body | {"stream": True}
        ) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                seen += line.startswith(b"data: {")
                if leave_after and seen >= leave_after:
                    return "left by the client"
        return "answered" if seen else "empty"

    async def _leave(self, body: dict[str, object]) -> str:
        return await self._stream(body, leave_after=2)

    async def _abort(self, body: dict[str, object]) -> str:
        asking = asyncio.create_task(self._whole(body))
        await asyncio.sleep(self.work.rng.random())
        await self._post("/abort_request", {"rid": body["rid"]})
        return "aborted" if await asking in ("answered", "empty") else "failed"

    async def flush(self) -> None:
        """Asks for a flush; a busy server declines, which is an answer too."""
        async with self.session.post(f"{self.url}/flush_cache") as answer:
            self.outcomes["flushed" if answer.status == 200 else "flush declined"] += 1

    async def _post(self, path: str, body: dict[str, object]) -> None:
        async with self.session.post(f"{self.url}{path}", json=body) as answer:
            answer.raise_for_status()


async def run(url: str, requests: int, seconds: float, at_once: int, seed: int) -> Soak:
    """Sends `requests` requests, or as many as fit in `seconds`, `at_once` of them at a time."""
    timeout = aiohttp.ClientTimeout(total=1800)
    connector = aiohttp.TCPConnector(force_close=True)  # the server closes idle ones itself
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        soak, started, sent = Soak(url, session, seed), time.monotonic(), 0
        with tqdm(total=requests, unit="request") as progress:
            while sent < requests or time.monotonic() - started < seconds:
                count = min(at_once * 4, max(requests - sent, at_once))
                gate = asyncio.Semaphore(at_once)

                async def gated(number: int, gate: asyncio.Semaphore = gate) -> None:
                    async with gate:
                        await soak.one(number)
                        progress.update()

                await asyncio.gather(*(gated(sent + i) for i in range(count)))
                sent += count
                if soak.work.rng.random() < 0.3:
                    await soak.flush()
        return soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=0.0, help="go on at least this long")
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="more server flags, after --")
    args = parser.parse_args()
    started = time.monotonic()
    with launch(args.model, args=[*FLAGS, *args.flags], env=STRICT, log=args.log) as server:
        banner = server.banner()
        soak = asyncio.run(run(server.url, args.requests, args.seconds, args.at_once, args.seed))
        time.sleep(3)  # the idle check runs
        alive = server.process.poll() is None
        log = server.log_text()
    faults = sorted(set(FAULTS.findall(log)))
    result = {
        "model": args.model.name,
        "engaged": banner is not None,
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(soak.outcomes),
        "kinds": dict(soak.kinds),
        "cached_tokens": soak.cached_tokens,
        "retractions": len(re.findall("retract", log, re.IGNORECASE)),
        "alive": alive,
        "faults_in_log": faults,
    }
    print(json.dumps(result, indent=1))
    save(args.json, result)
    if not alive or faults or banner is None or {"empty", "failed"} & soak.outcomes.keys():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
