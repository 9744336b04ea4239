"""Tokens to slices and back: directions become angle codes, radii are fitted to the codes.

A direction u (one token in one band) is coded on the half-integer grid: level = code - (2**b -
1)/2.
The stored radius is the scalar that fits radius * level best to the token, so the step of the grid
is the encoder's free choice: it tries several and keeps the one with the smallest error. Decoding
never sees the step.
"""

from __future__ import annotations

from functools import cache

import torch

from .patterns import BANDS
from .radii import decode_radii, encode_radii
from .slices import SCALES, SliceLayout, read_codes, write_codes

GAUSSIAN_STEP = {2: 0.9957, 4: 0.3352, 6: 0.1041}
"""Best uniform step for a unit normal, in standard deviations (Max 1960)."""

STEP_FACTORS = (0.7, 0.85, 1.0, 1.15, 1.3)
"""Steps tried around the Gaussian one."""

_SMALLEST_SCALE = 2.0**-24  # of float16, subnormal: a scale is this or zero


def code_directions(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises the rows of y [..., w] to `bits` bits.

    Returns codes uint8 [..., w] and radii float32 [..., 1] >= 0: y is about radius * level(code).
    A zero row has radius zero. NaN or infinity in a row makes its radius NaN, which attention
    shows.
    """
    half = 2 ** (bits - 1)
    peak = y.abs().amax(-1, keepdim=True)
    steps = [peak / (half - 0.5)]  # nothing is clipped
    if bits in GAUSSIAN_STEP:
        rms = y.square().mean(-1, keepdim=True).sqrt()
        steps += [rms * (GAUSSIAN_STEP[bits] * factor) for factor in STEP_FACTORS]
    best_gain = best_level = best_radius = torch.empty(0)
    for step in steps:
        level = torch.floor(y / step.clamp_min(torch.finfo(torch.float32).tiny))
        level = level.nan_to_num(0.0).clamp(-half, half - 1) + 0.5
        fit, norm = (y * level).sum(-1, keepdim=True), level.square().sum(-1, keepdim=True)
        gain = fit.square() / norm  # squared length explained
        if best_gain.numel() == 0:
            best_gain, best_level, best_radius = gain, level, fit / norm
            continue
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_level = torch.where(better, level, best_level)
        best_radius = torch.where(better, fit / norm, best_radius)
    best_radius = best_radius + 0.0 * peak  # an infinite row fits nothing: say NaN
    return (best_level + (half - 0.5)).to(torch.uint8), best_radius


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
    banded = split_bands(layout, y)
    codes = torch.zeros(banded.shape, dtype=torch.uint8, device=y.device)
    radii = []
    for band in layout.pattern.coded_bands:
        codes[:, band], radius = code_directions(banded[:, band], layout.pattern.bits[band])
        radii.append(radius.squeeze(-1))
    write_radii(layout, slices, torch.stack(radii, 1))
    write_codes(layout, slices, codes)
    return slices


def _scales(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """The header's scales as a float16 view [n, SCALES] of slices uint8 [n, size_bytes]."""
    start = layout.scales_offset_bytes
    return slices.view(torch.float16)[:, start // 2 : start // 2 + SCALES]


def write_centroids(
    layout: SliceLayout, slices: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """Codes centroids [n, d] (frame coordinates) into slices, in place; returns them as stored."""
    codes, radii = code_directions(centroids, 8)
    slices[:, : layout.head_dim] = codes
    _scales(layout, slices)[:, BANDS] = radii.squeeze(-1)
    return read_centroids(layout, slices)


def read_centroids(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """Page centroids float32 [n, d], in frame coordinates, of calibrated slices."""
    radii = _scales(layout, slices)[:, BANDS].float().unsqueeze(-1)
    return (slices[:, : layout.head_dim].float() - 127.5) * radii


def write_radii(layout: SliceLayout, slices: torch.Tensor, radii: torch.Tensor) -> None:
    """radii float32 [n, coded bands, page_size] into slices uint8 [n, size_bytes], in place."""
    start, end = layout.radii_offset_bytes, layout.radii_offset_bytes + layout.radii_bytes
    if not layout.calibrated:
        slices[:, start:end] = radii.squeeze(1).half().view(torch.uint8)
        return
    scale = radii.amax(-1).half()
    _scales(layout, slices)[:, list(layout.pattern.coded_bands)] = scale
    divisor = scale.float().clamp_min(_SMALLEST_SCALE).unsqueeze(-1)
    codes = encode_radii(radii.nan_to_num(0.0), divisor)
    words = slices[:, start:end].unflatten(-1, (layout.page_size, layout.bands))
    words[..., list(layout.pattern.coded_bands)] = codes.transpose(1, 2)


def read_radii(layout: SliceLayout, slices: torch.Tensor) -> torch.Tensor:
    """Radii float32 [n, bands, page_size] of slices uint8 [n, size_bytes]; zero in uncoded
    bands."""
    start, end = layout.radii_offset_bytes, layout.radii_offset_bytes + layout.radii_bytes
    if not layout.calibrated:
        return slices.view(torch.float16)[:, start // 2 : end // 2].float().unsqueeze(1)
    coded = list(layout.pattern.coded_bands)
    words = slices[:, start:end].unflatten(-1, (layout.page_size, layout.bands))
    radii = decode_radii(
        words[..., coded].transpose(1, 2), _scales(layout, slices)[:, coded].float().unsqueeze(-1)
    )
    if len(coded) == layout.bands:
        return radii
    every = radii.new_zeros(len(slices), layout.bands, layout.page_size)
    every[:, coded] = radii
    return every


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
