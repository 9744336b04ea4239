"""Needles over a coded haystack: what a question reads, and what its answer's margin is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cache_tools import normal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import needle_margins
from needle_margins import Answer, Probe
from needle_reader import CachedHaystack, HaystackReader, OneSide, Rounded
from needle_runs import DENSE, PAGE, Form
from probe_items import Item

from sglang_spherical.evaluation import inputs
from sglang_spherical.pool.arena import KEYS, VALUES

FORM = SimpleNamespace(page_size=4, reach=lambda layer, side, x: (x + 1, x + 2))


def test_only_pages_between_the_sinks_and_the_newest_are_lowered() -> None:
    exact = normal(2, 16, 8, seed=1), normal(2, 16, 8, seed=2)
    read = CachedHaystack([exact], FORM).read(0, 12)
    for x, its in zip(exact, read, strict=True):
        assert torch.equal(its[:, :4], x[:, :4] + 1)
        assert torch.equal(its[:, 4:12], x[:, 4:12] + 2)
        assert torch.equal(its[:, 12:], x[:, 12:] + 1)


@pytest.mark.parametrize("side", [KEYS, VALUES])
def test_one_side_leaves_the_other_new(side: int) -> None:
    x = normal(2, 8, 8)
    for its in (KEYS, VALUES):
        new, later = OneSide(FORM, side).reach(0, its, x)
        assert torch.equal(new, x + 1) and torch.equal(later, x + 2 if its == side else new)


def test_a_question_over_an_exact_haystack_is_answered_as_without_a_cache(
    tiny_model: Path,
) -> None:
    model = inputs.load_model(tiny_model, "float32")
    tokens = torch.randint(9, 4000, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    haystack, question, answer = tokens[:256], tokens[256:290], tokens[290:]
    with torch.inference_mode():
        whole = model(torch.tensor([tokens[:-1]])).logits[0, -len(answer) :]
    reader = HaystackReader(model)
    exact = reader.take_in(haystack)
    assert [k.shape[1] for k, _ in exact] == [256] * 4
    got = reader.continued(CachedHaystack(exact, None), question, answer)
    torch.testing.assert_close(got, whole, rtol=1e-3, atol=1e-3)
    short = CachedHaystack(exact, Rounded(torch.float8_e4m3fn, PAGE))
    rounded = reader.continued(short, question, answer)
    assert reader.end == 0, "all of it is newest"
    assert not torch.equal(rounded, got)


def test_the_newest_tokens_count_the_question(tiny_model: Path) -> None:
    reader = HaystackReader(inputs.load_model(tiny_model, "float32"))
    exact = reader.take_in(list(range(100, 100 + 6 * PAGE)))
    cached = CachedHaystack(exact, Rounded(torch.bfloat16, PAGE))
    for question, end in ((PAGE - 1, 2 * PAGE), (PAGE, 3 * PAGE)):
        reader.continued(cached, [7] * question, [8, 9])
        assert reader.end == end


def test_an_answers_margin_is_that_of_its_least_sure_token() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.5]])
    answer = needle_margins.judge(logits, torch.tensor([0, 1]))
    assert answer.margin == pytest.approx(0.5)
    expected = logits.log_softmax(-1)
    assert answer.logp == pytest.approx(float(expected[0, 0] + expected[1, 1]) / 2, rel=1e-4)
    assert needle_margins.judge(logits, torch.tensor([0, 2])).margin == pytest.approx(-0.5)


def test_runs_are_asked_what_dense_finds() -> None:
    def probe(kind: str, **margins: float) -> Probe:
        answers = {name: Answer(margin, -1.0) for name, margin in margins.items()}
        return Probe(Item(kind, 2048, 0.5, "Q", "A"), answers)

    probes = [
        probe("single", dense=1.0, cold=-0.5),
        probe("quote", dense=2.0, cold=0.5),
        probe("quote", dense=-1.0),
    ]
    table = needle_margins.summarise(probes, {DENSE: Form(None, 16.0), "cold": Form(None, 2.5)})
    assert table["cold"]["all"] == {"asked": 2, "found": 1}
    assert table["cold"]["quote"] == {"asked": 1, "found": 1}
    assert table[DENSE]["all"] == {"asked": 2, "found": 2}
    assert table["cold"]["shift_rms"] == 1.5
    assert "1/2" in needle_margins.shown(table)
