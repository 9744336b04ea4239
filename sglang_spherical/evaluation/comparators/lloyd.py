"""Rotated Lloyd–Max levels with one radius and no centre, as caches after TurboQuant do.

TurboQuant (arXiv 2504.19874): a random rotation makes every coordinate of a unit vector nearly
normal with variance 1/d, so that one fixed table of levels serves all tokens of all models.
"""

from __future__ import annotations

from functools import cache

import torch

from sglang_spherical.evaluation.comparators.base import Comparator, Part
from spherical_kernels.codec.frames import signed_hadamard

_ITERATIONS = 400


@cache
def lloyd_max_levels(bits: int) -> torch.Tensor:
    """The 2**bits levels with the least mean squared error for a unit normal, ascending float32."""
    normal = torch.distributions.Normal(0.0, 1.0)
    count = 2**bits
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(_ITERATIONS):
        inner = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([inner.new_tensor([-torch.inf]), inner, inner.new_tensor([torch.inf])])
        density = normal.log_prob(edges).exp()
        mass = torch.special.ndtr(edges).diff()
        levels = -density.diff() / mass  # the mean of a normal between two edges
    return levels.float()


class RotatedLloydMax(Comparator):
    """The norm of a token in float16, and its rotated direction at the levels' nearest."""

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.bits = bits

    def encode(self, layer: int, side: int, x: torch.Tensor) -> tuple[Part, ...]:
        levels = lloyd_max_levels(self.bits)
        norm = x.norm(dim=-1, keepdim=True)
        cosines = (
            x @ signed_hadamard(x.shape[-1]).T.to(x.device) / norm.clamp_min(torch.finfo().tiny)
        )
        edges = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(cosines * x.shape[-1] ** 0.5, edges)
        return Part(codes.to(torch.uint8), self.bits), Part(norm.half(), 16)

    def decode(self, layer: int, side: int, parts: tuple[Part, ...]) -> torch.Tensor:
        codes, norm = (part.data for part in parts)
        d = codes.shape[-1]
        cosines = lloyd_max_levels(self.bits)[codes.long()] / d**0.5
        return norm.float() * (cosines @ signed_hadamard(d).to(cosines.device))
