"""What of a slice's layout the main kernel is specialised on, as kernel.py describes it."""

from __future__ import annotations

from typing import Any

from ..codec.pages import GAUSSIAN_STEP
from ..codec.slices import SliceLayout, Tile

SHARED_COLUMNS = 4
"""Of an operand of the values' centroid."""

_OPERAND_BITS = 10  # a float16 is linear in its low 10 bits


def key_tables(layout: SliceLayout) -> tuple[Any, ...]:
    """KT, KD and KB as kernel.py describes them."""
    tiles, digits, bands = [], [], []
    places = _places(layout, 8)
    flipped = dict.fromkeys(range(layout.bands), 0)
    for index, tile in enumerate(layout.tiles):
        run_bits = tile.digits[0].bits if tile.runs > 1 else 0
        tiles.append((tile.offset_bytes, tile.row_bytes, run_bits))
        for digit in tile.digits:
            place = places[digit.band] + digit.code_shift
            digits.append((index, digit.band, digit.byte_shift, digit.bits, place))
            flipped[digit.band] += 128 if place + digit.bits == 8 else 0
    for band, bits in enumerate(layout.pattern.bits):
        place = places.get(band, 0)
        step = _step(layout, bits)
        bands.append((place, (2**bits - 1) / 2 * 2**place - flipped[band], step))
    return tuple(tiles), tuple(digits), tuple(bands)


def value_tables(layout: SliceLayout, fold: int) -> tuple[Any, ...]:
    """VP, VD, VB and VC as kernel.py describes them."""
    places = _places(layout, _OPERAND_BITS)
    parts: list[tuple[int, int, int, int]] = []
    columns: list[tuple[int, list[int]]] = []
    less: dict[int, int] = {}
    digits = []
    for index, tile in enumerate(layout.tiles):
        whole = fold == 1 and _is_whole(layout, tile)
        words = tile.row_bytes // 2
        if tile.row_bytes % 2:
            raise ValueError(
                f"values: expected rows of whole 16-bit words, got {tile.row_bytes} bytes in "
                f"{layout.pattern.name} at head dimension {layout.head_dim}"
            )
        for digit in tile.digits:
            for run in range(tile.runs):
                first = digit.band * layout.band_width + run * tile.row_bytes
                column = _column(columns, words, first // 2)
                for half in (0, 1):
                    part = digit.band, first + half, words, column
                    if part not in parts:
                        parts.append(part)
                    shift = digit.byte_shift + run * digit.bits + 8 * half
                    place = places[digit.band] + digit.code_shift
                    if whole and digit.byte_shift:
                        less[len(parts) - 1] = len(parts) + 1
                        digits.append((index, len(parts) - 1, 8 * half, 8, 0))
                    else:
                        digits.append((index, parts.index(part), shift, digit.bits, place))
    bands = []
    for band, bits in enumerate(layout.pattern.bits):
        unit = 2.0 ** (places.get(band, 0) - 24)
        bands.append(((2**bits - 1) / 2 * unit, _step(layout, bits) / unit if bits else 0.0))
    with_less = tuple((*part[:3], less.get(i, -1), part[3]) for i, part in enumerate(parts))
    return with_less, tuple(digits), tuple(bands), tuple((n, *of) for n, of in columns)


def _column(columns: list[tuple[int, list[int]]], words: int, first: int) -> int:
    """The place of a column of the centroid's operands, which have up to `SHARED_COLUMNS` each."""
    for index, (its_words, its_firsts) in enumerate(columns):
        if its_words == words and first in its_firsts:
            return index * SHARED_COLUMNS + its_firsts.index(first)
    if not columns or columns[-1][0] != words or len(columns[-1][1]) == SHARED_COLUMNS:
        columns.append((words, []))
    columns[-1][1].append(first)
    return (len(columns) - 1) * SHARED_COLUMNS + len(columns[-1][1]) - 1


def _is_whole(layout: SliceLayout, tile: Tile) -> bool:
    """Whether bytes are operands as they are: two codes of bands that share columns, of which the
    lower one's sum is taken off at the end."""
    bands = [digit.band for digit in tile.digits]
    single = all(digit.bits == layout.pattern.bits[digit.band] == 4 for digit in tile.digits)
    return len(bands) == 2 and single and bands[0] // 2 == bands[1] // 2


def _step(layout: SliceLayout, bits: int) -> float:
    return GAUSSIAN_STEP[bits] if layout.calibrated else 1.0


def _places(layout: SliceLayout, operand_bits: int) -> dict[int, int]:
    """Bit at which each band's codes lie in the operand: where most digits need no shift."""
    places = {}
    for tile in layout.tiles:
        for digit in tile.digits:
            if digit.code_shift == 0:
                room = operand_bits - layout.pattern.bits[digit.band]
                runs = operand_bits == 8 and tile.runs > 1
                places[digit.band] = 0 if runs else min(digit.byte_shift, room)
    return places
