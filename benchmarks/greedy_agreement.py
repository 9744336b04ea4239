"""Do greedy answers survive the cache? A dense server against spherical ones, in float32.

usage: python benchmarks/greedy_agreement.py --model DIR --text FILE [--tiers hot warm] [--json OUT]

Each prompt is a passage of the text and an instruction, in the model's chat template, sent twice:
the second time its prefix comes from the cache, at the tier under test. Compared is the second
answer. With --continue the model just continues the passage: closer calls, a harder test.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from client import generate, save

from sglang_spherical.server import launch

PASSAGE_CHARACTERS = 2500
COMMON = ["--dtype", "float32"]


INSTRUCTIONS = (
    "Summarise the passage in two sentences.",
    "What is the passage about?",
    "List the main points of the passage.",
    "Explain the passage to a child.",
    "Which experiment does the passage describe?",
    "Rewrite the first sentence of the passage in modern English.",
    "Which words of the passage are technical terms, and what do they mean?",
    "What question does the author try to answer?",
    "Give the passage a title and say why it fits.",
    "Write three questions that the passage answers.",
)


def chats(model: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of a chat about each of `texts`, ready for the answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = []
    for i, text in enumerate(texts):
        content = f"{text}\n\n{INSTRUCTIONS[i % len(INSTRUCTIONS)]}"
        turn = [{"role": "user", "content": content}]
        rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer.encode(rendered, add_special_tokens=False))
    return prompts


def passages(text: str, count: int) -> list[str]:
    """`count` passages spread over the text."""
    step = (len(text) - PASSAGE_CHARACTERS) // count
    return [text[i * step : i * step + PASSAGE_CHARACTERS] for i in range(count)]


def answers(
    model: Path, args: list[str], prompts: list[str] | list[list[int]], new_tokens: int
) -> list[list[int]]:
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
    parser.add_argument("--continue", dest="continued", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = passages(args.text.read_text(), args.prompts)
    prompts = texts if args.continued else chats(args.model, texts)
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
    kind = "continue" if args.continued else "chat"
    save(
        args.json,
        {"model": args.model.name, "prompts": kind, "tokens": args.tokens, "tiers": tiers},
    )


if __name__ == "__main__":
    main()
