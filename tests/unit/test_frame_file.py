from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sglang_spherical import cli, frame_file
from sglang_spherical.calibrate import TEXT
from sglang_spherical.errors import StartupError
from sglang_spherical.evaluation import inputs
from sglang_spherical.frame_file import CHOICES, FrameStatistics, rank_heads
from sglang_spherical.pool.frames import Frames

LAYERS, KV_HEADS, HEAD_DIM = 3, 4, 64
IDENTITY: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "layers": 3, "weights": "0123"}


@pytest.fixture
def statistics() -> FrameStatistics:
    generator = torch.Generator().manual_seed(1)
    shape = (2, LAYERS, KV_HEADS, HEAD_DIM)
    centre, spread = (torch.randn(shape, generator=generator) for _ in range(2))
    gain = torch.randn(shape[1:], generator=generator)
    return FrameStatistics(centre, spread.exp(), gain.exp(), 64)


@pytest.fixture
def saved(tmp_path: Path, statistics: FrameStatistics) -> Path:
    path = tmp_path / "new" / "frames.safetensors"
    frame_file.save(path, statistics, IDENTITY)
    return path


def test_what_is_saved_is_loaded(saved: Path, statistics: FrameStatistics) -> None:
    loaded = frame_file.load(saved, IDENTITY)
    assert torch.equal(loaded.centre, statistics.centre)
    assert torch.equal(loaded.spread, statistics.spread)
    assert torch.equal(loaded.gain, statistics.gain)
    assert loaded.page_size == 64
    assert loaded.distortion is None and loaded.part(slice(1), slice(1)).distortion is None


@pytest.fixture
def measured(saved: Path, statistics: FrameStatistics) -> FrameStatistics:
    """The statistics with distortions, and `saved` with them."""
    shape = (2, LAYERS, KV_HEADS, len(CHOICES[0]))
    distortion = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    whole = replace(statistics, distortion=distortion)
    frame_file.save(saved, replace(whole, distortion=distortion.double()), IDENTITY)
    return whole


def test_distortions_are_loaded_with_the_rest(saved: Path, measured: FrameStatistics) -> None:
    loaded = frame_file.load(saved, IDENTITY)
    assert loaded.distortion is not None and loaded.distortion.dtype == torch.float32
    assert measured.distortion is not None
    assert torch.equal(loaded.distortion, measured.distortion)
    assert torch.equal(loaded.spread, measured.spread)
    part = loaded.part(slice(1, 3), slice(2, 4)).distortion
    assert part is not None
    assert torch.equal(part, measured.distortion[:, 1:3, 2:4])


@pytest.mark.usefixtures("measured")
def test_distortions_of_other_patterns_are_refused(saved: Path) -> None:
    tensors = load_file(saved)
    with safe_open(saved, "pt") as file:
        named = file.metadata()["patterns"]
    assert json.loads(named) == [[pattern.name for pattern in side] for side in CHOICES]
    others = '[["4-4-4-4"], ["4-4-4-4"]]'
    resave(saved, tensors, patterns=others)
    message = refusal(saved)
    assert f"its distortions are of the patterns {others}, this release chooses among" in message
    assert named in message
    resave(saved, tensors, patterns="")
    assert "its distortions are of the patterns" in refusal(saved)


@pytest.mark.usefixtures("measured")
def test_damaged_distortions_are_refused(saved: Path) -> None:
    tensors = load_file(saved)
    tensors["distortion"][1, 0, 0, 0] += 1
    resave(saved, tensors)
    assert "damaged" in refusal(saved)


def resave(path: Path, tensors: dict[str, torch.Tensor], **changes: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata | changes)


def refusal(path: Path, identity: dict[str, Any] = IDENTITY) -> str:
    with pytest.raises(StartupError) as error:
        frame_file.load(path, identity)
    message = str(error.value)
    assert str(path) in message and "sglang_spherical calibrate" in message
    assert "\n" not in message
    return message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_file_cut_short_is_refused(saved: Path, kept: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    assert "cut short" in refusal(saved)


def test_a_flipped_bit_is_refused(saved: Path) -> None:
    damaged = bytearray(saved.read_bytes())
    damaged[-100] ^= 1
    saved.write_bytes(damaged)
    assert "damaged" in refusal(saved)


@pytest.mark.parametrize("version", ["1", "3"])
def test_another_version_is_refused(saved: Path, version: str) -> None:
    resave(saved, load_file(saved), version=version)
    assert f"version {version} of the format, this release reads version 2" in refusal(saved)


def test_another_safetensors_file_is_refused(saved: Path) -> None:
    save_file({"weight": torch.ones(3)}, saved)
    assert "holds no frames" in refusal(saved)


@pytest.mark.parametrize(("field", "value"), [("layers", 4), ("weights", "4567")])
def test_another_model_is_refused_by_what_differs(saved: Path, field: str, value: Any) -> None:
    message = refusal(saved, IDENTITY | {field: value})
    assert f"with {field} {IDENTITY[field]} where this one has {value}" in message


def test_ranks_share_out_the_heads() -> None:
    assert [rank_heads(8, rank, 4) for rank in (0, 3)] == [slice(0, 2), slice(6, 8)]
    assert [rank_heads(2, rank, 8) for rank in (0, 3, 4, 7)] == [
        slice(0, 1),
        slice(0, 1),
        slice(1, 2),
        slice(1, 2),
    ]


def test_a_rank_builds_the_frames_of_its_part(saved: Path, statistics: FrameStatistics) -> None:
    whole, part = Frames(LAYERS, KV_HEADS, HEAD_DIM, 64, "cpu"), Frames(2, 2, HEAD_DIM, 64, "cpu")
    whole.load(statistics.centre, statistics.gain, statistics.spread)
    mine = frame_file.load(saved, IDENTITY).part(slice(1, 3), rank_heads(KV_HEADS, 1, 2))
    part.load(mine.centre, mine.gain, mine.spread)
    assert torch.equal(part.centre, whole.centre[:, 1:, 2:])
    assert torch.equal(part.matrix, whole.matrix[:, 1:, 2:])
    assert torch.equal(part.dual, whole.dual[:, 1:, 2:])


def test_loaded_frames_outlive_a_flush_and_gather_nothing(statistics: FrameStatistics) -> None:
    frames = Frames(LAYERS, KV_HEADS, HEAD_DIM, 64, "cpu")
    frames.load(statistics.centre, statistics.gain, statistics.spread)
    before = frames.matrix.clone()
    assert frames.ready and frames.calibrated and all(frames.centred)
    k = torch.randn(128, KV_HEADS, HEAD_DIM)
    positions = torch.arange(128)
    assert frames.new_centre(0, k, k, positions) is None
    frames.observe(0, k.repeat(1, 2, 1), k, k, positions, None, 0.125)
    frames.reset()
    assert frames.ready
    assert torch.equal(frames.matrix, before) and torch.equal(frames.centre, statistics.centre)


def test_a_file_gives_the_frames_that_the_same_text_gives_online() -> None:
    q, k, v = (torch.randn(128, heads, HEAD_DIM) for heads in (8, 4, 4))
    online = Frames(1, 4, HEAD_DIM, 16, "cpu")
    centre = online.new_centre(0, k, v, torch.arange(128))
    assert centre is not None
    online.freeze_centre(0, centre)
    online.observe(0, q, k, v, torch.arange(128), None, 0.125)
    online.calibrate()
    loaded = Frames(1, 4, HEAD_DIM, 16, "cpu")
    seen = online.statistics
    loaded.load(online.centre, seen.gain(), seen.spread())
    assert torch.equal(loaded.matrix, online.matrix) and torch.equal(loaded.dual, online.dual)


def test_statistics_of_another_shape_are_refused(statistics: FrameStatistics) -> None:
    frames = Frames(LAYERS, KV_HEADS + 1, HEAD_DIM, 64, "cpu")
    with pytest.raises(ValueError, match="expected statistics of shape"):
        frames.load(statistics.centre, statistics.gain, statistics.spread)


def model_directory(path: Path, config: dict[str, Any], weights: torch.Tensor) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.layers.0.self_attn.k_proj.weight": weights,
        "model.layers.1.self_attn.k_proj.weight": weights + 1,
    }
    save_file(tensors, path / "model.safetensors")
    return path


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 256,
    "vocab_size": 1000,
}


def test_identity_survives_copies_and_spellings(tmp_path: Path) -> None:
    weights = torch.randn(64, 256).bfloat16()
    old = CONFIG | {"rope_theta": 1e4}
    new = CONFIG | {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    first = frame_file.model_identity(model_directory(tmp_path / "a", old, weights))
    second = frame_file.model_identity(model_directory(tmp_path / "b", new, weights.float()))
    assert first == second
    assert first["kv_heads"] == 4 and first["head_dim"] == 64


def test_identity_is_the_same_whatever_device_is_worked_on(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "a", CONFIG, torch.randn(64, 256).bfloat16())
    known = frame_file.model_identity(directory)
    with torch.device("meta"):
        assert frame_file.model_identity(directory) == known


def test_identity_tells_a_fine_tune(tmp_path: Path) -> None:
    weights = torch.randn(64, 256).bfloat16()
    base = frame_file.model_identity(model_directory(tmp_path / "a", CONFIG, weights))
    tuned = frame_file.model_identity(model_directory(tmp_path / "b", CONFIG, weights * 1.01))
    assert {name for name in base if base[name] != tuned[name]} == {"weights"}


def test_a_directory_without_config_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"config\.json"):
        frame_file.model_identity(tmp_path)


def test_a_path_that_exists_is_the_local_model(tmp_path: Path) -> None:
    assert frame_file.local_model(str(tmp_path)) == tmp_path


def calibrate(model: Path, out: Path, *options: str) -> int:
    return cli.main(["calibrate", "--model", str(model), "--out", str(out), *options])


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "WINDOW_TOKENS", 256)


def test_calibrate_writes_a_file_of_the_model(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames.safetensors"
    assert calibrate(tiny_model, out, "--windows", "1", "--gradient-windows", "0") == 0
    known = frame_file.load(out, frame_file.model_identity(tiny_model))
    assert known.centre.shape == (2, 4, 2, 64) and known.gain.shape == (4, 2, 64)
    assert out.stat().st_size < 64 * 1024
    assert bool((known.spread > 0).all()) and bool((known.gain > 0).all())
    assert known.distortion is None


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("options", [[], ["--gradient-windows", "2", "--page-size", "32"]])
def test_calibrate_measures_every_pattern_of_every_slice(
    tiny_model: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "frames.safetensors"
    assert calibrate(tiny_model, out, "--windows", "2", *options) == 0
    tokens = 512 if options else "1,024"
    assert f"from 512 tokens, gradients from {tokens}" in capsys.readouterr().out
    found = frame_file.load(out, frame_file.model_identity(tiny_model)).distortion
    assert found is not None and found.shape == (2, 4, 2, len(CHOICES[0]))
    assert bool(found.isfinite().all()) and bool((found >= 0).all())
    assert float((found.diff(dim=-1) > 0).float().mean()) > 0.8, "from fine to coarse"


@pytest.mark.usefixtures("short_windows")
def test_gradients_are_taken_behind_the_text_of_the_frames(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_spherical.evaluation import gradients, runner

    learnt, pulled = [], []
    learn = runner.learn_frames

    def learn_frames(model: Any, frames: Frames, windows: Any) -> None:
        learnt.append(list(windows))
        learn(model, frames, learnt[-1])

    def distortion(model: Any, coder: gradients.Coder, windows: Any) -> torch.Tensor:
        pulled.append(list(windows))
        return torch.ones(2, 4, 2, len(CHOICES[0]))

    monkeypatch.setattr(runner, "learn_frames", learn_frames)
    monkeypatch.setattr(gradients, "distortion", distortion)
    every = inputs.load_windows(tiny_model, TEXT)
    few = tmp_path / "few.txt"
    few.write_text(TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    for options in ([], ["--text", str(few)]):
        assert calibrate(tiny_model, tmp_path / "f", "--windows", "3", *options) == 0
    known = inputs.load_windows(tiny_model, few)
    assert 0 < len(known) < 4
    assert torch.equal(torch.stack(learnt[0]), every[:3])
    assert torch.equal(torch.stack(pulled[0]), every[-4:])
    assert torch.equal(torch.stack(pulled[1]), known), "where there are too few: the same"


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "0"], "--windows 0: expected 1 or more"),
        (["--gradient-windows", "-1"], "--gradient-windows -1: expected 1 or more, or 0 for none"),
        (["--gradient-windows", "999"], "tokens: use a longer text or fewer windows"),
        (["--device", "abacus"], "--device abacus: not usable here"),
    ],
)
def test_calibrate_names_what_is_wrong(
    tiny_model: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert calibrate(tiny_model, tmp_path / "f.safetensors", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {' '.join(options)}:") and error.count("\n") == 1
    assert message in error


def test_calibrate_names_a_directory_without_a_tokenizer(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    assert calibrate(tmp_path, tmp_path / "f.safetensors") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --model {tmp_path}: no tokenizer") and error.count("\n") == 1
