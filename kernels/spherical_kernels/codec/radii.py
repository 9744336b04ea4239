"""4-bit radii: an unsigned floating-point number of 2 exponent and 2 mantissa bits times a unit.

One unit per slice serves all bands, because a calibrated frame brings every band to the same
spread. A code stands for 0 to 7 units, in quarters below 2. It is a piece of a float32: decoding is
a shift, a mask and a multiplication, no table and no exponential. The four radii of a token are one
16-bit word.
"""

from __future__ import annotations

from functools import cache

import torch

RADIUS_BITS = 4
CODES = 1 << RADIUS_BITS

RADIUS_SHIFT = 21
"""Where a code lies in the float32 that it is a piece of: the mantissa's upper two bits."""

RADIUS_UNIT = 2.0**126
"""What that float32 is to be multiplied by: code 4 stands for one unit."""

LARGEST_RADIUS = 7.0
"""Units that the last code stands for."""


def radius_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """What each code stands for, in units: float32 [16], ascending."""
    bits = torch.arange(CODES, dtype=torch.int32, device=device) << RADIUS_SHIFT
    return bits.view(torch.float32) * RADIUS_UNIT


@cache
def _word_table(device: torch.device) -> torch.Tensor:
    """The radii of every word: float32 [2**16, 4 bands]."""
    words = torch.arange(1 << 16, dtype=torch.int32, device=device).to(torch.int16)
    return radius_table(device)[unpack_radii(words, 4)]


def radii_of_words(words: torch.Tensor) -> torch.Tensor:
    """words int16 [...] -> radii in units, float32 [..., 4 bands].

    Looked up by word: the fewest operations that PyTorch has for it."""
    return torch.nn.functional.embedding(words.int() & 0xFFFF, _word_table(words.device))


def nearest_codes(radii: torch.Tensor) -> torch.Tensor:
    """radii float32 >= 0, in units -> codes int64."""
    table = radius_table(radii.device)
    return torch.bucketize(radii, (table[1:] + table[:-1]) / 2)


def pack_radii(codes: torch.Tensor) -> torch.Tensor:
    """codes [..., 4 bands] -> words int16 [...], the first band in the low bits."""
    places = torch.arange(codes.shape[-1], device=codes.device) * RADIUS_BITS
    return (codes.int() << places).sum(-1).to(torch.int16)


def unpack_radii(words: torch.Tensor, bands: int) -> torch.Tensor:
    """words int16 [...] -> codes int64 [..., bands]; the inverse of `pack_radii`."""
    places = torch.arange(bands, device=words.device) * RADIUS_BITS
    return words.long().unsqueeze(-1) >> places & (CODES - 1)
