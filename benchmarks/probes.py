"""What perplexity hides: is what a model finds in a long dense context found in every tier too?

usage: python benchmarks/probes.py --model DIR --text FILE [--frames FILE] [--json OUT]
       [-- FLAGS of every server]

Needles, quotations and chains of variables (`probe_items.py`) in haystacks made of the text; greedy
answers, scored by exact string match. One server after another: a dense one, then one per tier,
which is asked only what the dense one found. A haystack goes in as a request of its own, and its
pages then go to the server's budget; each question is a second request over that cached prefix. A
reply is refused unless the prefix came from the cache and, by the server's own count of the memory
that the request holds, was at the tier. A tier's server first reads 2,048 tokens that are in no
haystack, from which it learns its frames where no calibration file has them. On a GPU the dense
server attends with FlashInfer, which wants --dtype bfloat16, and `triton` among the tiers is a
second dense server, of SGLang's other attention: what it loses, other rounding alone loses.

What --json leaves:

    model, text, seed, dtype, frames, flags   what decides the answers
    items[]     kind, length [tokens of haystack, question and answer], depth [0 to 1], question,
                expected, answers {server: text}, found {server: bool}; of the servers asked
    summary     {kind or `all`: {length or `all`: {asked, dense: found by the dense server,
                tier: found by the tier's server too}}}
    command, machine, versions

An interrupted run leaves its answers in OUT.partial; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import probe_items
import requests
from client import Reply, save
from probe_items import KINDS, MOST_PER_KIND, QUESTION_TOKENS, Encode, Haystack, Item
from probe_run import DENSE, Run, summarise, table
from tqdm import tqdm

from sglang_spherical.banner import Banner
from sglang_spherical.config import PAGE_SIZES, TIERS, SphericalConfig
from sglang_spherical.evaluation.inputs import DTYPES, require_model
from sglang_spherical.server import Server, has_gpu, launch

FRAME_TOKENS = 2048  # read first by a tier's server
SHORTEST_LENGTH = 2048
SPARE_ANSWER_TOKENS = 4  # above what the expected answer takes
TIMEOUT_SECONDS = 7200  # a CPU reads 8K tokens with a model of billions for many minutes
CONTROL = "triton"  # a dense server that rounds otherwise than the first one
HELD = re.compile(r"Decode batch.*#(?:full )?token: (\d+)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, in one line, on arguments that cannot hold."""
    require_model(args.model)
    for flag, file in (("text", args.text), ("frames", args.frames)):
        if file is not None and not file.is_file():
            raise ValueError(f"--{flag} {file}: no such file")
    tiers = (*TIERS, *([CONTROL] if has_gpu() else []))
    for flag, given, known in (("kinds", args.kinds, KINDS), ("tiers", args.tiers, tiers)):
        for name in given:
            if name not in known:
                raise ValueError(f"--{flag} {name}: expected any of {', '.join(known)}")
    config = json.loads((args.model / "config.json").read_text())
    longest = config.get("max_position_embeddings") or max(args.lengths)
    for length in args.lengths:
        if not SHORTEST_LENGTH <= length <= longest:
            raise ValueError(f"--lengths {length}: expected {SHORTEST_LENGTH} to {longest} tokens")
    most = MOST_PER_KIND * len(args.kinds)
    if not 1 <= args.per_haystack <= most:
        raise ValueError(
            f"--per-haystack {args.per_haystack}: expected 1 to {most}, {MOST_PER_KIND} of a kind"
        )
    if args.items < 1:
        raise ValueError(f"--items {args.items}: expected 1 or more")


def load_encode(model: Path) -> Encode:
    """The model's tokenizer, without special tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"--model {model}: no tokenizer that transformers can load") from None
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def plan(args: argparse.Namespace) -> Run:
    """Everything that is to be asked. Raises ValueError on bad input."""
    check(args)
    encode = load_encode(args.model)
    prose = probe_items.Prose.read(args.text.read_text("utf-8", errors="replace"), encode)
    need = max(args.lengths) + FRAME_TOKENS
    if prose.tokens < need:
        raise ValueError(
            f"--text {args.text}: {prose.tokens:,} tokens, expected {need:,} or more: use a longer "
            "text or smaller --lengths"
        )
    prose, tail = prose.split(FRAME_TOKENS)
    full, rest = divmod(args.items, args.per_haystack)
    groups = [args.per_haystack] * full + [rest] * bool(rest)
    haystacks = [
        haystack
        for length in args.lengths
        for haystack in probe_items.make_haystacks(
            prose, encode, args.kinds, length, groups, args.seed
        )
    ]
    settings = {
        "model": args.model.resolve().name,
        "text": args.text.name,
        "seed": args.seed,
        "dtype": args.dtype,
        "frames": args.frames and args.frames.name,
        "flags": args.flags,
    }
    partial = args.json and args.json.with_name(f"{args.json.name}.partial")
    return Run(settings, encode, tail, haystacks, partial)


def server_args(server: str, args: argparse.Namespace, haystack_tokens: list[int]) -> list[str]:
    """Flags of the dense server, or of a tier's, for haystacks of these lengths."""
    # The dense server may forget old haystacks. A tier's must have room for all, with their
    # questions: short of memory it would lower what is still to be read.
    room = [tokens + args.per_haystack * QUESTION_TOKENS for tokens in haystack_tokens]
    held = (sum(room) if server in TIERS else max(room)) + FRAME_TOKENS
    page = max(PAGE_SIZES)
    common = ["--max-total-tokens", str(-(-held // page) * page), "--dtype", args.dtype]
    common += ["--watchdog-timeout", str(TIMEOUT_SECONDS)]
    common += args.flags
    if server not in TIERS:
        dense = CONTROL if server == CONTROL else "flashinfer" if has_gpu() else "torch_native"
        return [*common, "--attention-backend", dense]
    tier = ["--kv-format", "spherical", "--spherical-budget", server]
    if args.frames is not None:
        tier += ["--spherical-frames", str(args.frames)]
    return [*common, *tier, "--decode-log-interval", "1"]


def ask(url: str, prompt: list[int], new_tokens: int) -> Reply:
    """Greedy continuation by exactly `new_tokens` tokens, however long it takes."""
    sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling}
    reply = requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_SECONDS)
    reply.raise_for_status()
    said = reply.json()
    meta, seconds = said["meta_info"], reply.elapsed.total_seconds()
    cached = meta["cached_tokens"]
    return Reply(said["text"], said["output_ids"], meta["prompt_tokens"], cached, seconds)


def require_cached(reply: Reply, haystack_tokens: int) -> None:
    """Raises ValueError unless a haystack's whole pages came from the cache."""
    page = max(PAGE_SIZES)
    need = haystack_tokens // page * page
    if reply.cached_tokens < need:
        raise ValueError(
            f"{reply.cached_tokens} of {reply.prompt_tokens} prompt tokens came from the cache, "
            f"expected {need}: not scored"
        )


def require_tier(log: str, banner: Banner, tier: str, prompt_tokens: int) -> None:
    """Raises ValueError unless a request held as much memory as its prefix takes at `tier`.

    log  what the server wrote while it answered: the memory held at each step, in hot tokens
    """
    held = max(map(int, HELD.findall(log)), default=0)
    page = banner.page_size
    lowered = (prompt_tokens - SphericalConfig.recent_tokens) // page - 1  # all but the sinks
    saved = lowered * page * (1 - getattr(banner, tier) / banner.hot)
    expected = -(-prompt_tokens // page) * page - saved
    # Other questions may have lowered another page, and the answer may have begun one.
    if abs(held - expected) > 2 * page:
        raise ValueError(
            f"a question of {prompt_tokens} tokens held the memory of {held} hot tokens, expected "
            f"about {expected:.0f} at tier {tier}: not scored"
        )


def answer(server: Server, name: str, haystack: Haystack, item: Item, encode: Encode) -> str:
    """What a server says to a question over a haystack that it has read.

    Raises ValueError when the question is too long, or the haystack was not read from the cache at
    the tier.
    """
    prompt = haystack.tokens + encode(f"\n\n{item.question}")
    new_tokens = len(encode(f" {item.expected}")) + SPARE_ANSWER_TOKENS
    if len(prompt) + new_tokens > item.length:
        raise ValueError(f"{item.question!r} takes more than {QUESTION_TOKENS} tokens")
    logged = len(server.log_text())
    reply = ask(server.url, prompt, new_tokens)
    require_cached(reply, len(haystack.tokens))
    banner = server.banner()
    if name in TIERS:
        assert banner is not None, "a spherical server does not start without its banner"
        require_tier(server.log_text()[logged:], banner, name, reply.prompt_tokens)
    return reply.text


def run_server(name: str, run: Run, args: argparse.Namespace) -> None:
    """Asks one server everything that it has not answered yet."""
    work = list(run.pending(name))
    if not work:
        return
    flags = server_args(name, args, [len(haystack.tokens) for haystack, _ in work])
    total = sum(len(probes) for _, probes in work)
    with launch(args.model, args=flags) as server, tqdm(desc=name, total=total) as progress:
        if name in TIERS:
            ask(server.url, run.tail, 1)
        for haystack, probes in work:
            ask(server.url, haystack.tokens, 1)
            for probe in probes:
                probe.answers[name] = answer(server, name, haystack, probe.item, run.encode)
                run.keep()
                progress.update()


def finish(run: Run, args: argparse.Namespace) -> None:
    """Prints the table and writes the result."""
    summary = summarise(run.probes, args.tiers)
    print(table(summary, args.tiers))
    save(args.json, {**run.settings, "items": run.results(), "summary": summary})
    if run.partial is not None:
        run.partial.unlink(missing_ok=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--text", type=Path, required=True, help="prose for the haystacks, UTF-8")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument(
        "--tiers",
        nargs="*",
        default=["hot", "warm", "cold"],
        help="--spherical-budget; none: dense alone",
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--items", type=int, default=24, help="of each length (default: 24)")
    parser.add_argument(
        "--per-haystack", type=int, default=12, help="items that share a haystack (default: 12)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--frames", type=Path, help="calibration file of the tiers' servers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="after --: further flags of every server")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    try:
        run = plan(args)
        resumed = run.resume()
        if resumed:
            print(f"{run.partial}: going on from {resumed} answers")
        for name in (DENSE, *args.tiers):
            run_server(name, run, args)
        finish(run, args)
    except (ValueError, requests.RequestException) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
