"""The helpers that other tests rely on see what they are for."""

from __future__ import annotations

import pytest
import torch

from spherical_kernels.testing import GUARD_BYTES, assert_close, guarded, poison


def test_both_errors_are_bounded_and_reported() -> None:
    expected = torch.zeros(4, 25)
    actual = expected.clone()
    actual[2, 3] = 1.0  # max 1, rms 0.1
    assert_close(actual, expected, max_error=1.0, rms_error=0.1001)
    message = r"out: max error 1 .*rms error 0\.1 .*at \[2, 3\]: expected 0, got 1"
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, max_error=0.99, rms_error=1.0, name="out")
    with pytest.raises(AssertionError, match="rms error"):
        assert_close(actual, expected, max_error=2.0, rms_error=0.09)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_be_the_same(odd: float) -> None:
    expected = torch.tensor([1.0, odd, 2.0])
    assert_close(expected.clone(), expected, max_error=0.0, rms_error=0.0)
    for wrong in (0.0, torch.nan if odd == odd else torch.inf):
        actual = expected.clone()
        actual[1] = wrong
        with pytest.raises(AssertionError, match="1 of 3 places differ in what is finite"):
            assert_close(actual, expected, max_error=9.0, rms_error=9.0)
        with pytest.raises(AssertionError, match="differ in what is finite"):
            assert_close(expected, actual, max_error=9.0, rms_error=9.0)


def test_shapes_must_be_the_same() -> None:
    with pytest.raises(AssertionError, match=r"expected shape \[1, 3\], got \[3\]"):
        assert_close(torch.zeros(3), torch.zeros(1, 3), max_error=1.0, rms_error=1.0)
    assert_close(torch.zeros(0), torch.zeros(0), max_error=0.0, rms_error=0.0)


def test_poison_is_nan_or_all_ones() -> None:
    assert bool(poison(torch.zeros(3)).isnan().all())
    assert bool(poison(torch.zeros(3, dtype=torch.float16)).isnan().all())
    assert poison(torch.zeros(2, dtype=torch.uint8)).tolist() == [255, 255]
    assert poison(torch.zeros(2, dtype=torch.int32)).tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_guards_see_a_write_on_either_side(dtype: torch.dtype) -> None:
    with guarded(3, 5, dtype=dtype) as buffer:
        assert buffer.shape == (3, 5)
        assert buffer.is_contiguous()
        assert bool((buffer.view(torch.uint8) == 0xFF).all())
        buffer.zero_()
    for offset, side in ((-1, "before"), (15, "behind")):
        with (
            pytest.raises(AssertionError, match=f"bytes written {side}"),
            guarded(15, dtype=dtype) as buffer,
        ):
            start = GUARD_BYTES // dtype.itemsize + offset
            buffer.as_strided((1,), (1,), start).zero_()
