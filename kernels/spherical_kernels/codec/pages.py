"""Tokens to slices and back: directions become angle codes, their lengths radii.

A direction u (one token in one band) is coded on the half-integer grid: level = code - (2**b -
1)/2. The step of the grid is the encoder's free choice, decoding sees radius * level only.

hot          the step that clips nothing, then the float16 radius that fits the codes best.
calibrated   the 4-bit radius first, then the codes that are best with it as it is stored: the
             nearest to the step of a normal distribution and its neighbours are tried.
"""

from __future__ import annotations

from functools import cache

import torch

from .radii import CODES, LARGEST_RADIUS, nearest_codes, pack_radii, radii_of_words, radius_table
from .slices import CENTROID, UNIT, SliceLayout, read_codes, write_codes

GAUSSIAN_STEP = {0: 0.0, 1: 1.5958, 2: 0.9957, 4: 0.3352, 6: 0.1041, 8: 0.0308}
"""Best uniform step for a unit normal, in standard deviations (Max 1960; 8 bits: by search)."""

NEIGHBOURS = (-2, -1, 0, 1, 2)
"""Radius codes tried around the one that is nearest to the Gaussian step."""

HEADROOM = 2.0 ** (1 / 3)
"""The largest radius over the largest rms of a slice: room above it for a wider step."""

_SMALLEST_SCALE = 2.0**-24  # of float16, subnormal: a scale is this or zero


def code_directions(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises the rows of y [..., w] to `bits` bits; nothing is clipped.

    Returns codes uint8 [..., w] and radii float32 [..., 1] >= 0: y is about radius * level(code).
    A zero row has radius zero. NaN or infinity in a row makes its radius NaN, which attention
    shows.
    """
    half = 2 ** (bits - 1)
    peak = y.abs().amax(-1, keepdim=True)
    level = _levels(y, peak / (half - 0.5), half)
    radius = (y * level).sum(-1, keepdim=True) / level.square().sum(-1, keepdim=True)
    radius = radius + 0.0 * peak  # an infinite row fits nothing: say NaN
    return (level + (half - 0.5)).to(torch.uint8), radius


def code_banded(
    y: torch.Tensor, pattern_bits: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises slices y [n, bands, page_size, band_width] of a calibrated frame.

    Returns codes uint8 like y, radius codes int64 [n, bands, page_size], and the unit of the radii
    float32 [n], as float16 holds it: y is about unit * radius * step(bits) * level(code). NaN or
    infinity makes the unit NaN.
    """
    step = steps_of(pattern_bits, y.device)
    half = torch.tensor([2.0 ** (bits - 1) for bits in pattern_bits], device=y.device)
    half = half.view(-1, 1, 1)
    spread = y.square().mean(-1) * (step.squeeze(-1) > 0)  # bands without bits ask for no radius
    spread = spread.sqrt()
    unit = (spread.amax((1, 2)) * (HEADROOM / LARGEST_RADIUS)).half().float()
    divisor = unit.clamp_min(_SMALLEST_SCALE).view(-1, 1, 1)
    centre, table = nearest_codes(spread / divisor), radius_table(y.device)
    best, least = torch.zeros_like(centre), y.square().sum(-1)
    levels = torch.full_like(y, 0.5)
    for neighbour in NEIGHBOURS:
        code = (centre + neighbour).clamp(1, CODES - 1)
        radius = (table[code] * divisor).unsqueeze(-1) * step
        tried = _levels(y, radius, half)
        error = (y - radius * tried).square().sum(-1)
        better = error < least
        best, least = torch.where(better, code, best), torch.where(better, error, least)
        levels = torch.where(better.unsqueeze(-1), tried, levels)
    return (levels + (half - 0.5)).to(torch.uint8), best, unit


def _levels(y: torch.Tensor, step: torch.Tensor, half: torch.Tensor | int) -> torch.Tensor:
    """The nearest half-integer levels within (-half, half)."""
    level = torch.floor(y / step.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num(0.0)
    half = torch.as_tensor(half, dtype=level.dtype, device=level.device)
    return torch.minimum(torch.maximum(level, -half), half - 1) + 0.5


@cache
def steps_of(pattern_bits: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """The step of a radius of one unit, by band: float32 [bands, 1, 1], zero without bits."""
    return torch.tensor([GAUSSIAN_STEP[b] for b in pattern_bits], device=device).view(-1, 1, 1)


@cache
def level_offset(layout: SliceLayout, device: torch.device | str = "cpu") -> torch.Tensor:
    """What to subtract from a code of each band to get its level: float32 [bands, 1, 1]."""
    offsets = [(2**bits - 1) / 2 for bits in layout.pattern.bits]
    return torch.tensor(offsets, device=device).view(-1, 1, 1)


def split_bands(layout: SliceLayout, y: torch.Tensor) -> torch.Tensor:
    """y [n, m, d] in frame coordinates -> [n, bands, m, band_width]."""
    return y.unflatten(-1, (layout.bands, layout.band_width)).transpose(1, 2)


def join_bands(y: torch.Tensor) -> torch.Tensor:
    """y [n, bands, m, band_width] -> [n, m, d]; the inverse of `split_bands`."""
    return y.transpose(1, 2).flatten(2)


def encode_slices(
    layout: SliceLayout, x: torch.Tensor, matrix: torch.Tensor, centre: torch.Tensor
) -> torch.Tensor:
    """x [n, page_size, d] float32 -> slices uint8 [n, size_bytes].

    matrix  [n, d, d], the frame A of each slice
    centre  [n, d], the fixed centre of each slice's head
    """
    slices = x.new_zeros(x.shape[0], layout.size_bytes, dtype=torch.uint8)
    y = (x - centre.unsqueeze(1)) @ matrix.transpose(-1, -2)
    if layout.calibrated:
        y = y - write_centroids(layout, slices, y.mean(1)).unsqueeze(1)
        codes, radii, unit = code_banded(split_bands(layout, y), layout.pattern.bits)
        write_radii(layout, slices, radii, unit)
    else:
        codes, radius = code_directions(split_bands(layout, y), layout.pattern.bits[0])
        _radius_words(layout, slices).view(torch.float16).copy_(radius.flatten(1))
    write_codes(layout, slices, codes)
    return slices


def _radius_words(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """The radii's words as a view int16 [n, page_size] of slices uint8 [n, size_bytes]."""
    start = layout.radii_offset_bytes // 2
    return slices.view(torch.int16)[:, start : start + layout.page_size]


def _scales(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """The header's scales as a float16 view [n, layout.scales] of slices uint8 [n, size_bytes]."""
    start = layout.scales_offset_bytes // 2
    return slices.view(torch.float16)[:, start : start + layout.scales]


def write_centroids(
    layout: SliceLayout, slices: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """Codes centroids [n, d] (frame coordinates) into slices, in place; returns them as stored."""
    codes, radii = code_directions(centroids, 8)
    slices[:, : layout.head_dim] = codes
    _scales(layout, slices)[:, CENTROID] = radii.squeeze(-1)
    return read_centroids(layout, slices)


def read_centroids(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """Page centroids float32 [n, d], in frame coordinates, of calibrated slices."""
    radii = _scales(layout, slices)[:, CENTROID].float().unsqueeze(-1)
    return (slices[:, : layout.head_dim].float() - 127.5) * radii


def write_radii(
    layout: SliceLayout, slices: torch.Tensor, radii: torch.Tensor, unit: torch.Tensor
) -> None:
    """Radius codes [n, bands, page_size] and their units [n] into calibrated slices, in place."""
    _scales(layout, slices)[:, UNIT] = unit
    _radius_words(layout, slices).copy_(pack_radii(radii.transpose(1, 2)))


def read_radii(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """What multiplies the levels: float32 [n, bands, page_size] of slices uint8 [n, size_bytes];
    zero in uncoded bands."""
    words = _radius_words(layout, slices)
    if not layout.calibrated:
        return words.view(torch.float16).float().unsqueeze(1)
    radii = radii_of_words(words).transpose(1, 2)
    unit = _scales(layout, slices)[:, UNIT].float().view(-1, 1, 1)
    return radii * (unit * steps_of(layout.pattern.bits, slices.device).squeeze(-1))


def decode_slices(
    layout: SliceLayout, slices: torch.Tensor, dual: torch.Tensor, centre: torch.Tensor
) -> torch.Tensor:
    """slices uint8 [n, size_bytes] -> x float32 [n, page_size, d], for re-encoding and for tests.

    dual [n, d, d]: the dual B of each slice's frame; centre [n, d]: the fixed centre of its head.
    Attention never calls this.
    """
    level = read_codes(layout, slices) - level_offset(layout, slices.device)
    y = join_bands(level * read_radii(layout, slices).unsqueeze(-1))
    if layout.calibrated:
        y = y + read_centroids(layout, slices).unsqueeze(1)
    return y @ dual + centre.unsqueeze(1)
