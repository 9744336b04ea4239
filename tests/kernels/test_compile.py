"""The decode kernel compiles for GPUs that are not here, without spilling registers."""

from __future__ import annotations

import re

import pytest
from compiled_decode import compile_decode, compile_ends
from decode_case import COLD, FINE, FROZEN, HOT, WARM, Kinds

from spherical_kernels.decode.launch import SHARED_BYTES


@pytest.mark.parametrize(
    ("capability", "head_dim", "group", "kinds"),
    [
        (90, 128, 4, (HOT, WARM, COLD)),
        (90, 64, 3, (HOT, WARM, COLD)),
        (90, 128, 4, (FINE,)),
        (90, 64, 3, (FINE,)),
        (90, 128, 4, (FROZEN,)),
        (90, 64, 3, (FROZEN,)),
        (80, 128, 4, (WARM,)),
    ],
)
def test_compiles_without_spills(capability: int, head_dim: int, group: int, kinds: Kinds) -> None:
    usage = compile_decode(kinds, head_dim, group, capability).usage
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage


@pytest.mark.parametrize(
    ("head_dim", "group", "batch"), [(128, 4, 1), (128, 4, 256), (256, 8, 16), (64, 3, 64)]
)
def test_the_ends_compile_without_spills(head_dim: int, group: int, batch: int) -> None:
    """But for some numbers of wide heads, whose rows fill the registers."""
    for compiled in compile_ends(head_dim, group, batch):
        spilled = int(re.search(r"STACK:(\d+)", compiled.usage).group(1))
        assert spilled <= (128 if head_dim > 128 else 0), compiled.usage
        assert compiled.shared_bytes <= SHARED_BYTES
