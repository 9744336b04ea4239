"""8-bit radii: an unsigned floating-point number of 4 exponent and 4 mantissa bits times a scale.

One scale per slice and band is the largest radius. Codes reach 2**-14 of it with a relative error
of at most 1/32; below lie even steps of 2**-18, down to zero. The code is a piece of a float32:
decoding is a shift and a multiplication, no table and no exponential.
"""

from __future__ import annotations

import torch

_MANTISSA_BITS = 4
_BIAS = 15  # exponent code 15 stands for 2**0; 0 for subnormal numbers in steps of 2**-18


def encode_radii(radii: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """radii float32 >= 0 and scale > 0, broadcast against each other -> codes uint8."""
    relative = (radii / scale).clamp(0.0, 1.0)
    exponent = torch.frexp(relative.clamp_min(2.0 ** (1 - _BIAS))).exponent - 1
    steps = torch.round(torch.ldexp(relative, _MANTISSA_BITS - exponent)).int()
    return ((exponent + _BIAS - 1) * 2**_MANTISSA_BITS + steps).to(torch.uint8)


def decode_radii(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes uint8 -> float32 radii."""
    bits = codes.int() << (23 - _MANTISSA_BITS)
    return bits.view(torch.float32) * 2.0 ** (127 - _BIAS) * scale
