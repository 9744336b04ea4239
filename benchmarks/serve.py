"""Whole servers on one GPU, one after the other: inter-token latency and KV capacity.

usage: python benchmarks/serve.py [--servers spherical flashinfer flashinfer_fp8]
       [--points 8192,1 32768,1 130000,1 32768,16 8192,64] [--model DIR] [--log-dir DIR]
       [--beside JSON ...] [--json OUT] [-- FLAGS of every server]

Without a model the servers have Llama-3.1-8B's geometry and random weights: the words mean nothing,
the times do. A point is CONTEXT,BATCH. A first pass fills the prefix cache, a second one compiles,
and a moment of rest lets a spherical server give what it holds its precision;
the inter-token latency is the difference between a long and a short continuation of the cached
prompts, so that prefill and HTTP cancel. Over the points of one request it is fitted as slope *
context + intercept. A spherical server whose log lacks the banner of its cache is not measured.
--beside takes servers into the table and the JSON that another call measured, on another GPU of the
host.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from client import generate, generate_together, keep_garbage_out, save

from sglang_spherical.banner import Banner
from sglang_spherical.server import Server, ServerFailed, launch

SERVERS = {
    "spherical": ["--kv-format", "spherical"],
    "flashinfer": ["--attention-backend", "flashinfer"],
    "flashinfer_fp8": ["--attention-backend", "flashinfer", "--kv-cache-dtype", "fp8_e4m3"],
}
COMMON = [
    "--load-format", "dummy", "--skip-tokenizer-init", "--mem-fraction-static", "0.85",
    "--context-length", "131072", "--grammar-backend", "none", "--sampling-backend", "pytorch",
    "--disable-prefill-cuda-graph",
]  # fmt: skip
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
SHORT, LONG = 2, 130
REST_S = 2
TOKEN_IDS = range(1000, 40000)
POINTS = ["8192,1", "32768,1", "130000,1", "32768,16", "8192,64"]


def measure(url: str, context: int, batch: int, vocabulary: range) -> dict[str, Any]:
    """One point: seconds of the passes, and milliseconds between the tokens of a request."""
    rng = random.Random(context * 1000 + batch)
    prompts = [rng.choices(vocabulary, k=context) for _ in range(batch)]
    fill = generate_together(url, prompts, SHORT)
    again = generate_together(url, prompts, SHORT)
    time.sleep(REST_S)
    short = min(generate_together(url, prompts, SHORT) for _ in range(2))
    long = generate_together(url, prompts, LONG)
    itl_ms = (long - short) / (LONG - SHORT) * 1e3
    return {
        "context": context, "batch": batch, "fill_s": fill, "second_pass_s": again,
        "cached_pass_s": short, "itl_ms": itl_ms, "tokens_per_s": batch / itl_ms * 1e3,
        "cached_tokens": generate(url, prompts[0], SHORT).cached_tokens,
    }  # fmt: skip


def fit(points: list[dict[str, Any]]) -> dict[str, float] | None:
    """ITL of one request as microseconds per 1,000 tokens of context, and what remains."""
    alone = [point for point in points if point["batch"] == 1]
    if len(alone) < 2:
        return None
    x, y = ([point[key] for point in alone] for key in ("context", "itl_ms"))
    slope, intercept = np.polyfit(x, y, 1)
    return {"us_per_1k_tokens": float(slope) * 1e6, "intercept_ms": float(intercept)}


def capacity(server: Server) -> dict[str, Any]:
    """Tokens that the KV cache holds, by tier, and bytes per token, all layers."""
    found = re.search(r"max_total_num_tokens=(\d+)", server.log_text())
    tokens = int(found.group(1)) if found else None
    banner = server.banner()
    if banner is None:
        return {"max_total_num_tokens": tokens}
    tiers = {"hot": banner.hot, "warm": banner.warm, "cold": banner.cold}
    return {
        "max_total_num_tokens": tokens,
        "arena_bytes": banner.arena_bytes,
        "bytes_per_token": tiers | {"bf16": banner.bf16},
        "tokens": {name: int(banner.arena_bytes / size) for name, size in tiers.items()},
    }


def run(
    name: str, model: str, args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One server: its points, one line each as they come, and handed to `keep` each time."""
    points = [tuple(map(int, point.split(","))) for point in args.points]
    widest = str(max(batch for _, batch in points))
    flags = [*COMMON, *SERVERS[name], "--cuda-graph-max-bs-decode", widest]
    flags += ["--max-running-requests", widest, *args.args]
    log = args.log_dir / f"{name}.log" if args.log_dir else None
    started = time.monotonic()
    with launch(model, args=flags, log=log) as server:
        ready_s = time.monotonic() - started
        banner: Banner | None = server.banner()
        if name != "spherical":
            keep_garbage_out(server.url)
        elif banner is None:
            raise ServerFailed("the log lacks the line `spherical KV engaged:`: not measured")
        config = json.loads((Path(model) / "config.json").read_text())
        result: dict[str, Any] = {"ready_s": ready_s, "capacity": capacity(server)}
        print(f"{name}: ready after {ready_s:.0f} s, {result['capacity']}", flush=True)
        result["points"] = rows = []
        vocabulary = range(min(TOKEN_IDS.start, config["vocab_size"] // 2),
                           min(TOKEN_IDS.stop, config["vocab_size"]))  # fmt: skip
        for context, batch in points:
            try:
                row = measure(server.url, context, batch, vocabulary)
            except Exception as error:
                print(f"{name} {context},{batch}: {type(error).__name__} {str(error)[:300]}")
                result["failed"] = {"context": context, "batch": batch, "error": str(error)[:300]}
                break
            rows.append(row)
            keep(result)
            print(
                f"{name:15s} {context:6d} x{batch:3d}  ITL {row['itl_ms']:7.3f} ms  "
                f"{row['tokens_per_s']:8.1f} tok/s  fill {row['fill_s']:6.2f} s  "
                f"cached pass {row['cached_pass_s']:5.2f} s  cached {row['cached_tokens']}",
                flush=True,
            )
        result["fit"] = fit(rows)
    return result


def table(found: dict[str, dict[str, Any]]) -> str:
    """ITL in milliseconds by point and server, and ratios to the first server."""
    first = next(iter(found))
    keys = [(row["context"], row["batch"]) for row in found[first].get("points", [])]
    lines = ["context x batch  " + "".join(f"{name:>18s}" for name in found)]
    for context, batch in keys:
        cells, base = "", None
        for result in found.values():
            itl = next((row["itl_ms"] for row in result.get("points", [])
                        if (row["context"], row["batch"]) == (context, batch)), None)  # fmt: skip
            base = itl if base is None else base
            cells += f"{itl:9.3f} ({itl / base:5.2f}x)" if itl and base else " " * 18
        lines.append(f"{context:7d} x {batch:4d}   {cells}")
    for name, result in found.items():
        if result.get("fit"):
            slope, rest = result["fit"].values()
            lines.append(f"{name}: {slope:.2f} us per 1,000 tokens, {rest:.3f} ms besides")
    return "\n".join(lines)


def command() -> str:
    """How this was called, paths cut to their last part."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python benchmarks/serve.py", *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS)[:2])
    parser.add_argument("--points", nargs="+", default=POINTS, metavar="CONTEXT,BATCH")
    parser.add_argument("--model", help="folder with a config.json; weights are never read")
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("--beside", type=Path, nargs="*", default=[], metavar="JSON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("args", nargs="*", help="after --: further flags of every server")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        model_name = Path(args.model).name if args.model else "Llama-3.1-8B geometry"

        def keep(name: str, result: dict[str, Any]) -> None:
            found[name] = result
            save(args.json, {"command": command(), "model": model_name, "servers": found})

        for name in args.servers:
            try:
                keep(name, run(name, args.model or folder, args, partial(keep, name)))
            except ServerFailed as error:
                print(f"{name}: {str(error)[:500]}", flush=True)
                keep(name, {"failed": str(error).partition(" (log:")[0][:500]})
        for path in args.beside:
            other = json.loads(path.read_text())
            for name, result in other["servers"].items():
                keep(name, result | {"command": other["command"]})
    print(table(found))


if __name__ == "__main__":
    main()
