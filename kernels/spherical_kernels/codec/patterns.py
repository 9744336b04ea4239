"""Bit patterns: how a slice spends its code bits over bands of channels.

A calibrated frame sorts the channels of a head by importance and cuts them into `BANDS` bands of
equal width; a pattern gives each band 0, 1, 2, 4, 6 or 8 bits per code. Codes are stored as digits
of 8, 4, 2 or 1 bits, so that every plane unpacks with shifts and masks. The hot pattern is one
band.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

BANDS = 4
"""Bands of a calibrated frame, each with a radius and a bit width of its own."""

DIGITS = {0: (), 1: (1,), 2: (2,), 4: (4,), 6: (4, 2), 8: (8,)}
"""Code bits to stored digits, most significant first."""


class FrameKind(Enum):
    """Which of the two frames of a (layer, head) the angles are measured in."""

    HOT = "hot"  # data-free rotation around one fixed centre per head
    CALIBRATED = "calibrated"  # weighted, sorted and rotated, around the page's centroid


@dataclass(frozen=True)
class Pattern:
    """Code bits per band, most important band first.

    `frame` HOT: one band, a float16 radius per token, no header.
    `frame` CALIBRATED: `BANDS` bands, a 4-bit radius per token and band, page centroid.
    """

    frame: FrameKind
    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        bands = 1 if self.frame is FrameKind.HOT else BANDS
        if len(self.bits) != bands:
            raise ValueError(
                f"bits: expected {bands} bands in a {self.frame.value} frame, got {self.bits}"
            )
        if not set(self.bits) <= DIGITS.keys():
            raise ValueError(f"bits: expected each of {tuple(DIGITS)}, got {self.bits}")

    @property
    def name(self) -> str:
        """For people: `8` or `6-4-4-2`."""
        return "-".join(map(str, self.bits))

    @property
    def average_bits(self) -> float:
        """Code bits per value, radii and header not counted."""
        return sum(self.bits) / len(self.bits)

    @property
    def coded_bands(self) -> tuple[int, ...]:
        """Bands that have codes, and so radii."""
        return tuple(i for i, bits in enumerate(self.bits) if bits)


def _calibrated(*bits: int) -> Pattern:
    return Pattern(FrameKind.CALIBRATED, bits)


PATTERNS: tuple[Pattern, ...] = (
    Pattern(FrameKind.HOT, (8,)),
    Pattern(FrameKind.HOT, (4,)),
    _calibrated(6, 4, 4, 2),
    _calibrated(4, 4, 4, 4),
    _calibrated(4, 4, 2, 2),
    _calibrated(4, 2, 2, 2),
    _calibrated(2, 2, 2, 2),
    _calibrated(4, 2, 1, 1),
    _calibrated(8, 6, 6, 4),
    _calibrated(6, 6, 6, 6),
)
"""Every pattern a descriptor may name; a pattern's id is its place here (at most 16 fit)."""

PATTERN_ID = {pattern: index for index, pattern in enumerate(PATTERNS)}
