"""The long-context probes: what stands in a haystack, what is scored, what is kept and refused."""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import probe_items
import probe_run
import probes
from client import Reply
from probe_items import KINDS, NEWEST_TOKENS, QUESTION_TOKENS, SINK_TOKENS, Haystack, Item
from probe_run import DENSE, Probe, Run

from sglang_spherical.banner import Banner

LENGTH = 2048
BANNER = Banner(
    "pool",
    "allocator",
    "tree",
    "backend",
    page_size=64,
    hot=100.0,
    warm=50.0,
    cool=45.0,
    cold=30.0,
    frozen=30.0,
    bf16=200.0,
    capacity_tokens=1,
    arena_bytes=1,
)


class Words:
    """A tokenizer with a token per word."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return [self.ids[word] for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def prose_text(sentences: int = 600) -> str:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word() -> str:
        return "".join(rng.choices(letters, k=6))

    return " ".join(
        " ".join(word() for _ in range(24)).capitalize() + "." for _ in range(sentences)
    )


@pytest.fixture(scope="module")
def words() -> Words:
    return Words()


@pytest.fixture(scope="module")
def prose(words: Words) -> probe_items.Prose:
    return probe_items.Prose.read(prose_text(), words.encode)


def make(
    prose: probe_items.Prose, words: Words, seed: int = 0, groups: tuple[int, ...] = (12, 8)
) -> list[Haystack]:
    return probe_items.make_haystacks(prose, words.encode, KINDS, LENGTH, groups, seed)


# --- haystacks ---


def test_a_haystack_has_its_length_and_its_items(prose: probe_items.Prose, words: Words) -> None:
    for haystack, count in zip(make(prose, words), (12, 8)):
        assert len(haystack.tokens) == LENGTH - QUESTION_TOKENS
        kinds = [item.kind for item in haystack.items]
        assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, count // 4)


def test_items_follow_from_the_seed(prose: probe_items.Prose, words: Words) -> None:
    assert make(prose, words) == make(prose, words)
    assert make(prose, words) != make(prose, words, seed=1)


def test_kinds_go_on_in_the_next_haystack(prose: probe_items.Prose, words: Words) -> None:
    haystacks = make(prose, words, groups=(3, 3, 2))
    kinds = [item.kind for haystack in haystacks for item in haystack.items]
    assert sorted(kinds) == sorted(KINDS * 2)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_asked_stands_between_sinks_and_newest(
    prose: probe_items.Prose, words: Words, seed: int
) -> None:
    for haystack in make(prose, words, seed):
        size = len(haystack.tokens)
        readable = words.decode(haystack.tokens[SINK_TOKENS : size - NEWEST_TOKENS])
        for item in haystack.items:
            given = item.question.removeprefix('The text says: "')
            if item.kind == "trace":
                given = given.removeprefix("The value of ").removesuffix(" is")
            assert given in readable
            assert item.expected in readable
            start = round(item.depth * size)
            near = words.decode(haystack.tokens[max(0, start - 2) : start + 40])
            assert given in near


def test_a_single_needle_has_no_second_of_its_form(prose: probe_items.Prose, words: Words) -> None:
    (haystack,) = make(prose, words, groups=(16,))
    text = words.decode(haystack.tokens)
    for form in probe_items.SINGLE_FORMS:
        pattern = re.escape(form).replace(r"\{key\}", r"\S+").replace(r"\{value\}", r"\d{7}")
        assert len(re.findall(pattern, text)) == 1


def test_multikey_has_distractors_even_for_one_question(
    prose: probe_items.Prose, words: Words
) -> None:
    (haystack,) = make(prose, words, groups=(4,))
    text = words.decode(haystack.tokens)
    numbers = dict(re.findall(r"The telephone number of Mrs\. (\S+) is (\d{7})\.", text))
    (item,) = [item for item in haystack.items if item.kind == "multikey"]
    assert len(numbers) == len(set(numbers.values())) == probe_items.KEYS
    assert numbers[item.question.split()[-2]] == item.expected


def test_a_chain_leads_from_what_is_asked_to_the_value(
    prose: probe_items.Prose, words: Words
) -> None:
    (haystack,) = make(prose, words, groups=(16,))
    links = re.findall(r"VAR ([A-Z]{3}) = (VAR )?(\w+)\.", words.decode(haystack.tokens))
    assert [source for _, _, source in links[1:]] == [name for name, _, _ in links[:-1]]
    source = {name: value for name, _, value in links}
    asked = [item for item in haystack.items if item.kind == "trace"]
    assert len({item.question for item in asked}) == len(asked) == 4
    for item in asked:
        value, hops = item.question.split()[-2], 0
        while value in source:
            value, hops = source[value], hops + 1
        assert value == item.expected and hops >= 2


def test_a_quotation_is_unique_and_goes_on_as_expected(
    prose: probe_items.Prose, words: Words
) -> None:
    (haystack,) = make(prose, words, groups=(16,))
    text = words.decode(haystack.tokens)
    quotes = [item for item in haystack.items if item.kind == "quote"]
    assert len({item.question for item in quotes}) == 4
    for item in quotes:
        begun = item.question.removeprefix('The text says: "')
        assert len(begun.split()) == probe_items.QUOTE_WORDS
        assert text.count(begun) == 1
        assert f"{begun} {item.expected}" in text


def test_tables_and_formulas_are_not_quoted() -> None:
    assert probe_items._quotable("so it is, and " * 5)
    assert not probe_items._quotable("so it is | and " * 5)
    assert not probe_items._quotable("so it was in 1704 and " * 5)
    assert not probe_items._quotable("too short a sentence")


def test_prose_that_cannot_fill_or_be_quoted_is_refused(words: Words) -> None:
    short = probe_items.Prose.read(prose_text(20), words.encode)
    with pytest.raises(ValueError, match=r"480 tokens of prose: expected 2,048 or more"):
        make(short, words)
    numbers = probe_items.Prose.read("1 2 3 4 5 6 7 8. " * 600, words.encode)
    with pytest.raises(ValueError, match="no 20 plain words to quote"):
        make(numbers, words)


def test_a_tail_is_in_no_haystack(prose: probe_items.Prose, words: Words) -> None:
    rest, tail = prose.split(100)
    assert len(tail) == 100
    assert rest.tokens + 100 <= prose.tokens
    assert tail == words.encode(prose_text())[-100:]


# --- scores ---


def item(kind: str = "single", expected: str = "12345", length: int = LENGTH) -> Item:
    return Item(kind, length, 0.5, "The value is", expected)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 12345.", True),
        ("is\n12345, or", True),
        (" 123456", False),
        (" 712345", False),
        ("", False),
    ],
)
def test_a_number_is_found_whole(answer: str, right: bool) -> None:
    assert probe_items.found(item(), answer) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" and the red Light\nwas seen by him, whole", True),
        (' and the red Light was seen by him,"\n\nThe text', True),
        (" and the red light was seen by him,", False),
        (" so and the red Light was seen by him,", False),
        (" and the red Light was seen by", False),
    ],
)
def test_a_quotation_is_found_word_for_word(answer: str, right: bool) -> None:
    asked = item("quote", "and the red Light was seen by him,")
    assert probe_items.found(asked, answer) is right


def test_sums_count_only_what_the_dense_server_found() -> None:
    probes_ = [
        Probe(item(), {DENSE: "12345", "hot": "12345", "cold": "1"}),
        Probe(item(), {DENSE: "1", "hot": "12345"}),  # not counted
        Probe(item("trace"), {DENSE: "12345", "hot": "1"}),
        Probe(item("trace", length=4096), {}),
    ]
    summary = probe_run.summarise(probes_, ["hot", "cold"])
    assert summary["single"]["2048"] == {"asked": 2, DENSE: 1, "hot": 1, "cold": 0}
    assert summary["trace"]["4096"] == {"asked": 0, DENSE: 0, "hot": 0, "cold": 0}
    assert summary["all"]["all"] == {"asked": 3, DENSE: 2, "hot": 1, "cold": 0}
    assert list(summary) == ["single", "trace", "all"]
    assert "all          all      2/3      1/2      0/2" in probe_run.table(
        summary, ["hot", "cold"]
    )


def test_a_tier_is_asked_only_what_the_dense_server_found() -> None:
    asked = Probe(item())
    assert asked.pending(DENSE) and not asked.pending("warm")
    asked.answers[DENSE] = "12345"
    assert asked.pending("warm") and not asked.pending(DENSE)
    asked.answers["warm"] = "1"
    assert not asked.pending("warm")
    assert not Probe(item(), {DENSE: "54321"}).pending("warm")


# --- what is kept ---


def make_run(partial: Path | None, seed: int = 0, expected: str = "12345") -> Run:
    haystack = Haystack([1, 2, 3], [item(), item("trace", expected)])
    return Run({"seed": seed}, lambda text: [], [], [haystack], partial)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    partial = tmp_path / "deep" / "out.json.partial"
    first = make_run(partial)
    assert first.resume() == 0
    first.probes[1].answers[DENSE] = "12345"
    first.keep()
    second = make_run(partial)
    assert second.resume() == 1
    assert [probes for _, probes in second.pending(DENSE)] == [[second.probes[0]]]
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]


@pytest.mark.parametrize("other", [{"seed": 1}, {"expected": "54321"}])
def test_answers_of_another_run_are_refused(tmp_path: Path, other: dict[str, object]) -> None:
    partial = tmp_path / "out.json.partial"
    make_run(partial).keep()
    with pytest.raises(ValueError, match="of another run"):
        make_run(partial, **other).resume()


# --- servers ---


def test_a_prefix_that_was_not_cached_is_not_scored() -> None:
    probes.require_cached(Reply("", [], 1000, 960, 0.0), 1000)
    with pytest.raises(ValueError, match=r"896 of 1000 prompt tokens .* expected 960: not scored"):
        probes.require_cached(Reply("", [], 1000, 896, 0.0), 1000)


def test_a_prefix_at_another_tier_is_not_scored() -> None:
    held = {"hot": 1984, "warm": 1184, "cold": 864}  # 31 pages, 25 of them lowered
    for served, tokens in held.items():
        log = f"Decode batch, #running-req: 1, #token: {tokens}, token usage: 0.2\n" * 3
        log += "Decode batch, #running-req: 1, #token: 0, token usage: 0.0\n"
        for tier in held:
            if tier == served:
                probes.require_tier(log, BANNER, tier, 1940)
            else:
                with pytest.raises(ValueError, match=f"at tier {tier}: not scored"):
                    probes.require_tier(log, BANNER, tier, 1940)
    with pytest.raises(ValueError, match="memory of 0 hot tokens"):
        probes.require_tier("", BANNER, "warm", 1940)


def test_a_tier_has_room_for_every_haystack(model: Path) -> None:
    args = parsed(model, "--frames", "f.safetensors", "--", "--page-size", "32")
    dense, warm = (probes.server_args(name, args, [2000, 8000]) for name in (DENSE, "warm"))
    room = [int(flags[flags.index("--max-total-tokens") + 1]) for flags in (dense, warm)]
    asked = 12 * QUESTION_TOKENS
    assert room[0] >= 8000 + asked and room[1] >= 10000 + 2 * asked + probes.FRAME_TOKENS
    assert all(tokens % 64 == 0 for tokens in room)
    assert "--kv-format" not in dense and "--spherical-frames" not in dense
    assert warm[warm.index("--spherical-frames") + 1] == "f.safetensors"
    for flags in (dense, warm):
        assert flags[flags.index("--page-size") + 1] == "32"
    assert warm[warm.index("--spherical-budget") + 1] == "warm"


# --- the command line ---


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"max_position_embeddings": 8192}')
    (tmp_path / "text.txt").write_text(prose_text(300))
    return directory


def parsed(model: Path, *more: str) -> argparse.Namespace:
    text = model.parent / "text.txt"
    return probes.parse(["--model", str(model), "--text", str(text), *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--text", "none.txt"), "--text none.txt: no such file"),
        (("--frames", "none.st"), "--frames none.st: no such file"),
        (("--model", "none"), "--model none: expected a model directory"),
        (("--kinds", "riddle"), "--kinds riddle: expected any of single, multikey, quote, trace"),
        (("--tiers", "tepid"), "--tiers tepid: expected any of hot, warm, cool, cold, frozen"),
        (("--lengths", "1024"), "--lengths 1024: expected 2048 to 8192 tokens"),
        (("--lengths", "9000"), "--lengths 9000: expected 2048 to 8192 tokens"),
        (("--per-haystack", "17"), "--per-haystack 17: expected 1 to 16, 4 of a kind"),
        (("--kinds", "quote", "--per-haystack", "5"), "--per-haystack 5: expected 1 to 4"),
        (("--items", "0"), "--items 0: expected 1 or more"),
        ((), "no tokenizer that transformers can load"),
    ],
)
def test_bad_input_ends_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], message: str
) -> None:
    text = model.parent / "text.txt"
    argv = ["probes.py", "--model", str(model), "--text", str(text), *more]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        probes.main()
    said = str(ended.value)
    assert said.startswith("error: ") and message in said and "\n" not in said


@pytest.fixture
def words_of_model(monkeypatch: pytest.MonkeyPatch, words: Words) -> Callable[[Path], object]:
    def load(model: Path) -> object:
        return words.encode

    monkeypatch.setattr(probes, "load_encode", load)
    return load


@pytest.mark.usefixtures("words_of_model")
def test_a_short_text_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"7,200 tokens, expected 10,240 or more"):
        probes.plan(parsed(model))


@pytest.mark.usefixtures("words_of_model")
def test_a_plan_shares_haystacks(model: Path) -> None:
    lengths = ("--lengths", "2048", "4096", "--items", "10", "--per-haystack", "6")
    run = probes.plan(parsed(model, *lengths, "--json", "out.json"))
    assert [len(hay.items) for hay in run.haystacks] == [6, 4, 6, 4]
    assert len(run.tail) == probes.FRAME_TOKENS
    assert run.partial == Path("out.json.partial")


@pytest.mark.usefixtures("words_of_model")
def test_a_question_too_long_for_its_room_is_refused(model: Path) -> None:
    run = probes.plan(parsed(model, "--lengths", "2048", "--items", "1"))
    asked = replace(run.probes[0].item, question="long " * QUESTION_TOKENS)
    with pytest.raises(ValueError, match=f"takes more than {QUESTION_TOKENS} tokens"):
        probes.answer(None, DENSE, run.haystacks[0], asked, run.encode)
