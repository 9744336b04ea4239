"""Min-max quantisation as in KIVI (arXiv 2402.02750): keys by channel, values by token."""

from __future__ import annotations

import torch

from sglang_spherical.evaluation.comparators.base import Comparator, Part
from sglang_spherical.pool.arena import KEYS

KEY_GROUP = 64
"""Consecutive tokens of one key channel that share a scale and a zero."""

VALUE_GROUP = 32
"""Neighbouring channels of one token's value that share a scale and a zero."""


class MinMax(Comparator):
    """Even steps from the smallest to the largest number of a group; scale and zero in float16."""

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.bits = bits

    def encode(self, layer: int, side: int, x: torch.Tensor) -> tuple[Part, ...]:
        groups = _key_groups(x) if side == KEYS else x.unflatten(2, (-1, VALUE_GROUP))
        low = groups.amin(-1, keepdim=True).half()
        step = ((groups.amax(-1, keepdim=True) - low.float()) / (2**self.bits - 1)).half()
        codes = ((groups - low.float()) / step.float().clamp_min(2.0**-24)).round()
        codes = codes.clamp(0, 2**self.bits - 1).to(torch.uint8)
        return Part(codes, self.bits), Part(step, 16), Part(low, 16)

    def decode(self, layer: int, side: int, parts: tuple[Part, ...]) -> torch.Tensor:
        codes, step, low = (part.data.float() for part in parts)
        groups = codes * step + low
        return groups.transpose(2, 3).flatten(1, 2) if side == KEYS else groups.flatten(2)


def _key_groups(x: torch.Tensor) -> torch.Tensor:
    """[kv_heads, tokens, d] -> [kv_heads, groups, d, tokens of a group]."""
    size = min(KEY_GROUP, x.shape[1])
    return x.unflatten(1, (-1, size)).transpose(2, 3)
