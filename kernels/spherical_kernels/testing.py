"""What tests and benchmarks share: comparisons that say how wrong, poison, guarded buffers.

The poison is the byte 0xFF: as a code it is the largest one, and as float16, bfloat16 or float32 it
reads as NaN, so that whoever uses bytes that nobody wrote says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch

POISON = 0xFF
GUARD_BYTES = 4096


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    max_error: float,
    rms_error: float,
    name: str = "result",
) -> None:
    """Two tensors of one shape agree: their largest and their root mean square error are in bounds.

    Both bounds are in the tensors' own units. What is not finite (NaN, +inf, -inf) must be the same
    on both sides and takes no part in the errors. Raises AssertionError with both errors, both
    bounds and the worst place.
    """
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: expected shape {list(expected.shape)}, got {list(actual.shape)}"
        )
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    finite = expected.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    alike = same | (finite & actual.isfinite())
    if not bool(alike.all()):
        raise AssertionError(
            f"{name}: {int((~alike).sum())} of {alike.numel()} places differ in what is finite, "
            f"{_place(~alike, actual, expected)}"
        )
    error = torch.where(finite, (actual - expected).abs(), 0.0)
    if not error.numel():
        return
    largest = float(error.max())
    rms = float((error.square().sum() / finite.sum().clamp_min(1)).sqrt())
    if largest > max_error or rms > rms_error:
        raise AssertionError(
            f"{name}: max error {largest:.3g} (allowed {max_error:.3g}), rms error {rms:.3g} "
            f"(allowed {rms_error:.3g}), {_place(error == error.max(), actual, expected)}"
        )


def _place(where: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor) -> str:
    """The first of the marked places, for people."""
    index = tuple(where.nonzero()[0].tolist())
    wanted, got = float(expected[index]), float(actual[index])
    return f"at {list(index)}: expected {wanted:.6g}, got {got:.6g}"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor in place, floats with NaN and integers with bytes 0xFF; returns it."""
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(POISON if tensor.dtype == torch.uint8 else -1)


@contextmanager
def guarded(
    *shape: int, dtype: torch.dtype = torch.uint8, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """A poisoned, contiguous tensor with poisoned guards before and behind it.

    On leaving, raises AssertionError when a byte of a guard has changed.
    """
    size = prod(shape) * dtype.itemsize
    memory = poison(torch.empty(2 * GUARD_BYTES + size, dtype=torch.uint8, device=device))
    yield memory[GUARD_BYTES : GUARD_BYTES + size].view(dtype).view(shape)
    for side, guard in (("before", memory[:GUARD_BYTES]), ("behind", memory[-GUARD_BYTES:])):
        changed = guard != POISON
        if bool(changed.any()):
            raise AssertionError(f"{int(changed.sum())} bytes written {side} the buffer")
