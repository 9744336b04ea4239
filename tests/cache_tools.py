"""What the tests of the codec, the pool and the tree share: data, frames, tiny pools."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spherical_kernels.codec.frames import calibrated_frame, signed_hadamard
from spherical_kernels.codec.patterns import FrameKind, Pattern


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Independent unit normals, float32, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class HeadFrames:
    """Frames of some heads: matrix A and dual B [heads, d, d], centre [heads, d]."""

    matrix: torch.Tensor
    dual: torch.Tensor
    centre: torch.Tensor


def head_frames(pattern: Pattern, heads: int, head_dim: int, seed: int = 0) -> HeadFrames:
    """Frames of the pattern's kind; channel scales of calibrated ones span a factor of 50."""
    centre = 2 * normal(heads, head_dim, seed=seed + 1)
    if pattern.frame is FrameKind.HOT:
        rotation = signed_hadamard(head_dim).expand(heads, -1, -1)
        return HeadFrames(rotation, rotation, centre)
    gain, spread = (normal(heads, head_dim, seed=seed + i).exp() for i in (2, 3))
    return HeadFrames(*calibrated_frame(gain, spread), centre)
