from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_spherical import cli
from sglang_spherical import evaluate as tool
from sglang_spherical.config import SphericalConfig
from sglang_spherical.evaluation import inputs, report
from sglang_spherical.evaluation.attention import CodedRead, attend_codes, causal_attention
from sglang_spherical.evaluation.coding import TierCoder, TierRead, bits_per_value
from sglang_spherical.evaluation.scores import LayerErrors, RunScores, compare, kl_divergence
from sglang_spherical.pool.arena import KEYS, VALUES, Arena
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import PageLayout, default_levels
from sglang_spherical.pool.retier import lower_pages

PAGE, KV_HEADS, HEAD_DIM, TOKENS = 16, 2, 64, 64
LEVELS = default_levels(SphericalConfig())
TEXT = Path(cli.__file__).with_name("calibration.txt")


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale = torch.randn(HEAD_DIM, generator=generator).exp()
    q = torch.randn(KV_HEADS, 3, TOKENS, HEAD_DIM, generator=generator) / 8
    k, v = (torch.randn(KV_HEADS, TOKENS, HEAD_DIM, generator=generator) * scale for _ in "kv")
    return q, k + 1, v


@pytest.fixture
def coder(qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> TierCoder:
    q, k, v = qkv
    frames = Frames(1, KV_HEADS, HEAD_DIM, PAGE, "cpu")
    frames.freeze_centre(0, torch.stack([k.mean(1), v.mean(1)]))
    by_token = q.flatten(0, 1).transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    frames.observe(0, *by_token, torch.arange(TOKENS), None, 1.0)
    frames.calibrate()
    return TierCoder(frames, LEVELS)


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_codes_are_those_of_the_arena(
    coder: TierCoder, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], level: int
) -> None:
    """A page written hot and lowered in an arena reads back as the evaluation reads it."""
    from spherical_kernels.codec.pages import decode_slices, encode_slices

    _, k, v = qkv
    layout = PageLayout.fit(PAGE, HEAD_DIM, 1, KV_HEADS, LEVELS)
    arena = Arena(layout, layout.hot_blocks, 2, "cpu")
    page = torch.tensor([1])
    arena.place_pages(page, torch.arange(layout.hot_blocks, 2 * layout.hot_blocks).unsqueeze(0))
    first = [x[:, :PAGE] for x in (k, v)]
    frames = coder.frames
    for side, slices in enumerate(layout.side_layouts(0)):
        rotation = frames.matrices(slices.pattern.frame, 0, side)
        coded = encode_slices(slices, first[side], rotation, frames.centre[side, 0])
        arena.write_slices(slices, arena.locate(page, 0)[1][0, :, side], coded)
    for old in range(level):
        lower_pages(arena, frames, page, old, old + 1, kernels=False)
    for side, slices in enumerate(layout.side_layouts(level)):
        stored = arena.read_slices(slices, arena.locate(page, 0)[1][0, :, side])
        dual = frames.duals(slices.pattern.frame, 0, side)
        read = decode_slices(slices, stored, dual, frames.centre[side, 0])
        mine = coder.reach(0, side, first[side], level)[1]
        torch.testing.assert_close(mine, read, rtol=0, atol=0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_queries_read_their_own_page_and_the_first_one_hot(
    coder: TierCoder, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], level: int
) -> None:
    """Against attention written down token by token."""
    q, k, v = qkv
    out = attend_codes(CodedRead(TierRead(coder, level), LayerErrors(1)), 0, q, k, v)
    hot_k, tier_k = coder.reach(0, KEYS, k, level)
    hot_v, tier_v = coder.reach(0, VALUES, v, level)
    for token in (0, 5, 20, 40, TOKENS - 1):
        of = torch.arange(token + 1) // PAGE
        stays = ((of == 0) | (of == token // PAGE)).view(1, -1, 1)
        keys = torch.where(stays, hot_k[:, : token + 1], tier_k[:, : token + 1])
        values = torch.where(stays, hot_v[:, : token + 1], tier_v[:, : token + 1])
        p = (q[:, :, token] @ keys.transpose(-1, -2)).softmax(-1)
        torch.testing.assert_close(out[:, :, token], p @ values, rtol=1e-4, atol=1e-5)


def test_errors_grow_from_tier_to_tier(
    coder: TierCoder, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    found = []
    for level in range(3):
        errors = LayerErrors(1)
        attend_codes(CodedRead(TierRead(coder, level), errors), 0, *qkv)
        found.append(errors.summary())
    for measure in ("attention_kl", "value_error", "output_error"):
        assert 0 < found[0][measure] < found[1][measure] < found[2][measure]
    assert found[0]["value_error"] < 0.01 and found[2]["value_error"] < 0.4


def test_causal_attention_agrees_with_torch(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    q, k, v = qkv
    expected = scaled_dot_product_attention(
        q.flatten(0, 1),
        k.repeat_interleave(3, 0),
        v.repeat_interleave(3, 0),
        is_causal=True,
        scale=1,
    ).unflatten(0, (KV_HEADS, 3))
    mine = causal_attention(q, k) @ v.unsqueeze(1)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    last = causal_attention(q[:, :, PAGE:], k, every=8) @ v.unsqueeze(1)
    torch.testing.assert_close(last, expected[:, :, PAGE::8], rtol=1e-4, atol=1e-5)


def test_scores_by_hand() -> None:
    dense = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [5.0, 1.0]])
    other = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.1], [0.0, 9.0]])
    seen = compare(torch.tensor([0, 1, 0]), dense, other)  # the last row predicts nothing known
    expected = -math.log(0.25), math.log(1 + math.exp(0.1))
    torch.testing.assert_close(seen.nll, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert seen.kl[0].item() == pytest.approx(first, rel=1e-5)
    assert seen.same.tolist() == [1.0, 0.0]
    run = RunScores("warm", 4.5)
    run.add(seen, None)
    assert run.perplexity == pytest.approx(math.exp(sum(expected) / 2), rel=1e-6)
    assert run.summary(run.perplexity / 2)["ppl_change"] == pytest.approx(1.0, rel=1e-6)


def test_divergence_of_impossible_tokens_is_finite() -> None:
    p, other = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    assert kl_divergence(p, other).item() == pytest.approx(math.log(2), rel=1e-6)
    assert math.isfinite(kl_divergence(other, p).item())


def test_bits_per_value_count_every_byte() -> None:
    layout = PageLayout.fit(64, 128, 28, 2, LEVELS)
    for level in range(3):
        bits = layout.bytes_per_token(level) * 8 / (2 * 28 * 2 * 128)
        assert bits_per_value(layout, level) == pytest.approx(bits)
        assert bits > LEVELS[level].keys.average_bits


def evaluate(model: Path, tmp_path: Path, *options: str) -> int:
    base = ["evaluate", "--model", str(model), "--text", str(TEXT)]
    return cli.main([*base, "--json", str(tmp_path / "out.json"), *options])


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "WINDOW_TOKENS", 256)


@pytest.mark.usefixtures("short_windows")
def test_a_whole_evaluation(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "out.png"
    assert evaluate(tiny_model, tmp_path, "--windows", "2", "--plot", str(plot)) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["windows"] == 2 and found["tokens"] == 512
    assert found["model"] == tiny_model.name and found["text"] == "calibration.txt"
    assert str(tmp_path) not in json.dumps(found)
    assert found["command"].startswith("python -m sglang_spherical evaluate --model tiny ")
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    parser.parse_args(shlex.split(found["command"])[4:])
    assert set(found["versions"]) == {"sglang-spherical", "torch", "transformers"}
    dense, hot, warm, cold = found["runs"]
    assert [run["name"] for run in found["runs"]] == ["dense", "hot", "warm", "cold"]
    assert dense["kl_mean"] == 0 and dense["same_top1"] == 1 and dense["bits_per_value"] == 16
    assert 0 < hot["kl_mean"] < warm["kl_mean"] < cold["kl_mean"]
    assert hot["kl_mean"] < 0.01
    assert 16 > hot["bits_per_value"] > warm["bits_per_value"] > cold["bits_per_value"] > 2
    assert hot["kl_median"] <= hot["kl_p99"] and len(hot["attention_kl_layers"]) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in shown if "---" not in line]
    assert names == ["run", "dense", "hot", "warm", "cold"]


@pytest.mark.usefixtures("short_windows")
def test_frames_from_a_file_and_the_tiers_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames.safetensors"
    made = ["calibrate", "--model", str(tiny_model), "--out", str(frames), "--windows", "2"]
    assert cli.main(made) == 0
    options = ["--windows", "1", "--tiers", "warm", "--page-size", "16", "--skip-windows", "3"]
    assert evaluate(tiny_model, tmp_path, *options, "--frames", str(frames)) == 0
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["dense", "warm"]


@pytest.mark.usefixtures("short_windows")
def test_heads_are_alike_where_that_is_asked(tiny_model: Path, tmp_path: Path) -> None:
    """By default they pick their patterns, as on a server without a calibration file."""
    found = []
    for options in ([], ["--alike"]):
        assert evaluate(tiny_model, tmp_path, "--windows", "1", "--tiers", "cold", *options) == 0
        found.append(json.loads((tmp_path / "out.json").read_text())["runs"][-1]["kl_mean"])
    assert found[0] != found[1]


@pytest.mark.usefixtures("short_windows")
def test_pages_go_down_through_the_tiers_named(tiny_model: Path, tmp_path: Path) -> None:
    found = {}
    for tiers in ("cold", "cool,cold,frozen"):
        assert evaluate(tiny_model, tmp_path, "--windows", "1", "--tiers", tiers) == 0
        runs = json.loads((tmp_path / "out.json").read_text())["runs"]
        assert [run["name"] for run in runs] == ["dense", *tiers.split(",")]
        found[tiers] = {run["name"]: run for run in runs}
    straight, gradual = found.values()
    assert straight["cold"]["bits_per_value"] == gradual["cold"]["bits_per_value"]
    assert straight["cold"]["value_error"] < gradual["cold"]["value_error"]
    assert 0 < gradual["cool"]["kl_mean"] < gradual["cold"]["kl_mean"]
    frozen = gradual["frozen"]["kl_mean"]
    assert gradual["cold"]["kl_mean"] <= frozen, "the same where heads fill the same blocks"


def cut(path: Path) -> Path:
    from sglang_spherical.frame_file import FrameStatistics, save

    x = torch.ones(2, 4, 2, 64)
    save(path, FrameStatistics(x, x + 1, x[0].clone(), 64), {})
    path.write_bytes(path.read_bytes()[:500])
    return path


def foreign(path: Path) -> Path:
    from sglang_spherical.frame_file import FrameStatistics, save

    x = torch.ones(2, 4, 2, 64)
    save(path, FrameStatistics(x, x + 1, x[0].clone(), 64), {"architectures": ["Other"]})
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tiers", "hot,tepid"], "--tiers hot,tepid: expected some of hot,warm,cool,cold,frozen"),
        (["--text", "SHORT"], "shorter than a window of 2048"),
        (["--text", "/no/such/text"], "--text /no/such/text: no such file"),
        (["--windows", "500"], "502 are needed, one to calibrate on"),
        (["--windows", "0"], "--windows"),
        (["--model", "/no/such/model"], "--model /no/such/model: expected a model directory"),
        (["--device", "cuda:99"], "--device cuda:99: not usable here: use cpu"),
        (["--device", "abacus"], "--device abacus: not usable here: use cpu"),
        (["--frames", "/no/such/file"], "frames file /no/such/file: no such file"),
        (["--frames", "CUT"], "cut short"),
        (["--frames", "FOREIGN"], "made for another model"),
    ],
)
def test_bad_input_is_one_line(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Not enough.")
    files = {
        "SHORT": short,
        "CUT": cut(tmp_path / "cut.safetensors"),
        "FOREIGN": foreign(tmp_path / "foreign.safetensors"),
    }
    extra = ["--skip-windows", "1"] if "500" in options else []
    assert evaluate(tiny_model, tmp_path, *(str(files.get(o, o)) for o in options), *extra) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_an_interrupt_keeps_the_windows_that_are_done(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    start = (  # a shell's background job, as a CI may be, hands an ignored SIGINT on
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from sglang_spherical import cli; from sglang_spherical.evaluation import inputs; "
        "inputs.WINDOW_TOKENS = 256; import sys; sys.exit(cli.main(sys.argv[1:]))"
    )
    options = ["evaluate", "--model", tiny_model, "--text", TEXT, "--tiers", "hot", "--json", out]
    command = [sys.executable, "-c", start, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    found: dict[str, Any] = json.loads(out.read_text())
    assert 1 <= found["windows"] < 30
    assert found["tokens"] == 256 * found["windows"]
    assert [run["name"] for run in found["runs"]] == ["dense", "hot"]
    assert shown.startswith("| run ")


def test_the_table_has_dashes_where_nothing_was_measured() -> None:
    shown = report.table([{"name": "dense", "ppl": 19.26, "bits_per_value": 16.0}])
    titles, rule, row = shown.splitlines()
    assert set(rule) <= set("|- :"), "Markdown"
    assert titles.count("|") == rule.count("|") == row.count("|")
    assert row.split()[1:8:2] == ["dense", "16.00", "19.2600", "-"]
