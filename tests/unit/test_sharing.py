"""The sharing benchmarks and their simulator: traces, hit rates, divergence, memory."""

from __future__ import annotations

import argparse
import random
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import first_tokens
import sharing_run
import simulate
from client import Reply
from sharing_report import join, plot, table
from sharing_run import Served, divergence, figures
from sharing_workload import WORKLOADS, Limitless, Shape, Source, Workload, zipf_weights

PREFIX, TURNS = Shape(256, 80, 8), Shape(256, 80, 8, 4)
ARGS = argparse.Namespace(model=None, page_size=64)
SETTINGS = {"pool_tokens": 4096, "at_once": 2, "prefill_tokens": 2048, "least_requests": 24,
            "seed": 0}  # fmt: skip


def build(name: str, shape: Shape, tokens: int = 4096, seed: int = 0) -> Workload:
    return Workload.build(name, shape, tokens, 24, Source(None, seed))


# --- workloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [PREFIX, TURNS], ids=["prefix", "turns"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_makes_one_trace(name: str, shape: Shape) -> None:
    one, other = build(name, shape), build(name, shape)
    assert one == other != build(name, shape, seed=1)
    assert sorted(one.first) == list(range(len(one.histories))), "the first pass asks every group"
    assert len(one.questions) == len(one.order)
    assert len(one.picks) >= 24


def test_the_text_changes_no_pick() -> None:
    """The simulator replays a trace without the text that it was measured with."""
    text = Workload.build("zipf 0.4", TURNS, 4096, 24, Source(list(range(9000)), 0))
    assert text.order == build("zipf 0.4", TURNS).order
    starts = {tuple(history[:64]) for history in text.histories}
    assert len(starts) == len(text.histories), "no two groups begin alike"


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="passages of 256 tokens need a longer text"):
        build_from = Source(list(range(260)), 0)
        Workload.build("round-robin", PREFIX, 4096, 24, build_from)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_popularity_is_sglangs(alpha: float) -> None:
    from sglang.benchmark.datasets.generated_shared_prefix import _zipf_group_probs

    mine = np.array(zipf_weights(50, alpha))
    assert np.allclose(mine / mine.sum(), _zipf_group_probs(50, alpha))


def test_round_robin_takes_turns_and_zipf_prefers() -> None:
    fair = Counter(build("round-robin", PREFIX, 32 * 256).picks)
    assert set(fair.values()) == {1}
    skewed = Workload.build("zipf 1.0", PREFIX, 32 * 256, 2000, Source(None, 0))
    counts = sorted(Counter(skewed.picks).values(), reverse=True)
    assert counts[0] / 2000 == pytest.approx(1 / sum(1 / r for r in range(1, 33)), rel=0.2)


def test_conversations_grow_to_the_working_set_and_start_over() -> None:
    work = build("round-robin", TURNS, 16 * TURNS.group_tokens)
    for number in range(len(work.order)):
        before = work.prompt(number)
        work.answered(number, before, [1] * TURNS.answer)
        history = work.histories[work.order[number]]
        last = number >= 16 * (TURNS.turns - 1)
        assert history == (work.prefixes[work.order[number]] if last else before + [1] * 8)
        assert not last or len(before) + TURNS.answer == TURNS.group_tokens


def test_only_turns_grow() -> None:
    work = build("round-robin", PREFIX)
    before = [list(history) for history in work.histories]
    work.answered(0, work.prompt(0), [1, 2])
    assert work.histories == before
    assert len(work.prompt(0)) == PREFIX.prefix + PREFIX.question


# --- hit rates -----------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=12), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_limitless_cache_serves_the_longest_known_prefix(
    page_size: int, prompts: list[list[int]]
) -> None:
    limitless, known = Limitless(page_size), []
    for prompt in prompts:
        answer = [7, 8]
        want = max((common(prompt[:-1], sequence) for sequence in known), default=0)
        assert limitless.serve(prompt, answer) == want // page_size * page_size
        whole = [*prompt, *answer]
        known.append(whole[: len(whole) // page_size * page_size])


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def test_figures_are_of_the_measured_pass() -> None:
    prompts = [list(range(128)), list(range(128))]
    warm = [Served(prompts[0], [1, 2], 0, 9.0, [])]
    served = [Served(prompts[1], [1, 2], 64, 0.2, [])]
    row = figures(warm, served, 4.0, 64)
    assert row["token_hit_rate"] == 64 / 127 and row["page_hit_rate"] == 1.0
    assert row["ttft_p50_ms"] == pytest.approx(200) and row["output_tok_s"] == 0.5


# --- fidelity ------------------------------------------------------------------------------------


def distribution(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(size, 2.0))


@pytest.mark.parametrize("seed", range(20))
def test_divergence_is_a_lower_bound_that_grows_to_the_whole(seed: int) -> None:
    p, q = distribution(50, seed), distribution(50, seed + 1000)
    full = float((p * np.log(p / q)).sum())
    bounds = []
    for top in (1, 5, 20, 49):
        own = {int(i): float(np.log(q[i])) for i in np.argsort(-q)[:top]}
        kl, mass = divergence(own, {i: float(np.log(p[i])) for i in own})
        assert mass == pytest.approx(sum(p[i] for i in own))
        bounds.append(kl)
    assert all(-1e-9 <= bound <= full + 1e-9 for bound in bounds)
    assert bounds == sorted(bounds), "more tokens tell more"
    assert bounds[-1] == pytest.approx(full, rel=1e-6), "one token is not asked for: the rest"


def test_equal_servers_do_not_diverge() -> None:
    own = {3: -0.1, 5: -3.0}
    kl, mass = divergence(own, dict(own))
    assert kl == pytest.approx(0, abs=1e-12) and mass < 1


def test_certainty_does_not_divide_by_nothing() -> None:
    kl, _ = divergence({3: 0.0}, {3: -0.5})
    assert np.isfinite(kl) and kl > 1


# --- the simulator -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [PREFIX, TURNS], ids=["prefix", "turns"])
@pytest.mark.parametrize("server", ["spherical", "bf16"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_memory_adds_up(name: str, server: str, shape: Shape) -> None:
    work = build(name, shape, 5 * 4096)
    simulation = simulate.build(server, 4096, SETTINGS, ARGS)
    found = simulate.simulate(simulation, work, SETTINGS["at_once"])
    tree, allocator = simulation.tree, simulation.allocator
    assert tree.protected_size() == 0
    assert allocator.available_size() + tree.evictable_size() == allocator.size
    assert sum(found["tokens"].values()) == tree.total_size()
    assert 0 <= found["token_hit_rate"] <= 1


@pytest.mark.parametrize("shape", [PREFIX, TURNS], ids=["prefix", "turns"])
def test_the_simulator_divides_by_what_a_limitless_cache_would_serve(shape: Shape) -> None:
    roomy = SETTINGS | {"pool_tokens": 1 << 17}
    work, same = build("zipf 1.0", shape), build("zipf 1.0", shape)
    found = simulate.simulate(simulate.build("bf16", 4096, roomy, ARGS), work, 2)
    assert found["token_hit_rate"] == 1.0
    limitless, source = Limitless(1), simulate.answers(shape.answer)
    for number, answer in zip(range(len(same.order)), source):
        known = len(same.histories[same.order[number]]) if number >= len(same.first) else 0
        prompt = same.prompt(number)
        assert limitless.serve(prompt, answer) == known
        same.answered(number, prompt, answer)


def test_what_fits_is_served_and_more_fits_at_lower_precision() -> None:
    def rate(server: str, working_set: float) -> float:
        row = simulate.cell(server, "zipf 0.4", working_set, Shape(1024, 80, 8), SETTINGS, ARGS)
        return row["token_hit_rate"]

    assert rate("bf16", 0.5) == 1.0
    assert rate("spherical", 2) > 0.95
    assert rate("spherical", 4) > rate("bf16", 4) + 0.3


def test_a_prompt_larger_than_memory_is_refused() -> None:
    small = SETTINGS | {"pool_tokens": 256}
    simulation = simulate.build("spherical", 4096, small, ARGS)
    with pytest.raises(ValueError, match="tokens do not fit: more --pool-tokens"):
        simulation.wave([simulate.Request(list(range(2000)), [1])])


def test_waves_wait_for_turns() -> None:
    work = build("zipf 1.0", TURNS)
    seen: list[int] = []
    for numbers in simulate.waves(work, 4):
        groups = [work.order[number] for number in numbers]
        assert 0 < len(groups) <= 4 and len(set(groups)) == len(groups)
        assert len({number < len(work.first) for number in numbers}) == 1, "passes do not mix"
        seen += numbers
    assert seen == list(range(len(work.order)))


# --- command lines and reports -------------------------------------------------------------------


@pytest.mark.parametrize("name, turns", [("prefix_sharing", 0), ("multi_turn", 5)])
def test_lengths_are_flags(name: str, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(sharing_run, "run", lambda *args: seen.extend(args))
    first = "--first-tokens" if turns else "--prefix-tokens"
    argv = [f"{name}.py", first, "512", "--answer-tokens", "4", *["--turns", "5"] * bool(turns)]
    monkeypatch.setattr(sys, "argv", [*argv, "--", "--page-size", "32"])
    runpy.run_module(name, run_name="__main__")
    assert seen[0] == name.replace("_", "-")
    assert seen[1] == Shape(512, 88 if turns else 80, 4, turns)
    assert seen[2].args == ["--page-size", "32"]


@pytest.mark.parametrize(
    "server, wanted",
    [
        ("spherical", "--kv-format spherical --spherical-kv-bytes 1000"),
        ("bf16", "--max-total-tokens 100"),
        ("fp8", "--kv-cache-dtype fp8_e4m3 --max-total-tokens 200"),
    ],
)
def test_servers_get_equal_bytes(server: str, wanted: str) -> None:
    args = argparse.Namespace(
        kv_bytes=1000, pool_tokens=100, dummy=False, prefill_graphs=False, args=["--more"]
    )
    flags = " ".join(sharing_run.flags(server, args))
    assert all(pair in flags for pair in wanted.split(" --")) and "--more" in flags


@pytest.mark.parametrize("graphs", [False, True])
def test_random_weights_come_without_prefill_graphs_unless_asked(graphs: bool) -> None:
    args = argparse.Namespace(
        kv_bytes=1000, pool_tokens=100, dummy=True, prefill_graphs=graphs, args=[]
    )
    found = sharing_run.flags("bf16", args)
    assert ("--disable-prefill-cuda-graph" in found) != graphs
    assert "--skip-tokenizer-init" in found


def test_first_tokens_are_medians_over_the_rounds_that_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The replies of a round take 1, 2, ... s, those of the first two rounds ten times as long."""
    asked: list[tuple[str, list[list[int]]]] = []

    def ask(url: str, prompts: list[list[int]]) -> tuple[list[float], list[Reply]]:
        asked.append((url, prompts))
        slow = 10 if len(asked) <= 2 * first_tokens.UNCOUNTED else 1
        replies = [Reply("", [1], len(p), 64, 1.0) for p in prompts]
        return [slow * 1e3 * (i + 1) for i in range(len(prompts))], replies

    monkeypatch.setattr(first_tokens, "generate", lambda *_: None)
    monkeypatch.setattr(first_tokens, "ask_together", ask)
    monkeypatch.setattr(first_tokens, "REST_S", 0)
    servers: Any = {name: argparse.Namespace(url=name) for name in ("spherical", "bf16")}
    rows = first_tokens.measure(servers, new=5, cached=100, at_once=3, rounds=2)
    assert [row["server"] for row in rows] == ["spherical", "bf16"]
    for row in rows:
        assert (row["first_ms"], row["mean_ms"], row["last_ms"]) == (1e3, 2e3, 3e3)
        assert row["cached_tokens"] == 3 * 64
    assert [url for url, _ in asked] == ["spherical", "bf16"] * 4
    for (_, mine), (_, others) in zip(asked[::2], asked[1::2], strict=True):
        assert mine == others and all(len(prompt) == 105 for prompt in mine)
    assert asked[0][1] != asked[2][1], "new tokens are new every time"


def test_turns_are_two_numbers() -> None:
    assert first_tokens.turn("128,4096") == (128, 4096)
    with pytest.raises(argparse.ArgumentTypeError, match="128: expected NEW,CACHED"):
        first_tokens.turn("128")


def test_a_report_needs_no_server(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        {"server": server, "workload": workload, "working_set": size, "kv_bytes": 1 << 20,
         "token_hit_rate": rng.random(), "ttft_p50_ms": 3.0, "ttft_p99_ms": 5.0,
         "output_tok_s": 9.0}
        for server in ("spherical", "bf16") for workload in ("round-robin", "zipf 1.0")
        for size in (0.5, 4.0)
    ]  # fmt: skip
    rows[0]["kl_mean"] = 0.01234
    samples = [{"seconds": 0.5 * i, "hot": 64.0 * i, "cold": 128.0} for i in range(4)]
    tiers = [{"workload": "round-robin", "working_set": 4.0, "samples": samples}]
    found = {"run_id": "r", "settings": SETTINGS, "rows": rows, "tiers": tiers}
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 4 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "0.0123" in lines[2] and "–" in lines[3]
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_servers_that_ran_side_by_side_are_joined() -> None:
    def result(server: str, tokens: int = 8) -> dict[str, object]:
        return {
            "command": f"python {server}", "run_id": server, "model": "tiny",
            "settings": {"pool_tokens": tokens}, "rows": [{"server": server}], "tiers": [],
        }  # fmt: skip

    joined = join([result("spherical"), result("bf16")])
    assert [row["server"] for row in joined["rows"]] == ["spherical", "bf16"]
    assert joined["command"] == ["python spherical", "python bf16"]
    assert join([result("bf16")]) == result("bf16")
    with pytest.raises(ValueError, match="bf16: its settings are not those of spherical"):
        join([result("spherical"), result("bf16", tokens=9)])
