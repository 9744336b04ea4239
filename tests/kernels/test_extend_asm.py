"""The extend kernel's inline PTX, run line by line in numpy: the interpreter does not get there."""

from __future__ import annotations

import numpy as np
import pytest

from spherical_kernels.codec.patterns import PATTERNS, Pattern
from spherical_kernels.codec.slices import slice_layout
from spherical_kernels.extend.launch import kernel_constants
from spherical_kernels.extend.operands import unpack_asm


def halves(word: int) -> np.ndarray:
    """The two float16 in a word, exactly, as float64."""
    return np.array([word], np.uint32).view(np.float16).astype(np.float64)


def word_of(pair: np.ndarray) -> int:
    return int(pair.astype(np.float16).view(np.uint32)[0])


def run_ptx(text: str, inputs: list[int]) -> tuple[float, float]:
    """The low and the high float16 that `text` leaves in $0 and $1."""
    values = {f"${i + 2}": value for i, value in enumerate(inputs)}
    body = text.strip("{} ")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        if line.startswith(".reg"):
            continue
        operation, rest = line.split(" ", 1)
        if operation == "mov.b32" and rest.startswith("{"):
            low, high = halves(values[rest.split(",")[-1].strip()])
            return float(low), float(high)
        target, *names = [name.strip() for name in rest.split(",")]
        a, *others = [values[n] if n in values else int(n) for n in names]
        if operation == "mov.b32":
            found = a
        elif operation in ("and.b32", "or.b32"):
            found = a & others[0] if operation == "and.b32" else a | others[0]
        elif operation in ("shr.b32", "shl.b32"):
            found = (a >> others[0] if operation == "shr.b32" else a << others[0]) & 0xFFFFFFFF
        elif operation == "fma.rn.f16x2":
            found = word_of(halves(a) * halves(others[0]) + halves(others[1]))
        elif operation == "mul.rn.f16x2":
            found = word_of(halves(a) * halves(others[0]))
        else:
            raise AssertionError(f"no such operation here: {operation}")
        values[target] = found
    raise AssertionError("nothing was returned")


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("half", [0, 1])
def test_lanes_are_levels_times_the_factor(pattern: Pattern, half: int) -> None:
    layout = slice_layout(pattern, 64, 128)
    table = kernel_constants(layout, layout, 4)["KB"]
    rng = np.random.default_rng(half)
    for band in range(len(table)):
        place, offset, _, tile0, shift0, bits0, up0, tile1, shift1, bits1, up1, exact = table[band]
        if not bits0:
            continue
        for _ in range(50):
            words = [int(word) for word in rng.integers(0, 1 << 32, 4)]
            factor = float(np.float16(rng.integers(1, 8) * 2.0 ** (10 - place)))
            least = (
                -offset * factor * 2.0 ** (place - 24) if exact else -offset * 2.0 ** (place - 9)
            )
            assert float(np.float16(least)) == least
            pairs = [word_of(np.array([x, x])) for x in (factor, least)]
            # as the kernel does, an arithmetic shift
            moved = [int(np.int32(np.uint32(w)) >> (8 * half)) & 0xFFFFFFFF for w in words]
            inputs = [moved[tile0], *([moved[tile1]] if bits1 else []), *pairs]
            for got, byte in zip(run_ptx(unpack_asm(table, band), inputs), (half, half + 2)):
                code = (words[tile0] >> (8 * byte + shift0) & ((1 << bits0) - 1)) << up0
                if bits1:
                    code |= (words[tile1] >> (8 * byte + shift1) & ((1 << bits1) - 1)) << up1
                scale = 2.0 ** (place - (24 if exact else 9))
                wanted = (code - offset) * factor * scale
                assert got == float(np.float16(wanted))
