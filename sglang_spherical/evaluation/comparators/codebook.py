"""Grouped spherical codebooks: keys as an 8-bit radius and one of a few directions per group.

What the Spherical KV paper (arXiv 2605.18856) describes, as far as it is public: the direction of
every group of channels is one entry of a small codebook. Values stay in float16. The radius is the
length along that direction, which loses less than the group's own length would.
"""

from __future__ import annotations

import torch

from sglang_spherical.evaluation.comparators.base import Comparator, Part
from sglang_spherical.pool.arena import VALUES

_ITERATIONS = 12
_STEPS_PER_OCTAVE = 16  # of radius codes: an error of at most 2.2 %, over 16 octaves
_HEADROOM = 2.0  # how much larger than those learnt a radius may be
_TINY = torch.finfo().tiny


class GroupedCodebook(Comparator):
    """Groups of `width` neighbouring channels, each (layer, head, group) with `directions` of its
    own, found by spherical k-means."""

    def __init__(self, name: str, width: int, directions: int) -> None:
        self.name = name
        self.width = width
        self.directions = directions
        self.codebooks: dict[int, torch.Tensor] = {}  # [kv_heads * groups, directions, width]
        self.largest: dict[int, torch.Tensor] = {}  # [kv_heads * groups, 1]

    def learn(self, layer: int, side: int, x: torch.Tensor) -> None:
        if side == VALUES:
            return
        groups = self._groups(x)
        radius = groups.norm(dim=-1)
        unit = groups / radius.unsqueeze(-1).clamp_min(_TINY)
        self.codebooks[layer] = spherical_k_means(unit, self.directions)
        self.largest[layer] = (radius.amax(1, keepdim=True) * _HEADROOM).clamp_min(_TINY)

    def encode(self, layer: int, side: int, x: torch.Tensor) -> tuple[Part, ...]:
        if side == VALUES:
            return (Part(x.half(), 16),)
        groups = self._groups(x)
        along, nearest = (groups @ self.codebooks[layer].transpose(1, 2)).max(-1)
        octaves = (along / self.largest[layer]).clamp_min(_TINY).log2()
        radius = (octaves * _STEPS_PER_OCTAVE + 255).round().clamp(0, 255).to(torch.uint8)
        heads = x.shape[0]
        return (
            Part(
                nearest.to(torch.uint8).unflatten(0, (heads, -1)),
                (self.directions - 1).bit_length(),
            ),
            Part(radius.unflatten(0, (heads, -1)), 8),
        )

    def decode(self, layer: int, side: int, parts: tuple[Part, ...]) -> torch.Tensor:
        if side == VALUES:
            return parts[0].data.float()
        nearest, radius = (part.data.flatten(0, 1) for part in parts)
        index = nearest.long().unsqueeze(-1).expand(-1, -1, self.width)
        units = self.codebooks[layer].gather(1, index)
        octaves = (radius.float() - 255) / _STEPS_PER_OCTAVE
        groups = units * (octaves.exp2() * self.largest[layer]).unsqueeze(-1)
        return groups.unflatten(0, (len(parts[0].data), -1)).transpose(1, 2).flatten(2)

    def _groups(self, x: torch.Tensor) -> torch.Tensor:
        """[kv_heads, tokens, d] -> [kv_heads * groups, tokens, width]."""
        return x.unflatten(2, (-1, self.width)).transpose(1, 2).flatten(0, 1)


def spherical_k_means(unit: torch.Tensor, count: int) -> torch.Tensor:
    """Directions [n, count, width] near unit vectors [n, points, width], clustered by cosine."""
    start = torch.linspace(0, unit.shape[1] - 1, count).long()
    directions = unit[:, start].clone()
    for _ in range(_ITERATIONS):
        nearest = (unit @ directions.transpose(1, 2)).argmax(-1, keepdim=True)
        sums = torch.zeros_like(directions)
        sums.scatter_add_(1, nearest.expand_as(unit), unit)
        norm = sums.norm(dim=-1, keepdim=True)
        directions = torch.where(norm > 0, sums / norm.clamp_min(_TINY), directions)
    return directions
