"""Do greedy answers survive the cache? A dense server against spherical ones, in float32.

usage: python benchmarks/greedy_agreement.py --model DIR --text FILE [--tiers hot warm] [--json OUT]

Each prompt is a passage of the text, sent twice: the second time its prefix comes from the cache,
at the tier under test. Compared is the second answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from client import generate, save

from sglang_spherical.server import launch

PASSAGE_CHARACTERS = 4000
COMMON = ["--dtype", "float32"]


def passages(text: str, count: int) -> list[str]:
    """`count` passages spread over the text."""
    step = (len(text) - PASSAGE_CHARACTERS) // count
    return [text[i * step : i * step + PASSAGE_CHARACTERS] for i in range(count)]


def answers(model: Path, args: list[str], prompts: list[str], new_tokens: int) -> list[list[int]]:
    """Token ids of the second answer to every prompt."""
    with launch(model, args=[*COMMON, *args]) as server:
        replies = []
        for prompt in prompts:
            generate(server.url, prompt, 1)
            replies.append(generate(server.url, prompt, new_tokens))
        assert all(reply.cached_tokens for reply in replies), "the prefix cache was not used"
        return [reply.tokens for reply in replies]


def common_length(a: list[int], b: list[int]) -> int:
    """Tokens until the first difference."""
    return next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tiers", nargs="+", default=["hot", "warm"], help="--spherical-budget")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = passages(args.text.read_text(), args.prompts)
    dense = answers(args.model, ["--attention-backend", "torch_native"], prompts, args.tokens)
    tiers: dict[str, object] = {}
    for tier in args.tiers:
        flags = ["--kv-format", "spherical", "--spherical-budget", tier]
        ours = answers(args.model, flags, prompts, args.tokens)
        lengths = [common_length(a, b) for a, b in zip(dense, ours)]
        identical = sum(length >= args.tokens for length in lengths)
        tiers[tier] = {"identical": identical, "common_tokens": lengths}
        print(
            f"{tier}: {identical} of {len(prompts)} identical over {args.tokens} tokens; {lengths}"
        )
    save(args.json, {"model": args.model.name, "tokens": args.tokens, "tiers": tiers})


if __name__ == "__main__":
    main()
