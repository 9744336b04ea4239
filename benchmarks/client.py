"""What the server benchmarks share: requests, and the JSON they leave."""

from __future__ import annotations

import json
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import requests

TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Reply:
    """One answer of /generate. `seconds` from sending to the last byte."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int
    seconds: float


def generate(url: str, prompt: str | list[int], new_tokens: int) -> Reply:
    """Greedy continuation of a text or of token ids by exactly `new_tokens` tokens."""
    key = "text" if isinstance(prompt, str) else "input_ids"
    sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    started = time.perf_counter()
    answer = requests.post(
        f"{url}/generate", json={key: prompt, "sampling_params": sampling}, timeout=TIMEOUT_SECONDS
    )
    answer.raise_for_status()
    body = answer.json()
    meta = body["meta_info"]
    return Reply(
        body.get("text", ""),  # a server without a tokenizer sends none
        body["output_ids"],
        meta["prompt_tokens"],
        meta["cached_tokens"],
        time.perf_counter() - started,
    )


def generate_together(url: str, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds until all of `prompts`, sent at once, have been continued."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: generate(url, prompt, new_tokens), prompts))
    return time.perf_counter() - started


def keep_garbage_out(url: str) -> None:
    """What a server has started with is left out of Python's garbage collections from now on, each
    of which stops it for half a second. Spherical servers do so themselves."""
    requests.post(f"{url}/freeze_gc", timeout=TIMEOUT_SECONDS).raise_for_status()


def command() -> str:
    """How this was called, paths cut to their last part."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def save(path: Path | None, result: dict[str, object]) -> None:
    """Writes `result` with the command and the versions that made it; prints where."""
    result = {
        "command": command(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("sglang", "sglang-spherical", "torch")},
        **result,
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
