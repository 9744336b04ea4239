"""8-bit radii: an unsigned floating-point number of 4 exponent and 4 mantissa bits times a scale.

One scale per slice and band is the largest radius; codes reach 2**-15 of it with a relative error
of at most 1/32. Decoding is a shift, an addition and a multiplication: no table, no exponential.
"""

from __future__ import annotations

import torch

_MANTISSA_BITS = 4
_BIAS = 15  # the largest exponent code stands for 2**0


def encode_radii(radii: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """radii float32 >= 0 and scale > 0, broadcast against each other -> codes uint8."""
    relative = (radii / scale).clamp(2.0**-_BIAS, 1.0)
    mantissa, exponent = torch.frexp(
        relative
    )  # relative = mantissa * 2**exponent, mantissa in [0.5, 1)
    steps = torch.round(mantissa * 2 ** (_MANTISSA_BITS + 1)).int() - 2**_MANTISSA_BITS
    code = (exponent - 1 + _BIAS) * 2**_MANTISSA_BITS + steps  # a carry moves into the exponent
    return code.clamp(0, 255).to(torch.uint8)


def decode_radii(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes uint8 -> float32 radii."""
    bits = (codes.int() << (23 - _MANTISSA_BITS)) + ((127 - _BIAS) << 23)
    return bits.view(torch.float32) * scale
