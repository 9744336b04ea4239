"""The decode kernel compiles for GPUs that are not here, without spilling registers."""

from __future__ import annotations

import pytest
from compiled_decode import compile_decode
from decode_case import COLD, HOT, WARM, Kinds


@pytest.mark.parametrize(
    ("capability", "head_dim", "group", "kinds"),
    [
        (90, 128, 4, (HOT, WARM, COLD)),
        (90, 64, 3, (HOT, WARM)),
        (80, 128, 4, (WARM,)),
    ],
)
def test_compiles_without_spills(capability: int, head_dim: int, group: int, kinds: Kinds) -> None:
    usage = compile_decode(kinds, head_dim, group, capability).usage
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
