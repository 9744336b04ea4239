"""Greedy answers of real engines: dense against spherical, with and without CUDA graphs.

usage: python benchmarks/serve_check.py [--engines dense eager graphs retract] [--model DIR]
       [--join FILE ...] [--known FILE] [--json OUT]

Without a model it makes a random one: four layers, four query and two KV heads of 128. Every engine
answers the same prompts: alone, as a second turn on the cached first one, in one batch, and again
after a flush. Prompts are longer than a prefill chunk. Exits with 1 when

* the spherical answers of `eager` and `graphs`, one at a time, are not the same tokens,
* an answer changes with a flush,
* a second turn finds less than the whole pages of the first one in the cache,
* fewer than half of the answers begin with the tokens of the dense engine.

`--join` judges answers together with those that other runs wrote with --json, `--known` compares
with such answers of another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 32
BEGINNING = 8  # tokens that a close answer shares with the dense one
LENGTHS = [20, 63, 64, 130, 200, 333, 640, 1000]
PAGE = 64
CHUNK = 256
SPHERICAL = {"kv_format": "spherical", "page_size": PAGE}
GPU = torch.cuda.is_available()
ENGINES: dict[str, dict[str, Any]] = {
    "dense": {
        "attention_backend": "triton" if GPU else "torch_native",
        "page_size": 1,
        "disable_cuda_graph": True,
    },
    "eager": SPHERICAL | {"disable_cuda_graph": True},
    "graphs": SPHERICAL | {"cuda_graph_max_bs_decode": 8},
    "no_overlap": SPHERICAL | {"disable_overlap_schedule": True, "cuda_graph_max_bs_decode": 8},
    "prefill_graphs": SPHERICAL
    | {"cuda_graph_max_bs_decode": 8, "disable_prefill_cuda_graph": False},
    "retract": SPHERICAL | {"cuda_graph_max_bs_decode": 8, "max_total_tokens": 4096},
}
COMMON = {
    "max_total_tokens": 16384, "max_running_requests": 16, "chunked_prefill_size": CHUNK,
    "mem_fraction_static": 0.3, "log_level": "info", "random_seed": 1,
    "sampling_backend": "pytorch", "grammar_backend": "none", "skip_tokenizer_init": True,
    "disable_prefill_cuda_graph": True,
}  # fmt: skip
CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "eos_token_id": 2,
    "bos_token_id": 1, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def make_model(folder: Path) -> Path:
    """The same random Llama on every machine, written into `folder`."""
    from safetensors.torch import save_file

    hidden, inner, vocabulary = 256, 512, CONFIG["vocab_size"]
    shapes = {"embed_tokens.weight": (vocabulary, hidden), "norm.weight": (hidden,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes |= {
            f"layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (512, hidden), "self_attn.k_proj": (256, hidden),
                "self_attn.v_proj": (256, hidden), "self_attn.o_proj": (hidden, 512),
                "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    weights = {
        f"model.{name}": torch.ones(shape) if len(shape) == 1
        else torch.randn(shape, generator=rng) * 0.09
        for name, shape in shapes.items()
    }  # fmt: skip
    # What attention adds decides between words, and what codes change of it between near ties.
    weights["model.embed_tokens.weight"] *= 1 / 0.09
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] *= 0.1
    weights["lm_head.weight"] = torch.randn(vocabulary, hidden, generator=rng) * 0.09
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def prompts_for(model: Path) -> list[list[int]]:
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    return [[rng.randrange(100, vocabulary) for _ in range(length)] for length in LENGTHS]


class Client:
    """An engine and what it answers."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def ask(self, prompts: list[list[int]], tokens: int = NEW_TOKENS) -> list[dict[str, Any]]:
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answers = self.engine.generate(input_ids=prompts, sampling_params=sampling)
        return answers if isinstance(answers, list) else [answers]

    def alone(self, prompts: list[list[int]]) -> list[list[int]]:
        return [self.ask([prompt])[0]["output_ids"] for prompt in prompts]


def answer_all(client: Client, prompts: list[list[int]]) -> dict[str, Any]:
    first = client.alone(prompts)
    turns = [prompt + answer + prompt[:7] for prompt, answer in zip(prompts, first)]
    second, cached = [], []
    for turn in turns:
        (answer,) = client.ask([turn])
        second.append(answer["output_ids"])
        cached.append(answer["meta_info"]["cached_tokens"])
    together = [answer["output_ids"] for answer in client.ask(prompts)]
    while not client.engine.flush_cache().success:  # refused until the last batch is booked
        time.sleep(0.5)
    after_flush = client.alone(prompts)
    return {
        "first": first, "second": second, "cached": cached, "together": together,
        "after_flush": after_flush,
    }  # fmt: skip


def run(name: str, model: Path, prompts: list[list[int]]) -> dict[str, Any]:
    import sglang

    options = COMMON | ENGINES[name] | ({} if GPU else {"device": "cpu"})
    options["port"] = 31000 + 2000 * list(ENGINES).index(name)  # several may run at once
    environment = dict(CHECKS)
    if name == "retract":
        environment["SGLANG_TEST_RETRACT"] = "1"
    os.environ.update(environment)
    started = time.monotonic()
    try:
        with sglang.Engine(model_path=str(model), **options) as engine:
            ready = time.monotonic() - started
            client = Client(engine)
            if name == "retract":
                many = [prompts[4 + i % 4][: 300 + i] for i in range(12)]
                found: dict[str, Any] = {"first": [a["output_ids"] for a in client.ask(many, 100)]}
            else:
                found = answer_all(client, prompts)
        print(f"{name}: ready after {ready:.0f} s, {time.monotonic() - started:.0f} s", flush=True)
        return found
    finally:
        for variable in environment:
            os.environ.pop(variable, None)


def shared(answers: list[list[int]], others: list[list[int]]) -> list[int]:
    """How many tokens each pair has in common before the first difference."""
    counts = []
    for one, other in zip(answers, others):
        same = [a == b for a, b in zip(one, other)]
        counts.append(same.index(False) if False in same else len(same))
    return counts


def judge(found: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong, one line each."""
    faults = []
    for name in ("eager", "graphs", "no_overlap", "prefill_graphs"):
        if name not in found:
            continue
        mine = found[name]
        if "dense" in found:
            for turn in ("first", "second", "together"):
                counts = shared(mine[turn], found["dense"][turn])
                print(f"{name} {turn}: tokens as dense {counts}")
                if turn != "second" and sum(c >= BEGINNING for c in counts) * 2 < len(counts):
                    faults.append(f"{name}: {turn} answers differ from the dense ones: {counts}")
        flushed = shared(mine["first"], mine["after_flush"])
        print(
            f"{name}: after a flush {flushed}; together {shared(mine['first'], mine['together'])}"
        )
        if min(flushed) < NEW_TOKENS:
            faults.append(f"{name}: answers change with a flush: {flushed}")
        for length, cached in zip(LENGTHS, mine["cached"]):
            if cached < (length + NEW_TOKENS - 1) // PAGE * PAGE:
                faults.append(f"{name}: a turn after {length} tokens found {cached} cached")
        for other in ("eager", "graphs"):
            if other != name and other in found:
                counts = shared(mine["first"], found[other]["first"])
                print(f"{name}: tokens as {other} {counts}")
                if min(counts) < NEW_TOKENS:
                    faults.append(f"{name}: answers differ from {other}: {counts}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--join", nargs="+", type=Path, default=[])
    parser.add_argument("--known", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = args.model or make_model(Path(tempfile.mkdtemp()))
    prompts = prompts_for(model)
    found: dict[str, dict[str, Any]] = {}
    faults = []
    for path in args.join:
        found |= json.loads(path.read_text())
    for name in args.engines:
        try:
            found[name] = run(name, model, prompts)
        except Exception as error:
            traceback.print_exc()
            faults.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")
    faults += judge(found)
    if args.known:
        known = json.loads(args.known.read_text())
        for name in known.keys() & found.keys():
            print(f"{name}: as known {shared(found[name]['first'], known[name]['first'])}")
    print("\n".join(["FAULT " + fault for fault in faults] or ["all good"]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
