"""The codecs that tiers are compared with: one matrix of tests for all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sglang_spherical import cli
from sglang_spherical.evaluation import comparators, inputs
from sglang_spherical.evaluation.attention import CodedRead, attend_codes
from sglang_spherical.evaluation.comparators import COMPARATORS, Comparator, ComparatorRead
from sglang_spherical.evaluation.comparators.codebook import spherical_k_means
from sglang_spherical.evaluation.comparators.lloyd import lloyd_max_levels
from sglang_spherical.evaluation.scores import LayerErrors
from sglang_spherical.pool.arena import KEYS, VALUES

HEADS, TOKENS, HEAD_DIM, PAGE = 2, 256, 64, 64
TEXT = Path(cli.__file__).with_name("calibration.txt")

# By hand, for head dimension 64: bits of a key and of a value component.
BITS = {
    "fp8": (8, 8),
    "fp8-scaled": (8, 8),
    "kivi4": (4 + 32 / 64, 4 + 32 / 32),
    "kivi2": (2 + 32 / 64, 2 + 32 / 32),
    "lloyd4": (4 + 16 / 64, 4 + 16 / 64),
    "lloyd3": (3 + 16 / 64, 3 + 16 / 64),
    "codebook16x64": ((8 + 6) / 16, 16),
    "codebook16x16": ((8 + 4) / 16, 16),
    "codebook16x8": ((8 + 3) / 16, 16),
    "codebook32x64": ((8 + 6) / 32, 16),
    "codebook32x16": ((8 + 4) / 32, 16),
    "codebook32x8": ((8 + 3) / 32, 16),
}
# Largest relative error (root of the error's energy) of normal vectors, keys and values.
ERROR = {
    "fp8": (0.04, 0.04),
    "fp8-scaled": (0.04, 0.04),
    "kivi4": (0.11, 0.10),
    "kivi2": (0.52, 0.47),
    "lloyd4": (0.1, 0.1),
    "lloyd3": (0.19, 0.19),
}
every_method = pytest.mark.parametrize("name", COMPARATORS)


def normal(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, TOKENS, HEAD_DIM, generator=generator)


def learnt(name: str, x: torch.Tensor) -> Comparator:
    (comparator,) = comparators.make(name)
    for side in (KEYS, VALUES):
        comparator.learn(0, side, x)
    return comparator


def through(comparator: Comparator, side: int, x: torch.Tensor) -> torch.Tensor:
    return ComparatorRead(comparator, PAGE).reach(0, side, x)[1]


def error(x: torch.Tensor, coded: torch.Tensor) -> float:
    return float((x - coded).norm() / x.norm())


def test_the_matrix_covers_every_method() -> None:
    assert BITS.keys() == COMPARATORS.keys()
    assert [c.name for c in comparators.make("all")] == list(COMPARATORS)


@every_method
def test_parts_hold_what_their_bits_can_and_are_all_counted(name: str) -> None:
    x, seen = normal(), []
    comparator = learnt(name, x)
    for side, expected in zip((KEYS, VALUES), BITS[name]):
        parts = comparator.encode(0, side, x)
        for part in parts:
            if part.data.dtype == torch.uint8:
                assert int(part.data.max()) < 2**part.bits
            else:
                assert part.data.element_size() * 8 == part.bits
        seen.append(sum(part.data.numel() * part.bits for part in parts) / x.numel())
        assert seen[-1] == expected
    found = comparators.bits_per_value(comparator, HEADS, PAGE, HEAD_DIM)
    assert found == pytest.approx(sum(seen) / 2)


@every_method
def test_error_of_unseen_normal_vectors(name: str) -> None:
    comparator = learnt(name, normal())
    x = normal(1)
    keys, values = (error(x, through(comparator, side, x)) for side in (KEYS, VALUES))
    if name.startswith("codebook"):
        assert 0.5 < keys < 1.0 and values < 1e-3
    else:
        assert 0 < keys < ERROR[name][0] and 0 < values < ERROR[name][1]


@every_method
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_the_scale_of_the_data_does_not_matter(name: str, scale: float) -> None:
    x = normal()
    unit, scaled = learnt(name, x), learnt(name, x * scale)
    for side in (KEYS, VALUES):
        expected = error(x, through(unit, side, x))
        if name == "fp8":  # the method has no scale: tiny numbers are lost, huge ones saturate
            continue
        found = error(x, through(scaled, side, x * scale) / scale)
        assert found == pytest.approx(expected, rel=0.05, abs=1e-3)


@every_method
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_tokens_are_finite(name: str, value: float) -> None:
    x = torch.full((HEADS, PAGE, HEAD_DIM), value)
    comparator = learnt(name, x)
    for side in (KEYS, VALUES):
        coded = through(comparator, side, x)
        assert coded.isfinite().all() and coded.shape == x.shape
        if value == 0:
            assert coded.abs().max() < 1e-6


@every_method
def test_attention_reads_the_first_page_and_the_newest_exactly(name: str) -> None:
    x = normal()
    comparator = learnt(name, x)
    q, errors = torch.randn(HEADS, 2, TOKENS, HEAD_DIM) / 8, LayerErrors(1)
    out = attend_codes(CodedRead(ComparatorRead(comparator, PAGE), errors), 0, q, x, x)
    for token in (10, PAGE + 3, TOKENS - 1):
        of = torch.arange(token + 1) // PAGE
        exact = ((of == 0) | (of == token // PAGE)).view(1, -1, 1)
        before = x[:, : token + 1]
        keys, values = (
            torch.where(exact, before, through(comparator, side, x)[:, : token + 1])
            for side in (KEYS, VALUES)
        )
        p = (q[:, :, token] @ keys.transpose(-1, -2)).softmax(-1)
        torch.testing.assert_close(out[:, :, token], p @ values, rtol=1e-4, atol=1e-4)
    assert errors.summary()["attention_kl"] > 0


def test_lloyd_max_levels_are_those_of_max() -> None:
    """Max 1960, table I."""
    two = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])
    torch.testing.assert_close(lloyd_max_levels(2), two, rtol=0, atol=1e-3)
    assert lloyd_max_levels(4)[-1].item() == pytest.approx(2.733, abs=2e-3)


def test_k_means_finds_directions_that_are_there() -> None:
    true = torch.eye(4)
    noise = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    points = true.repeat_interleave(50, 0) + 0.05 * noise  # a start in every cluster
    found = spherical_k_means(torch.nn.functional.normalize(points, dim=-1)[None], 4)[0]
    assert (found @ true.T).amax(0).min() > 0.99


def test_evaluate_compares(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "WINDOW_TOKENS", 256)
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    base = ["evaluate", "--model", str(tiny_model), "--text", str(TEXT), "--json", str(out)]
    options = ["--windows", "1", "--tiers", "warm", "--compare", "fp8,lloyd4,codebook16x8"]
    assert cli.main([*base, *options, "--plot", str(plot)]) == 0
    runs = json.loads(out.read_text())["runs"]
    names = [run["name"] for run in runs]
    assert names == ["dense", "warm", "fp8", "lloyd4", "codebook16x8"]
    assert [run["bits_per_value"] for run in runs[2:]] == [8, 4.25, (11 / 16 + 16) / 2]
    assert all(run["kl_mean"] > 0 for run in runs[1:])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_comparator_is_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["evaluate", "--model", str(tiny_model), "--text", str(TEXT)]
    options = ["--compare", "fp8,zip", "--json", str(tmp_path / "out.json")]
    assert cli.main([*base, *options]) == 2
    shown = capsys.readouterr().err
    assert "--compare fp8,zip: expected some of all,fp8," in shown and shown.count("\n") == 1
