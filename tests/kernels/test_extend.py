"""Extending over coded prefixes against the references, in Triton's interpreter on a few pages; on
a GPU by the kernel that serving would launch."""

from __future__ import annotations

import pytest
import torch
from extend_case import (
    COLD,
    DEVICE,
    FINE,
    FROZEN,
    HOT,
    HOT4,
    THREE,
    UNCODED,
    WARM,
    Case,
    Request,
)

from spherical_kernels.codec.pages import encode_slices
from spherical_kernels.codec.patterns import FrameKind, Pattern
from spherical_kernels.extend import ends
from spherical_kernels.testing import POISON


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("level", ["0", "1", "2"], ids=["hot", "warm", "cold"])
def test_one_level(level: str, d: int) -> None:
    Case([Request(level * 3, 9)], d).check()


@pytest.mark.parametrize("d", [80, 96, 256])
def test_other_head_dims(d: int) -> None:
    Case([Request("01230", 5, partial=7)], d, tiers=(HOT, FINE, WARM, COLD)).check()


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
def test_any_number_of_query_heads(group: int) -> None:
    Case([Request("0110", 9, partial=33)], group=group, kv_heads=2).check()


@pytest.mark.parametrize("page_size", [16, 32])
def test_other_page_sizes(page_size: int) -> None:
    tiers = HOT, FINE, WARM, COLD
    Case([Request("012230", 9, partial=3)], tiers=tiers, page_size=page_size).check()


@pytest.mark.parametrize(
    "tiers", [(HOT4, THREE), (HOT, FINE), (HOT, FROZEN), (HOT, UNCODED), (HOT,)], ids=str
)
def test_other_patterns(tiers: tuple[tuple[Pattern, Pattern], ...]) -> None:
    levels = "01100" if len(tiers) > 1 else "000"
    Case([Request(levels, 9, partial=20)], tiers=tiers).check()


def test_mixed_levels_of_several_requests() -> None:
    requests = [
        Request("0112201", 3),
        Request("", 19),
        Request("0", 1, partial=1),
        Request("11111110", 17, partial=63),
        Request("2102", 16),
    ]
    Case(requests, kv_heads=2, group=3).check(slack=2, most_items=9)  # few tokens: no averaging


def test_patterns_that_differ_between_heads() -> None:
    requests = [Request("0112201", 3), Request("3210", 5, partial=1), Request("2332", 16)]
    kind_of = (0, 0, 0), (1, 1, 1), (1, 2, 3), (2, 3, 3)
    tiers = HOT, WARM, THREE, COLD
    Case(requests, kv_heads=3, group=2, tiers=tiers, kind_of=kind_of).check(most_items=9)


@pytest.mark.parametrize("present", [{1, 2}, {2}, {0, 2}], ids=str)
def test_only_kinds_that_may_be_there_are_launched(present: set[int]) -> None:
    Case([Request("".join(map(str, present)) * 2, 5)], present=present).check()


def test_one_new_token() -> None:
    Case([Request("0120", 1, partial=40)]).check()


def test_no_prefix_at_all() -> None:
    Case([Request("", 70), Request("", 3)]).check()


@pytest.mark.parametrize(("tile_rows", "most_items"), [(64, 1), (64, 50), (128, 2)])
def test_any_cut(tile_rows: int, most_items: int) -> None:
    requests = [Request("01210", 33, partial=5), Request("12", 2)]
    Case(requests).check(tile_rows=tile_rows, most_items=most_items)


@pytest.mark.parametrize(("page_size", "d"), [(16, 64), (64, 64), (64, 128)])
def test_more_pages_than_a_block_of_centroids(page_size: int, d: int) -> None:
    """And than any pipeline or ring has stages."""
    Case([Request("0" * 6 + "1" * 19, 6)], d, page_size=page_size).check(most_items=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_in_and_out(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    Case([Request("0110", 9, partial=2)], dtype=dtype).check(1 if dtype == torch.float16 else 6)


@pytest.mark.parametrize("loudness", [0.0, 1e-4, 10.0])
def test_flat_and_peaked_attention(loudness: float) -> None:
    Case([Request("0110", 9, partial=2)], loudness=loudness).check(max(1, loudness))


@pytest.mark.parametrize("valid", [1, 16, 63])
def test_bytes_of_tokens_that_do_not_exist_change_nothing(valid: int) -> None:
    case = Case([Request("10", 9, partial=valid)])
    before = case.actual()
    for layout, slices in zip(case.sides[0], case.slices[0]):
        (tile,) = layout.tiles
        radii = slices[1, :, layout.radii_offset_bytes : layout.radii_offset_bytes + 128]
        radii[..., 2 * valid :] = POISON  # float16 NaN
        slices[1, :, tile.offset_bytes + valid * tile.row_bytes :] = POISON
    for one, other in zip(before, case.actual()):
        assert torch.equal(one, other)


@pytest.fixture
def one_product(monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of queries that meet the frames in one product of tf32."""
    if DEVICE == "cpu":  # in Triton's interpreter, which has no bfloat16, float16 does
        monkeypatch.setattr(ends, "precision_of", lambda _: "tf32")
        return torch.float16
    return torch.bfloat16


def test_frames_in_one_product(one_product: torch.dtype) -> None:
    Case([Request("0110", 9, partial=2)], dtype=one_product).check(1.5 if DEVICE == "cpu" else 6)


@pytest.mark.parametrize("level", [0, 1])
def test_nan_shows_in_one_product_too(level: int, one_product: torch.dtype) -> None:
    assert_nan_shows(level, one_product)


@pytest.mark.parametrize("level", [0, 1])
def test_nan_in_a_radius_or_unit_shows(level: int) -> None:
    assert_nan_shows(level, torch.float32)


def assert_nan_shows(level: int, dtype: torch.dtype) -> None:
    case = Case([Request(f"{level}" * 2, 3)], dtype=dtype)
    layout, slices = case.sides[level][1], case.slices[level][1]
    start = layout.scales_offset_bytes if layout.calibrated else layout.radii_offset_bytes
    slices[0, :, start : start + 2] = POISON
    assert bool(case.actual()[0].isnan().any())


def test_a_page_of_equal_tokens() -> None:
    """No spread: all radii are zero, the centroid says everything."""
    case = Case([Request("111", 5)])
    for side, layout in enumerate(case.sides[1]):
        centre = (case.frames.key_centre, case.frames.value_centre)[side]
        x = case.normal(1, 1, case.d).expand(1, 64, case.d)
        coded = encode_slices(layout, x, case.matrices[FrameKind.CALIBRATED], centre)
        case.slices[1][side][1] = coded
    case.check()
