"""What a direction and its radius may look like, for `study_codecs.py`: the product's forms beside
those that lost to them.

A *radius code* is a table of radii and how many of its codes the encoder tries. A *code form* takes
channels in standard deviations to the nearest numbers that its bits can say. `radius_first` takes
bands through both in the product's order (the radius, then the best codes for it); `radius_after`
in the reverse one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from sglang_spherical.evaluation.comparators.lloyd import lloyd_max_levels
from spherical_kernels.codec.pages import GAUSSIAN_STEP, HEADROOM, code_banded, steps_of
from spherical_kernels.codec.radii import nearest_codes, radius_table

STEP = GAUSSIAN_STEP | {3: 0.5860, 5: 0.1881}
"""Best uniform step for a unit normal in standard deviations, odd widths too (Max 1960)."""

AFTER = {"fp16": 16, "e4m4": 8}
"""Radii rounded after their codes are chosen, and their bits."""

FACTORS = (0.7, 0.85, 1.0, 1.15, 1.3)
"""Steps tried around the Gaussian one where the radius comes last."""

CODEBOOK_BITS = 8
CODEBOOK_SAMPLES, CODEBOOK_ROUNDS = 1 << 16, 30
ROWS_AT_ONCE = 1 << 16

TINY = torch.finfo().tiny

Form = Callable[[torch.Tensor, int], torch.Tensor]
"""Channels in standard deviations [..., width] and bits -> what is read back of them."""


# --- radii ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RadiusCode:
    """Radii of `bits` bits: `table` ascending from zero, and codes `tried` around the nearest."""

    bits: int
    table: torch.Tensor
    tried: tuple[int, ...]


def small_floats(exponent_bits: int, mantissa_bits: int) -> torch.Tensor:
    """Unsigned floating-point numbers, subnormal ones too, in units of the smallest normal one."""
    codes = torch.arange(1 << exponent_bits + mantissa_bits, dtype=torch.int32)
    return (codes << 23 - mantissa_bits).view(torch.float32) * 2.0**126


RADII = {
    "log8": RadiusCode(
        8,
        torch.cat([torch.zeros(1), 2.0 ** (torch.arange(-254, 1) / 24)]),
        tuple(range(-12, 13, 2)),
    ),
    "e3m3": RadiusCode(6, small_floats(3, 3), tuple(range(-5, 6))),
    "e2m2": RadiusCode(4, small_floats(2, 2), (-2, -1, 0, 1, 2)),
    "e3m1": RadiusCode(4, small_floats(3, 1), (-1, 0, 1)),
}
"""Radii chosen before the codes: even steps of the logarithm (24 an octave), or small floats of so
many exponent and mantissa bits. `e2m2` is the product's."""


def radius_first(
    y: torch.Tensor,
    bits: tuple[int, ...],
    form: Form,
    radius: RadiusCode,
    per_band: bool = False,
    search: bool = True,
    worth: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slices y [n, bands, page, width] in standard deviations of the frame, read back.

    The nearest radius to a row's rms and, when `search`, its neighbours are tried; the codes are
    the best ones for each. Radii count in a unit per slice or, `per_band`, in one per band. With
    `worth`, the weight of each band's squared error [n, bands, 1], the bands share a radius.
    """
    coded = torch.tensor([b > 0 for b in bits]).view(1, -1, 1)
    spread = (y.square().mean(-1) * coded).sqrt()
    if worth is not None:
        mean = spread.square().sum(1, keepdim=True) / coded.sum()
        spread = mean.sqrt() * coded
    largest = spread.amax(2, keepdim=True)
    if not per_band:
        largest = largest.amax(1, keepdim=True)
    unit = (largest * (HEADROOM / radius.table[-1])).half().float().clamp_min(2.0**-24)
    nearest = torch.bucketize(spread / unit, (radius.table[1:] + radius.table[:-1]) / 2)
    best, least = torch.zeros_like(y), _errors(y, worth)
    for neighbour in radius.tried if search else (0,):
        code = (nearest + neighbour).clamp(1, len(radius.table) - 1)
        multiplier = (radius.table[code] * unit).unsqueeze(-1)
        tried = _read(y / multiplier, bits, form) * multiplier
        error = _errors(y - tried, worth)
        better = error < least
        best = torch.where(better.unsqueeze(-1), tried, best)
        least = torch.where(better, error, least)
    return best


def _errors(rest: torch.Tensor, worth: torch.Tensor | None) -> torch.Tensor:
    """What each radius is chosen by: squared errors of its band, or of all bands."""
    error = rest.square().sum(-1)
    return error if worth is None else (error * worth).sum(1, keepdim=True)


def _read(z: torch.Tensor, bits: tuple[int, ...], form: Form) -> torch.Tensor:
    """Every band of z [n, bands, page, width] through its form; zero without bits."""
    parts = [form(z[:, i], b) if b else torch.zeros_like(z[:, i]) for i, b in enumerate(bits)]
    return torch.stack(parts, 1)


def radius_after(y: torch.Tensor, bits: tuple[int, ...], radius: str) -> torch.Tensor:
    """The same, but the codes first, on the uniform grid that explains most of a row; then the
    radius that fits them best, rounded."""
    parts = []
    for band, b in enumerate(bits):
        part = y[:, band]
        if b:
            levels, fit = _best_levels(part, b)
            part = levels * (fit.half().float() if radius == "fp16" else _e4m4(fit))
        parts.append(part if b else torch.zeros_like(part))
    return torch.stack(parts, 1)


def _best_levels(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [..., width] -> half-integer levels, and the radii [..., 1] that fit them."""
    half = 2.0 ** (bits - 1)
    rms = y.square().mean(-1, keepdim=True).sqrt()
    steps = [rms * (STEP[bits] * factor) for factor in FACTORS]
    steps.append(y.abs().amax(-1, keepdim=True) / (half - 0.5))  # nothing is clipped
    tried = torch.stack([_levels(y / step.clamp_min(TINY), half) for step in steps])
    fit = fitted(y, tried)
    best = (fit.square() * tried.square().sum(-1, keepdim=True)).argmax(0, keepdim=True)
    levels = tried.gather(0, best.expand(1, *y.shape))[0]
    return levels, fit.gather(0, best)[0]


def _e4m4(radii: torch.Tensor) -> torch.Tensor:
    """Radii [n, page, 1] as an 8-bit float of 4 and 4 bits, in units of the slice's largest."""
    scale = radii.amax(1, keepdim=True).half().float().clamp_min(2.0**-24)
    table = small_floats(4, 4) / 2.0**14
    return snap((radii / scale).clamp_max(1.0), table[table <= 1.0]) * scale


def dropped(y: torch.Tensor, bits: tuple[int, ...], refit: bool) -> torch.Tensor:
    """Slices coded with two bits more, cut to their upper `bits`.

    Radii stay as they were, or are fitted again to the codes that are left.
    """
    finer = tuple(b + 2 for b in bits)
    codes, radius, unit = code_banded(y, finer)
    offset = torch.tensor([(2.0**b - 1) / 2 for b in bits]).view(-1, 1, 1)
    levels = (codes >> 2).float() - offset
    unit = unit.clamp_min(2.0**-24).view(-1, 1, 1)
    if not refit:
        step = 4 * steps_of(finer) * (steps_of(bits) > 0)
        return levels * step * (radius_table()[radius] * unit).unsqueeze(-1)
    levels = levels * steps_of(bits)
    code = nearest_codes(fitted(y, levels).squeeze(-1) / unit)
    return levels * (radius_table()[code] * unit).unsqueeze(-1)


def fitted(y: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The radius [..., 1] that brings levels nearest to y."""
    norm = levels.square().sum(-1, keepdim=True).clamp_min(TINY)
    return ((y * levels).sum(-1, keepdim=True) / norm).clamp_min(0.0)


# --- codes ---------------------------------------------------------------------------------------


def uniform(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Even steps, as the product's: a multiplication that the radius takes along."""
    return _levels(z / STEP[bits], 2.0 ** (bits - 1)) * STEP[bits]


def _levels(z: torch.Tensor, half: float) -> torch.Tensor:
    """The nearest half-integer levels within (-half, half)."""
    return torch.floor(z).clamp(-half, half - 1) + 0.5


def lloyd(z: torch.Tensor, bits: int) -> torch.Tensor:
    """The best levels for a normal (Max 1960): a table look-up per value."""
    return snap(z, lloyd_max_levels(bits))


def vector(z: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest of 256 vectors: 2 channels of 4 bits or 4 channels of 2, a look-up for them."""
    book = codebook(CODEBOOK_BITS // bits)
    return book[nearest_vectors(z.reshape(-1, book.shape[1]), book)].view(z.shape)


def pair(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Literal polar coordinates of channel pairs: bits + 1 of angle, bits - 1 of radius."""
    a, b = z.unflatten(-1, (-1, 2)).unbind(-1)
    angle = circle(torch.atan2(b, a), bits + 1)
    radius = snap(torch.hypot(a, b), trained(bits - 1, "pair", 1))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)


def polar(z: torch.Tensor, bits: int) -> torch.Tensor:
    """The recursive polar transform of a whole band: bits + 1 for the first angles, whose range is
    four times that of all others, and bits - 1 for those. Its length is the token's radius."""
    a, b = z.unflatten(-1, (-1, 2)).unbind(-1)
    angles, length, depth = [circle(torch.atan2(b, a), bits + 1)], torch.hypot(a, b), 1
    while length.shape[-1] > 1:
        a, b = length.unflatten(-1, (-1, 2)).unbind(-1)
        angles.append(snap(torch.atan2(b, a), trained(bits - 1, "polar", depth)))
        length, depth = torch.hypot(a, b), depth + 1
    read = torch.full_like(length, z.shape[-1] ** 0.5)
    for angle in reversed(angles):
        read = torch.stack([read * angle.cos(), read * angle.sin()], -1).flatten(-2)
    return read


FORMS: dict[str, Form] = {
    "uniform": uniform,
    "lloyd": lloyd,
    "vector": vector,
    "pair": pair,
    "polar": polar,
}


def circle(angle: torch.Tensor, bits: int) -> torch.Tensor:
    """Angles to the middle of 2**bits equal sectors of the circle."""
    step = 2 * torch.pi / 2**bits
    return (torch.floor(angle / step) + 0.5) * step


def snap(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The nearest entries of an ascending table."""
    return table[torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2)]


def nearest_vectors(x: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Places int64 [n] in book [entries, width] of what is nearest to x [n, width]."""
    bias = book.square().sum(1) / 2
    parts = [(rows @ book.T - bias).argmax(1) for rows in x.split(ROWS_AT_ONCE)]
    return torch.cat(parts)


@cache
def codebook(width: int) -> torch.Tensor:
    """256 vectors [256, width] with the least error for normal ones, by Lloyd's algorithm."""
    sample = torch.randn(CODEBOOK_SAMPLES, width, generator=torch.Generator().manual_seed(1))
    book = sample[: 2**CODEBOOK_BITS].clone()
    for _ in range(CODEBOOK_ROUNDS):
        book = means(sample, nearest_vectors(sample, book), book)
    return book


@cache
def trained(bits: int, kind: str, depth: int) -> torch.Tensor:
    """Lloyd's levels of what normal vectors give: radii of pairs, or polar angles at a depth."""
    normal = torch.randn(40000, 2 ** (depth + 1), generator=torch.Generator().manual_seed(1))
    if kind == "pair":
        sample = normal[:, :2].norm(dim=-1)
    else:
        a, b = normal.unflatten(1, (2, -1)).norm(dim=-1).unbind(1)
        sample = torch.atan2(b, a)
    levels = sample.quantile((torch.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(60):
        levels = means(sample, torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2), levels)
    return levels


def means(sample: torch.Tensor, cell: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The mean of every cell's sample; empty cells stay where they were."""
    count = torch.bincount(cell, minlength=len(old)).view(-1, *[1] * (old.dim() - 1))
    total = torch.zeros_like(old).index_add_(0, cell, sample)
    return torch.where(count > 0, total / count.clamp_min(1), old)
