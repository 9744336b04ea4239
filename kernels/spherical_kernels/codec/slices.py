"""The bytes of one slice: what a (page, layer, KV head) holds of its keys, or of its values.

    HOT          | radii fp16 [page_size] | digit planes |
    CALIBRATED   | centroid u8 [d] | scales fp16 [8] | radii u8 [bands, page_size] | digit planes |

The centroid is an 8-bit angle code in the slice's own frame. `scales` holds the largest radius of
each band, then the centroid's radius; the rest is zero.

A digit plane is [page_size, row_bytes]. Its n channels are cut into 8/bits equal runs, and byte j
of a row holds digit j of every run, the first run in the low bits: a mask or shift of a whole row
gives one contiguous run of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch

from .patterns import DIGITS, FrameKind, Pattern

SCALES = 8
"""float16 scales in the header of a calibrated slice: one per band, the centroid's, padding."""

ALIGNMENT = 16
"""Slices start, and their sections lie, at multiples of this many bytes."""


@dataclass(frozen=True)
class DigitPlane:
    """Digits of `bits` bits of the bands `bands`; `shifts[i]` is the place of band i's digit in its
    code."""

    bits: int
    bands: tuple[int, ...]
    shifts: tuple[int, ...]
    offset_bytes: int
    row_bytes: int


@dataclass(frozen=True)
class SliceLayout:
    """Byte offsets inside a slice of `page_size` tokens and `head_dim` channels.

    Raises ValueError when the dimensions cannot be packed.
    """

    pattern: Pattern
    page_size: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim % 16 or self.head_dim <= 0:
            raise ValueError(f"head_dim: expected a positive multiple of 16, got {self.head_dim}")
        if self.page_size % 16 or self.page_size <= 0:
            raise ValueError(f"page_size: expected a positive multiple of 16, got {self.page_size}")

    @property
    def calibrated(self) -> bool:
        return self.pattern.frame is FrameKind.CALIBRATED

    @property
    def bands(self) -> int:
        return len(self.pattern.bits)

    @property
    def band_width(self) -> int:
        """Channels per band."""
        return self.head_dim // self.bands

    @property
    def scales_offset_bytes(self) -> int:
        return self.head_dim

    @property
    def radii_offset_bytes(self) -> int:
        return self.head_dim + 2 * SCALES if self.calibrated else 0

    @property
    def radii_bytes(self) -> int:
        per_token = len(self.pattern.coded_bands) if self.calibrated else 2
        return per_token * self.page_size

    @cached_property
    def planes(self) -> tuple[DigitPlane, ...]:
        """Digit planes, widest digits first."""
        planes, offset = [], self.radii_offset_bytes + self.radii_bytes
        for width in (8, 4, 2):
            bands, shifts = [], []
            for band, bits in enumerate(self.pattern.bits):
                digits = DIGITS[bits]
                if width in digits:
                    bands.append(band)
                    shifts.append(sum(digits[digits.index(width) + 1 :]))
            if bands:
                row_bytes = len(bands) * self.band_width * width // 8
                planes.append(DigitPlane(width, tuple(bands), tuple(shifts), offset, row_bytes))
                offset += row_bytes * self.page_size
        return tuple(planes)

    @cached_property
    def size_bytes(self) -> int:
        """All of the slice, padded to `ALIGNMENT`."""
        end = self.radii_offset_bytes + self.radii_bytes
        if self.planes:
            end = self.planes[-1].offset_bytes + self.planes[-1].row_bytes * self.page_size
        return -(-end // ALIGNMENT) * ALIGNMENT


@cache
def slice_layout(pattern: Pattern, page_size: int, head_dim: int) -> SliceLayout:
    """The (shared) layout of a pattern at these dimensions."""
    return SliceLayout(pattern, page_size, head_dim)


def pack_digits(digits: torch.Tensor, bits: int) -> torch.Tensor:
    """digits uint8 [..., n] below 2**bits -> bytes uint8 [..., n * bits / 8]."""
    runs = digits.unflatten(-1, (8 // bits, -1)).unbind(-2)
    packed = runs[0].clone()
    for place, run in enumerate(runs[1:], start=1):
        packed |= run << (place * bits)
    return packed


def unpack_digits(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """bytes uint8 [..., m] -> digits uint8 [..., m * 8 / bits]; the inverse of `pack_digits`."""
    if bits == 8:
        return rows
    mask, places = (1 << bits) - 1, 8 // bits
    runs = [rows & mask, *(rows >> (bits * i) & mask for i in range(1, places - 1))]
    return torch.cat([*runs, rows >> (8 - bits)], dim=-1)


def write_codes(layout: SliceLayout, slices: torch.Tensor, codes: torch.Tensor) -> None:
    """Packs codes uint8 [n, bands, page_size, band_width] into slices uint8 [n, size_bytes], in
    place."""
    for plane in layout.planes:
        mask = (1 << plane.bits) - 1
        digits = [codes[:, b] >> s & mask for b, s in zip(plane.bands, plane.shifts)]
        end = plane.offset_bytes + plane.row_bytes * layout.page_size
        slices[:, plane.offset_bytes : end] = pack_digits(
            torch.cat(digits, -1), plane.bits
        ).flatten(1)


def read_codes(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """slices uint8 [n, size_bytes] -> codes, as small exact float32 numbers.

    Returns [n, bands, page_size, band_width]; a band without codes reads as zero.
    """
    shape = len(slices), layout.bands, layout.page_size, layout.band_width
    codes = torch.empty(shape, device=slices.device)
    digits: list[list[torch.Tensor]] = [[] for _ in range(layout.bands)]
    for plane in layout.planes:
        end = plane.offset_bytes + plane.row_bytes * layout.page_size
        rows = slices[:, plane.offset_bytes : end].unflatten(
            -1, (layout.page_size, plane.row_bytes)
        )
        runs = unpack_digits(rows, plane.bits).unflatten(-1, (len(plane.bands), -1))
        for i, (band, shift) in enumerate(zip(plane.bands, plane.shifts)):
            digits[band].append(runs[..., i, :] << shift if shift else runs[..., i, :])
    for band, parts in enumerate(digits):
        codes[:, band] = parts[0] | parts[1] if len(parts) == 2 else parts[0] if parts else 0
    return codes
