"""Frames: the coordinates in which angles are measured and codes are written.

A frame is a centre c and an invertible matrix A per (layer, KV head): y = A (x - c). A query meets
the codes of y through its dual, B = A^-T, because q.(x - c) = (B q).(A (x - c)); a sum over coded
values returns through the same matrix, x - c = B^T y. Both are applied once per step, never per
token.

The centre is one fixed vector per head, so q.c is one number per query. Two matrices are in use:

hot          a fixed signed Hadamard rotation.
calibrated   weights the channels, sorts them by importance into bands and rotates every band; pages
             in this frame also hold their own centroid, in the frame's coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .patterns import BANDS

_EPSILON = 1e-6
_SMALLEST_SPREAD = 0.02
"""Of a head's rms: what the hot codes' own error lends to a channel that never varies. Below it a
band would outgrow the others' radii."""

_SEED = 0x5EED


def hadamard_block(width: int) -> int:
    """What a rotation of `width` channels turns at once: its largest divisor that is a power of
    two."""
    return width & -width


@cache
def hadamard(width: int) -> torch.Tensor:
    """Blocks of Sylvester's matrix of signs, [width, width] float32 on the CPU, symmetric."""
    block = torch.ones(1, 1, device="cpu")
    while block.shape[0] < hadamard_block(width):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block] * (width // len(block)))


@cache
def signed_hadamard(width: int) -> torch.Tensor:
    """The data-free orthonormal rotation [width, width] float32 on the CPU, equal in every process:
    H of `hadamard` behind random signs."""
    seeded = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(0, 2, (width,), generator=seeded, device="cpu") * 2 - 1
    return hadamard(width) / hadamard_block(width) ** 0.5 * signs


def calibrated_frame(gain: torch.Tensor, spread: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The frame that equalises the expected error of what is read through it.

    gain    [heads, d]  rms of what multiplies an error in each channel (the query, for keys)
    spread  [heads, d]  rms of the channel around its page's centroid
    Returns A and its dual B, both [heads, d, d] float32. A channel's weight sqrt(gain / spread)
    minimises the error at equal bits; its importance gain * spread orders the channels. Every band
    is then brought to a spread of one per channel, so that one unit serves the radii of all bands.
    """
    heads, d = gain.shape
    floor = spread.square().mean(-1, keepdim=True).sqrt() * _SMALLEST_SPREAD
    gain, spread = gain + _EPSILON, spread.maximum(floor) + _EPSILON
    order = torch.argsort(gain * spread, dim=-1, descending=True, stable=True)
    importance = (gain * spread).gather(-1, order).unflatten(-1, (BANDS, -1))
    band_spread = importance.mean(-1, keepdim=True).sqrt().expand_as(importance).flatten(1)
    weight = (gain / spread).sqrt() / torch.empty_like(gain).scatter_(-1, order, band_spread)
    rotation = torch.block_diag(*[signed_hadamard(d // BANDS)] * BANDS).to(gain.device)
    sort = torch.zeros(heads, d, d, device=gain.device)
    sort.scatter_(2, order.unsqueeze(-1), 1.0)  # row i picks channel order[i]
    return rotation @ (sort * weight.unsqueeze(1)), rotation @ (sort / weight.unsqueeze(1))


@cache
def _turned_back(head_dim: int, device: torch.device) -> torch.Tensor:
    """Inverses of the rotations of both frames, float64 [2, 1, d, d]."""
    turns = hadamard(head_dim), torch.block_diag(*[hadamard(head_dim // BANDS)] * BANDS)
    blocks = hadamard_block(head_dim), hadamard_block(head_dim // BANDS)
    inverses = [turn.double() / block for turn, block in zip(turns, blocks)]
    return torch.stack(inverses).unsqueeze(1).to(device)


@dataclass(frozen=True)
class Picks:
    """Duals without their rotation: B = H (weight * pick), row i of which is channel[i] alone.

    channel  int32 [..., 2 (hot, calibrated), kv_heads, d]
    weight   float32 likewise, signs and the size of H's columns included
    H is `hadamard` of all channels in the hot frame, of each band's in the calibrated one.
    """

    channel: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, duals: torch.Tensor) -> Picks:
        """duals [..., 2 (hot, calibrated), kv_heads, d, d], B of either frame."""
        # in float64: who serves may have allowed float32 products to be rounded to TF32
        picked = _turned_back(duals.shape[-1], duals.device) @ duals.double()
        channel = picked.abs().argmax(-1)
        weight = picked.gather(-1, channel.unsqueeze(-1)).squeeze(-1)
        return cls(channel.int(), weight.float())


@dataclass(frozen=True)
class LayerFrames:
    """The frames of one layer, float32 and contiguous: extending multiplies by the duals, decoding
    goes by their picks.

    key_duals, value_duals      [2 (hot, calibrated), kv_heads, d, d], B of each frame
    key_centre, value_centre    [kv_heads, d]
    key_picks, value_picks      of the duals
    """

    key_duals: torch.Tensor
    value_duals: torch.Tensor
    key_centre: torch.Tensor
    value_centre: torch.Tensor
    key_picks: Picks
    value_picks: Picks

    @classmethod
    def over(
        cls,
        key_duals: torch.Tensor,
        value_duals: torch.Tensor,
        key_centre: torch.Tensor,
        value_centre: torch.Tensor,
    ) -> LayerFrames:
        """With the picks that the duals have; where there is more than one layer they are made
        once (pool/frames.py)."""
        picks = Picks.of(key_duals), Picks.of(value_duals)
        return cls(key_duals, value_duals, key_centre, value_centre, *picks)
