"""The decode kernel against its reference, in Triton's interpreter on shapes of a few pages."""

from __future__ import annotations

import pytest
import torch
from decode_case import COLD, COOL, FINE, FROZEN, HOT, HOT4, PAGE, UNCODED, WARM, Case

from spherical_kernels.codec.patterns import PATTERNS, Pattern
from spherical_kernels.decode import launch
from spherical_kernels.decode.launch import Merge
from spherical_kernels.testing import POISON


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "kind",
    [HOT, FINE, WARM, COLD, FROZEN, UNCODED],
    ids=["hot", "fine", "warm", "cold", "frozen", "uncoded"],
)
def test_one_kind(kind: tuple[Pattern, Pattern], d: int) -> None:
    Case((kind,), [(3 * PAGE,), (PAGE,)], d).check()


@pytest.mark.parametrize("d", [80, 96, 256])
def test_other_head_dims(d: int) -> None:
    tokens = [(PAGE + 7, PAGE, 2 * PAGE, PAGE, 2 * PAGE)]
    Case((HOT, FINE, WARM, COLD, FROZEN), tokens, d).check()


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 9, 16])
def test_any_number_of_query_heads(group: int) -> None:
    Case((HOT, WARM), [(5, PAGE), (PAGE, 2 * PAGE)], 64, group=group).check()


def test_kinds_merge_over_requests_and_heads() -> None:
    kinds = (HOT, WARM, COLD, (PATTERNS[2], PATTERNS[6]), (PATTERNS[7], PATTERNS[5]))
    tokens = [
        (PAGE, 2 * PAGE, 0, PAGE, PAGE), (1, 0, 3 * PAGE, 0, 0),
        (2 * PAGE + 3, 4 * PAGE, PAGE, 0, 0), (17, 0, 0, 0, 2 * PAGE),
    ]  # fmt: skip
    Case(kinds, tokens, 64, kv_heads=2, group=3).check()


def test_hot_codes_of_four_bits() -> None:
    Case((HOT4, WARM), [(2 * PAGE + 9, PAGE)], 64).check()


@pytest.mark.parametrize(("d", "page"), [(64, 32), (128, 16), (128, 32), (256, 16)])
def test_smaller_pages(d: int, page: int) -> None:
    tokens = [(page + 5, page, 2 * page, page, 2 * page), (3, 0, 0, page, page)]
    Case((HOT, FINE, WARM, COOL, COLD), tokens, d, page=page).check()


@pytest.mark.parametrize(
    ("merge", "group", "d"),
    [
        (Merge(2, bands=1), 3, 64),
        (Merge(8, bands=1), 1, 128),
        (Merge(2), 3, 64),
        (Merge(16), 1, 128),
        (Merge(2), 6, 80),
    ],
    ids=str,
)
def test_every_cut_of_the_merge(
    merge: Merge, group: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or all bands, one or several query heads, items in one or in several rounds, of which one
    has items of both frames."""
    monkeypatch.setattr(launch, "MERGES", {1: merge})
    tokens = [(2 * PAGE + 5, 4 * PAGE), (3, 0), (0, PAGE), (2 * PAGE, PAGE), (PAGE, 0)]
    Case((HOT, WARM), tokens, d, group=group).check(items=9)


@pytest.mark.parametrize("d", [64, 128])
def test_patterns_that_differ_between_heads(d: int) -> None:
    tokens = [(PAGE + 5, 2 * PAGE, PAGE, 2 * PAGE), (3, 0, PAGE, PAGE)]
    kind_of = (0, 0, 0), (1, 1, 1), (1, 2, 3), (2, 3, 3)
    Case((HOT, WARM, COOL, COLD), tokens, d, kv_heads=3, kind_of=kind_of).check()


def test_a_request_without_pages_has_no_attention() -> None:
    case = Case((HOT, WARM), [(0, PAGE), (0, 0)], 64)
    out, lse = case.actual()
    assert bool((out[1] == 0).all()) and bool((lse[1] == -torch.inf).all())
    case.check()


@pytest.mark.parametrize("valid", [1, 16, PAGE - 1])
def test_bytes_of_tokens_that_do_not_exist_change_nothing(valid: int) -> None:
    case = Case((HOT,), [(PAGE + valid,)], 64)
    state = case.rng.get_state()
    before = case.actual()
    for layout, (slices,) in zip(case.kinds[0], case.slices[0]):
        (tile,) = layout.tiles
        radii = slices[:, layout.radii_offset_bytes : layout.radii_offset_bytes + 2 * PAGE]
        radii[-1, 2 * valid :] = POISON  # float16 NaN
        slices[-1, tile.offset_bytes + valid * tile.row_bytes :] = POISON
    case.rng.set_state(state)
    for one, other in zip(before, case.actual()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [HOT, WARM], ids=["hot", "warm"])
def test_nan_in_a_radius_or_scale_shows(kind: tuple[Pattern, Pattern]) -> None:
    case = Case((kind,), [(2 * PAGE,)], 64)
    layout, slices = case.kinds[0][1], case.slices[0][1][0]
    start = layout.scales_offset_bytes if layout.calibrated else layout.radii_offset_bytes
    slices[0, start : start + 2] = POISON
    assert bool(case.actual()[0].isnan().any())


@pytest.mark.parametrize("loudness", [0.0, 1e-4, 10.0])
def test_flat_and_peaked_attention(loudness: float) -> None:
    Case((HOT, WARM), [(PAGE, 3 * PAGE)], 64, loudness=loudness).check(max(1, 2 * loudness))


@pytest.mark.parametrize("kind", [HOT, WARM], ids=["hot", "warm"])
def test_values_from_tiny_to_huge(kind: tuple[Pattern, Pattern]) -> None:
    """Radii of a page lie 2**10 above those of the page before it, then as far below."""
    case = Case((kind,), [(5 * PAGE,)], 64)
    layout, slices = case.kinds[0][1], case.slices[0][1][0]
    factors = torch.tensor([2.0**-8, 4.0, 2.0**12, 1.0, 2.0**-10]).half()
    if layout.calibrated:
        at, count = layout.scales_offset_bytes, 2
    else:
        at, count = layout.radii_offset_bytes, PAGE
    slices[:, at : at + 2 * count].view(torch.float16).mul_(factors.unsqueeze(1))
    case.check()


def test_queries_out_of_a_wider_tensor() -> None:
    case = Case((HOT, WARM), [(PAGE, PAGE), (9, PAGE)], 64, kv_heads=2)
    state = case.rng.get_state()
    before = case.actual()
    wide = torch.full((len(case.q), 3 * case.q.shape[1], 64), torch.nan, dtype=case.q.dtype)
    wide[:, : case.q.shape[1]] = case.q
    case.q = wide[:, : case.q.shape[1]]
    case.rng.set_state(state)
    for one, other in zip(before, case.actual()):
        assert torch.equal(one, other)


def test_queries_of_another_shape_are_refused() -> None:
    case = Case((HOT,), [(PAGE,)], 64)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        case.actual()
