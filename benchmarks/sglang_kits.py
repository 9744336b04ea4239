"""SGLang's own server tests, offline, against a spherical server with strict memory checks.

usage: python benchmarks/sglang_kits.py --model DIR --text FILE [--json OUT] [-- FLAGS]

Runs `sglang.test.kits` radix_cache_server_kit (a random prefix tree) and cache_hit_kit (turns of
several clients, hits checked to the page), then `sglang.bench_serving` with generated shared
prefixes. Needs the package `datasets`, which SGLang's load generator imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from client import save
from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test
from sglang.test.kits.radix_cache_server_kit import run_radix_attention_test
from soak import FAULTS, STRICT

from sglang_spherical.server import Server, launch

FLAGS = ["--kv-format", "spherical", "--max-total-tokens", "8192"]
LOAD = ["--gsp-num-groups", "4", "--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", "512"]
LOAD += [
    "--gsp-question-len",
    "64",
    "--gsp-output-len",
    "16",
    "--disable-tqdm",
    "--output-file",
    os.devnull,
]
FIGURES = re.compile(
    r"^(Successful requests|Mean TTFT \(ms\)|Mean TPOT \(ms\)|Benchmark duration \(s\)):\s+(\S+)",
    re.M,
)


def write_conversations(text: str, path: Path) -> None:
    """The conversations that the kit samples its prompts from, cut out of `text`."""
    passages = [text[i : i + 2000] for i in range(0, len(text) - 2000, 2000)]
    turns = [[{"value": passage}, {"value": "-"}] for passage in passages]
    path.write_text(json.dumps([{"conversations": pair} for pair in turns]))


def bench_serving(server: Server, model: Path) -> dict[str, float]:
    """SGLang's load generator with shared prefixes; its own figures."""
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"]
    command += ["--base-url", server.url, "--model", str(model)]
    command += ["--dataset-name", "generated-shared-prefix", *LOAD]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in FIGURES.findall(output)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="more server flags, after --")
    args = parser.parse_args()
    with launch(
        args.model, args=[*FLAGS, *args.flags], env=STRICT | {"SGLANG_TEST_RETRACT": "0"}
    ) as server:
        engaged = server.banner() is not None
        random.seed(0)
        started = time.monotonic()
        run_radix_attention_test(server.url)
        radix_seconds = time.monotonic() - started
        with tempfile.NamedTemporaryFile(suffix=".json") as conversations:
            write_conversations(args.text.read_text(), Path(conversations.name))
            hits = run_multiturn_cache_hit_test(
                server.url, str(args.model), num_clients=4, dataset_path=conversations.name
            )
        load = bench_serving(server, args.model)
        time.sleep(3)  # the idle check runs
        faults = sorted(set(FAULTS.findall(server.log_text())))
    result = {
        "model": args.model.name,
        "engaged": engaged,
        "radix_cache_server_kit": {"passed": True, "seconds": round(radix_seconds, 1)},
        "cache_hit_kit": {"passed": True, **hits},
        "bench_serving": load,
        "faults_in_log": faults,
    }
    print(result)
    save(args.json, result)
    if faults or not engaged:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
