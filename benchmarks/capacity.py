"""How many prefix tokens stay cached in the same memory? Dense against spherical.

usage: python benchmarks/capacity.py --model DIR [--kv-mib 64] [--json OUT]

Both servers get the same bytes of KV memory and the same stream of distinct prompts, more than
either can hold. Then the prompts are asked again, newest first, until one misses: what hits, by the
servers' own `cached_tokens`, is resident.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from client import generate, save

from sglang_spherical.server import launch


def resident_tokens(url: str, prompts: list[list[int]]) -> int:
    """Tokens of `prompts` that a server still has after seeing them all."""
    for prompt in prompts:
        generate(url, prompt, 1)
    total = 0
    for prompt in reversed(prompts):
        cached = generate(url, prompt, 1).cached_tokens
        if cached < len(prompt) // 2:
            return total
        total += cached
    raise ValueError("every prompt is still cached: raise --prompts or lower --kv-mib")


def dense_bytes_per_token(model: Path) -> int:
    """Bytes of a token in SGLang's bf16 pool."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads: int = config.get("num_key_value_heads", heads)
    layers: int = config["num_hidden_layers"]
    return 2 * 2 * layers * kv_heads * int(head_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kv-mib", type=int, default=64, help="KV memory of each server, MiB")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)
    prompts = [
        [rng.randrange(1000, 20000) for _ in range(args.tokens)] for _ in range(args.prompts)
    ]
    kv_bytes = args.kv_mib << 20
    tokens = kv_bytes // dense_bytes_per_token(args.model)
    flags = {
        "dense": ["--attention-backend", "torch_native", "--max-total-tokens", str(tokens)],
        "spherical": ["--kv-format", "spherical", "--spherical-kv-bytes", str(kv_bytes)],
    }
    resident = {}
    for name, extra in flags.items():
        with launch(args.model, args=extra) as server:
            resident[name] = resident_tokens(server.url, prompts)
        print(f"{name}: {resident[name]} tokens resident in {args.kv_mib} MiB", flush=True)
    ratio = resident["spherical"] / resident["dense"]
    print(f"spherical holds {ratio:.2f}x the tokens")
    save(args.json, {"model": args.model.name, "kv_bytes": kv_bytes, "resident": resident})


if __name__ == "__main__":
    main()
