"""Serve a model from a spherical KV cache, hold a three-turn chat over the OpenAI API, and report.

The answers stream to the terminal. The last line is `DEMO {json}`: `engaged`, `turns[]` with
`cached_tokens`, `bytes_per_token` by tier beside bf16's, and `tok_s`, decoded tokens per second.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_spherical import models
from sglang_spherical.config import KV_FORMATS
from sglang_spherical.server import Server, launch

STORY = """\
The lighthouse at Gull Point had been dark for eleven years when Marta Olsen bought it for the
price of a used car. The roof leaked, the iron stairs had rusted through in two places, and the
great lens, as tall as a man, was so dirty that the sun made only brown spots on the floor. Her
brother Jonas, who repaired clocks in the town of Varen, told her that she was mad, and came to
help every Sunday.

They began with the stairs. Jonas cut new steps from a ship's plate that he had found in the
harbour, and Marta painted each of them green, because green was the only paint the shop would
give her on credit. In March they mended the roof. In April a storm took half of it away again,
and they mended it once more, this time with copper nails and a good deal of swearing.

The lens was the work of the whole summer. It was made of two hundred and six prisms in a frame
of brass, and every prism had to be lifted out, washed in warm water with a spoon of vinegar,
dried with a linen cloth and set back at its own angle. Marta kept a notebook with a drawing of
each one. A boy called Pelle, who was nine and came because nobody at home had time for him,
learned to read the numbers aloud, and never once confused them. When a prism turned out to be
cracked, an old glass grinder in Varen made another and would take no money; he asked to be
allowed to see the light, that was all.

On the last evening of September they carried the new lamp up. The whole town stood on the
beach. Jonas wound the clockwork that turns the lens, Pelle counted down from ten, and Marta
closed the switch. For a moment nothing happened. Then a white beam walked slowly over the
water, over the boats and over the faces on the beach, and the old glass grinder took off his
hat. Far out, past the reef, a fishing boat answered with its horn.
"""

QUESTIONS = (
    f"Here is a story.\n\n{STORY}\nWho are the people in this story? Answer in two sentences.",
    "What was the hardest part of the work, and why?",
    "Suggest a title for the story, and say in one sentence why it fits.",
)


@dataclass(frozen=True)
class Turn:
    """What the server reported for one question."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the radix cache
    completion_tokens: int
    first_token_seconds: float
    decode_seconds: float  # from the first token to the last


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="a model directory (default: SmolLM2-135M-Instruct, from PyPI)"
    )
    parser.add_argument(
        "--kv-format", choices=KV_FORMATS, default="spherical", help="default: %(default)s"
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="longest answer, in tokens (default: 64)"
    )
    parser.add_argument(
        "--server-args", default="", help="more arguments for sglang.launch_server, in one string"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when spherical serving was asked for and did not engage."""
    model = args.model or models.smollm2()
    if not model.is_dir():
        raise ValueError(f"--model {model}: expected a model directory")
    with launch(model, args.port, _server_args(args)) as server:
        turns = list(_chat(server, args.max_tokens))
        report = _report(server, turns)
    spherical: bool = args.kv_format == "spherical"
    print(f"DEMO {json.dumps(report)}", flush=True)
    return int(spherical and not report["engaged"])


def _server_args(args: argparse.Namespace) -> list[str]:
    given = ["--enable-cache-report", *shlex.split(args.server_args)]
    if args.kv_format == "spherical":
        return ["--kv-format", "spherical", *given]
    return ["--attention-backend", "torch_native", *given]


def _chat(server: Server, max_tokens: int) -> Iterator[Turn]:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages: list[dict[str, str]] = []
    for number, question in enumerate(QUESTIONS, start=1):
        messages.append({"role": "user", "content": question})
        print(f"\n[turn {number}] {question.splitlines()[-1]}")
        turn, answer = _ask(client, messages, max_tokens)
        messages.append({"role": "assistant", "content": answer})
        print(
            f"  ({turn.prompt_tokens} prompt tokens, {turn.cached_tokens} from the cache, "
            f"{turn.completion_tokens} answered; first after {turn.first_token_seconds:.1f} s)"
        )
        yield turn


def _ask(client: Any, messages: list[dict[str, str]], max_tokens: int) -> tuple[Turn, str]:
    """Stream one answer to the terminal."""
    started = first = last = time.monotonic()
    answer: list[str] = []
    usage = None
    stream = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        usage = event.usage or usage
        text = event.choices[0].delta.content if event.choices else None
        if text:
            last = time.monotonic()
            first = last if not answer else first
            answer.append(text)
            print(text, end="", flush=True)
    print()
    if usage is None:
        raise ValueError("the server ended the stream without a usage report")
    details = usage.prompt_tokens_details
    cached_tokens = (details.cached_tokens or 0) if details else 0
    seconds = (first - started, last - first)
    turn = Turn(usage.prompt_tokens, cached_tokens, usage.completion_tokens, *seconds)
    return turn, "".join(answer)


def _report(server: Server, turns: list[Turn]) -> dict[str, Any]:
    banner = server.banner()
    decoded_tokens = sum(turn.completion_tokens - 1 for turn in turns)
    tok_s = round(decoded_tokens / max(sum(turn.decode_seconds for turn in turns), 1e-9), 1)
    bytes_per_token = None
    print()
    if banner is not None:
        bytes_per_token = {t: getattr(banner, t) for t in ("hot", "warm", "cold", "bf16")}
        for tier in ("hot", "warm", "cold"):
            ratio = bytes_per_token[tier] / banner.bf16
            print(
                f"KV bytes per token, {tier:<4}: {bytes_per_token[tier]:8.0f} = {ratio:.3f} × bf16"
            )
        print(f"KV bytes per token, bf16: {banner.bf16:8.0f}")
    cached = ", ".join(str(turn.cached_tokens) for turn in turns[1:])
    print(f"cached_tokens of turns 2 and 3: {cached}\ntokens per second: {tok_s}")
    return {
        "engaged": banner is not None,
        "turns": [asdict(turn) for turn in turns],
        "bytes_per_token": bytes_per_token,
        "tok_s": tok_s,
    }
