"""The codecs of the format study: the product's own is the product's, and what is beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cache_tools import normal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from study_codecs import Codec, Head, frame, product, water_fill
from study_forms import FORMS, RADII, STEP, dropped, radius_first, small_floats, uniform
from study_runs import BASES, WARM, runs

from spherical_kernels.codec.frames import calibrated_frame
from spherical_kernels.codec.pages import LARGEST_RADIUS, decode_slices, encode_slices
from spherical_kernels.codec.patterns import BANDS, FrameKind, Pattern
from spherical_kernels.codec.radii import radius_table
from spherical_kernels.codec.slices import slice_layout
from spherical_kernels.testing import assert_close

HEADS, TOKENS = 2, 128
every_base = pytest.mark.parametrize("bits", BASES, ids=str)


def some_heads(head_dim: int) -> tuple[Head, torch.Tensor]:
    """Statistics, and tokens [heads, tokens, d] that have them."""
    centre = 3 * normal(HEADS, head_dim, seed=1)
    gain, spread = (normal(HEADS, head_dim, seed=seed).exp() for seed in (2, 3))
    x = normal(HEADS, TOKENS, head_dim, seed=4) * spread.unsqueeze(1) + centre.unsqueeze(1)
    return Head(centre, gain, spread), x


def relative_error(y: torch.Tensor, read: torch.Tensor) -> float:
    """Squared error over squared length."""
    return float((y - read).square().sum() / y.square().sum())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page", [16, 64])
@every_base
def test_defaults_are_the_product(bits: tuple[int, ...], page: int, head_dim: int) -> None:
    head, x = some_heads(head_dim)
    layout = slice_layout(Pattern(FrameKind.CALIBRATED, bits), page, head_dim)
    frames = calibrated_frame(head.gain, head.spread)
    pages = TOKENS // page
    matrix, dual, centre = (a.repeat_interleave(pages, 0) for a in (*frames, head.centre))
    slices = encode_slices(layout, x.reshape(-1, page, head_dim), matrix, centre)
    expected = decode_slices(layout, slices, dual, centre).view_as(x)
    assert_close(Codec(bits, page=page).code(x, head), expected, max_error=1e-4, rms_error=1e-5)


@every_base
def test_bits_are_those_of_a_slice(bits: tuple[int, ...]) -> None:
    layout = slice_layout(Pattern(FrameKind.CALIBRATED, bits), 64, 64)
    assert Codec(bits).counted_bits(64) == layout.size_bytes * 8 / (64 * 64)


@every_base
def test_the_study_codes_as_the_product_where_both_can(bits: tuple[int, ...]) -> None:
    y = normal(3, BANDS, 32, 16, seed=5) * normal(3, 1, 32, 1, seed=6).exp()
    assert_close(
        radius_first(y, bits, uniform, RADII["e2m2"]),
        product(y, bits),
        max_error=1e-4,
        rms_error=1e-5,
    )


def test_its_small_floats_are_the_radii() -> None:
    assert torch.equal(small_floats(2, 2), radius_table())
    assert float(RADII["e2m2"].table[-1]) == LARGEST_RADIUS


@pytest.mark.parametrize(("bands", "weight"), [(2, "sqrt"), (4, "gain"), (8, "none"), (1, "sqrt")])
def test_other_frames_are_frames_too(bands: int, weight: str) -> None:
    head, x = some_heads(128)
    matrix, dual = frame(head, bands, weight)
    assert_close(
        matrix @ dual.transpose(1, 2),
        torch.eye(128).expand(2, -1, -1),
        max_error=1e-4,
        rms_error=1e-5,
    )
    y = (x - head.centre.unsqueeze(1)) @ matrix.transpose(1, 2)
    spread = y.unflatten(-1, (bands, -1)).square().mean((1, 3)).sqrt()
    assert_close(spread, torch.ones(HEADS, bands), max_error=0.15, rms_error=0.1)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_vector_codebook_is_nearer_to_normals_than_even_steps(bits: int) -> None:
    z = normal(4096, 64, seed=7)
    errors = {name: relative_error(z, form(z, bits)) for name, form in FORMS.items()}
    assert errors["vector"] < errors["lloyd"] < errors["uniform"]
    assert errors["vector"] < errors["pair"] < errors["polar"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_steps_are_the_best_ones(bits: int) -> None:
    z = normal(1 << 16, seed=8)
    error = relative_error(z, uniform(z, bits))
    for factor in (0.93, 1.07):
        assert error < relative_error(z, uniform(z / factor, bits) * factor)
    assert set(STEP) >= {bits}


def test_recursive_polar_angles_keep_a_length() -> None:
    z = normal(100, 16, seed=9)
    read = FORMS["polar"](z, 4)
    assert_close(read.norm(dim=-1), torch.full((100,), 4.0), max_error=1e-4, rms_error=1e-5)
    assert relative_error(z / z.norm(dim=-1, keepdim=True), read / 4) < 0.03


@pytest.mark.parametrize("fine", WARM, ids=str)
def test_refitted_radii_lose_no_more_than_kept_ones(fine: tuple[int, ...]) -> None:
    y = normal(4, BANDS, 64, 16, seed=10)
    coarse = tuple(b - 2 for b in fine)
    kept, refitted = (relative_error(y, dropped(y, coarse, refit)) for refit in (False, True))
    assert relative_error(y, product(y, coarse)) < min(kept, refitted)
    assert refitted <= kept * 1.001


def test_water_filling_spends_what_it_may_where_it_helps() -> None:
    assert water_fill((1.0, 1.0, 1.0, 1.0), 2.0) == (2, 2, 2, 2)
    bits = water_fill((64.0, 4.0, 1.0, 0.05), 2.5)
    assert sum(bits) == 10 and list(bits) == sorted(bits, reverse=True)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_run_reads_finite_numbers(head_dim: int) -> None:
    head, x = some_heads(head_dim)
    labels = set()
    for run in runs(head_dim):
        labels.add((run.group, run.label))
        if run.codec.levels == "vector":
            continue  # slow, and measured above
        read = run.codec.code(x, head)
        assert bool(read.isfinite().all()), run.label
        assert relative_error(x - head.centre.unsqueeze(1), read - head.centre.unsqueeze(1)) < 1.0
    assert len(labels) == len(runs(head_dim)), "a label names one codec"
