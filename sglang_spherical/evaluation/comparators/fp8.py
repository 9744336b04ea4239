"""fp8 e4m3: what SGLang offers today as `--kv-cache-dtype fp8_e4m3`."""

from __future__ import annotations

import torch

from sglang_spherical.evaluation.comparators.base import Comparator, Part

LARGEST = 448.0
"""Of float8 e4m3; what is larger is stored as this."""


class Float8(Comparator):
    """One byte per value, with a scale of 1.0, as SGLang does where a checkpoint has no scales; or,
    with `scaled`, a scale per head that brings the largest value learnt to the largest float."""

    def __init__(self, name: str, scaled: bool) -> None:
        self.name = name
        self.scaled = scaled
        self.scales: dict[tuple[int, int], torch.Tensor] = {}

    def learn(self, layer: int, side: int, x: torch.Tensor) -> None:
        if self.scaled:
            largest = x.abs().amax((1, 2), keepdim=True)
            self.scales[layer, side] = (largest / LARGEST).clamp_min(torch.finfo().tiny)

    def encode(self, layer: int, side: int, x: torch.Tensor) -> tuple[Part, ...]:
        scaled = (x / self._scale(layer, side)).clamp(-LARGEST, LARGEST)
        return (Part(scaled.to(torch.float8_e4m3fn), 8),)

    def decode(self, layer: int, side: int, parts: tuple[Part, ...]) -> torch.Tensor:
        (floats,) = parts
        return floats.data.float() * self._scale(layer, side)

    def _scale(self, layer: int, side: int) -> torch.Tensor:
        return self.scales[layer, side] if self.scaled else torch.ones(1, 1, 1)
