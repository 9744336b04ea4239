"""The bytes of one slice: what a (page, layer, KV head) holds of its keys, or of its values.

    HOT          | radii fp16 [page_size] | tiles |
    CALIBRATED   | centroid u8 [d] | scales fp16 [8 or 16] | radii u16 [page_size] | tiles |

The centroid is an 8-bit angle code in the slice's own frame. `scales` holds the unit of the radii,
then the centroid's radius; the rest is zero, as much as the place of the tiles asks for. The radii
of a token are one 16-bit word of 4 bits per band (radii.py); a band without codes has zeros there.

A tile is [page_size, row_bytes]. In a full tile a byte holds digits of one channel position of
several bands, 8 bits together, the first in the highest bits: one mask takes a whole band out, and
both digits of a 6-bit code where their weights are right. A digit left over has a tile of its own,
where the channels of the band are cut into 8/bits equal runs and byte j of a row holds channel j of
every run, the first run in the low bits. Digits of one bit are never left over: bands of some head
dimensions have no eight equal runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch

from .patterns import DIGITS, FrameKind, Pattern

FEWEST_SCALES = 8
"""float16 numbers in the header of a calibrated slice: of the radii, of the centroid, padding."""

UNIT, CENTROID = 0, 1
"""Places among them of the unit of the radii and of the centroid's radius."""

ALIGNMENT = 16
"""Slices and their sections start at multiples of this many bytes."""

WIDE_HEAD_DIM = 128
"""From this head dimension on slices and tiles start at multiples of 32 bytes, the pieces in which
a GPU reads its memory: rows that these cut are read twice. Padding smaller slices costs more bits
than cached tiers can give (docs/format.md)."""


def slice_alignment(head_dim: int) -> int:
    """What the size of every slice and the place of its tiles is a multiple of, in bytes."""
    return 2 * ALIGNMENT if head_dim >= WIDE_HEAD_DIM else ALIGNMENT


@dataclass(frozen=True)
class Digit:
    """`bits` bits of a band's codes, and their places in the byte and in the code, from bit 0."""

    band: int
    bits: int
    byte_shift: int
    code_shift: int


@dataclass(frozen=True)
class Tile:
    """Digits stored together: [page_size, row_bytes] at `offset_bytes`. Only one digit has runs."""

    digits: tuple[Digit, ...]
    runs: int
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
        if any(tile.runs == 8 for tile in self.tiles):
            raise ValueError(
                f"pattern: expected digits of one bit to share bytes, got {self.pattern.name}"
            )

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
    def scales(self) -> int:
        """float16 numbers of the header, padding included."""
        end = self.head_dim + 2 * FEWEST_SCALES + self.radii_bytes
        return FEWEST_SCALES + -end % slice_alignment(self.head_dim) // 2 if self.calibrated else 0

    @property
    def radii_offset_bytes(self) -> int:
        return self.head_dim + 2 * self.scales if self.calibrated else 0

    @property
    def radii_bytes(self) -> int:
        """A 16-bit word per token: a float16, or the bands' 4-bit radii."""
        return 2 * self.page_size

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Full tiles, widest digits first, then those of left-over digits.

        As few digits as possible are left over: a tile of narrow rows costs a kernel as many
        instructions as a wide one."""
        waiting = self._digits()
        over, left_over = sum(bits for _, bits, _ in waiting) % 8, []
        while over:
            fits = [digit for digit in waiting if digit[1] <= over]
            widest = max(bits for _, bits, _ in fits)
            left_over.append(next(digit for digit in reversed(fits) if digit[1] == widest))
            waiting.remove(left_over[-1])
            over -= widest

        tiles: list[Tile] = []
        offset = self.radii_offset_bytes + self.radii_bytes
        while waiting:
            together: list[Digit] = []
            filled = 8
            while filled:
                band, bits, code_shift = waiting.pop(0)
                filled -= bits
                together.append(Digit(band, bits, filled, code_shift))
            tiles.append(Tile(tuple(together), 1, offset, self.band_width))
            offset += self.page_size * self.band_width
        for band, bits, code_shift in left_over:
            row_bytes = self.band_width * bits // 8
            tiles.append(Tile((Digit(band, bits, 0, code_shift),), 8 // bits, offset, row_bytes))
            offset += self.page_size * row_bytes
        return tuple(tiles)

    def _digits(self) -> list[tuple[int, int, int]]:
        """(band, bits, shift in the code) of every digit, widest first."""
        found = []
        for band, bits in enumerate(self.pattern.bits):
            digits = DIGITS[bits]
            found += [(band, width, sum(digits[i + 1 :])) for i, width in enumerate(digits)]
        return sorted(found, key=lambda digit: -digit[1])

    @cached_property
    def size_bytes(self) -> int:
        """All of the slice, padded to `slice_alignment`."""
        last, unit = self.tiles[-1], slice_alignment(self.head_dim)
        end = last.offset_bytes + last.row_bytes * self.page_size
        return -(-end // unit) * unit


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
    """Packs codes into slices uint8 [n, size_bytes], in place.

    codes uint8 [n, bands, page_size, band_width]
    """
    for tile in layout.tiles:
        rows = None
        for digit in tile.digits:
            part = codes[:, digit.band] >> digit.code_shift & ((1 << digit.bits) - 1)
            part = pack_digits(part, digit.bits) if tile.runs > 1 else part << digit.byte_shift
            rows = part if rows is None else rows | part
        assert rows is not None
        end = tile.offset_bytes + tile.row_bytes * layout.page_size
        slices[:, tile.offset_bytes : end] = rows.flatten(1)


def read_codes(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """slices uint8 [n, size_bytes] -> codes, as small exact float32 numbers.

    Returns [n, bands, page_size, band_width]; a band without codes reads as zero.
    """
    digits: list[list[torch.Tensor]] = [[] for _ in range(layout.bands)]
    for tile in layout.tiles:
        end = tile.offset_bytes + tile.row_bytes * layout.page_size
        rows = slices[:, tile.offset_bytes : end].unflatten(-1, (layout.page_size, tile.row_bytes))
        for digit in tile.digits:
            part = unpack_digits(rows, digit.bits) if tile.runs > 1 else _cut(rows, digit)
            digits[digit.band].append(part << digit.code_shift if digit.code_shift else part)
    if layout.bands == 1:
        return digits[0][0].float().unsqueeze(1)
    shape = len(slices), layout.bands, layout.page_size, layout.band_width
    codes = torch.empty(shape, device=slices.device)
    for band, parts in enumerate(digits):
        codes[:, band] = parts[0] | parts[1] if len(parts) == 2 else parts[0] if parts else 0
    return codes


def _cut(rows: torch.Tensor, digit: Digit) -> torch.Tensor:
    """The digit of every byte of `rows`."""
    shifted = rows >> digit.byte_shift if digit.byte_shift else rows
    return shifted if digit.byte_shift + digit.bits == 8 else shifted & ((1 << digit.bits) - 1)
