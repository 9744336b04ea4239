"""Codecs of one head's keys or values for `format_study.py`: the product's, and what it is not.

A `Codec` names every choice of the format; `Codec.code` takes tokens through it. The product's own
functions do what they can do; the rest (other radii, other levels, polar angles) is only here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from sglang_spherical.evaluation.comparators.lloyd import lloyd_max_levels
from spherical_kernels.codec.frames import signed_hadamard
from spherical_kernels.codec.pages import STEP_FACTORS, code_directions
from spherical_kernels.codec.radii import decode_radii, encode_radii

STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
"""Best uniform step for a unit normal (Max 1960; 8 bits: by search)."""

ERROR = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104, 8: 0.000094}
"""Mean squared error of those codes."""

OCTAVES_TRIED = (-1 / 2, -1 / 3, -1 / 6, 0.0, 1 / 6, 1 / 3, 2 / 3)
"""Radii tried above the normal's step, where the radius is chosen before the codes."""

HEADROOM = 1 / 3
"""Octaves that the largest radius may lie above the largest normal's step."""

RADIUS_BITS = {"fp16": 16, "e4m4": 8, "log8": 8, "log6": 6, "e3m3": 6, "log4": 4, "e2m2": 4}
RADIUS_TABLES = {
    "log8": 2.0 ** (-torch.arange(255, -1, -1) / 24),
    "log6": 2.0 ** (-torch.arange(63, -1, -1) / 12),
    "log4": 2.0 ** (-torch.arange(15, -1, -1) / 3),
    "e3m3": torch.cat([(1 + torch.arange(8) / 8) * 2.0**e for e in range(-8, 0)]) * 16 / 15,
    "e2m2": torch.cat([(1 + torch.arange(4) / 4) * 2.0**e for e in range(-4, 0)]) * 8 / 7,
}
"""Radii that are chosen before the codes, relative to the page's largest, ascending: even steps of
the logarithm, or small floats of so many exponent and mantissa bits."""

CENTROID_BITS = {"bf16": 16, "coded": 8, "coded4": 4, "none": 0}
TINY = torch.finfo().tiny


@dataclass(frozen=True)
class Head:
    """Statistics of the heads of a layer, [heads, d] each, from tokens that are not scored."""

    centre: torch.Tensor
    gain: torch.Tensor
    spread: torch.Tensor


@dataclass(frozen=True)
class Codec:
    """One form of a page.

    bits      code bits of every band of channels, most important first; None: water-filling
    average   bits per value that water-filling may spend
    bands     bands of channels; taken from `bits` where given
    radii     radii per token, each for bands / radii bands; 0: one per band
    weight    of channels: "sqrt" of gain / spread, "gain", "none"
    step      "search" among several, or the "gaussian" one
    radius    "fp16", "e4m4" (the product's), or one of `RADIUS_TABLES`
    levels    "uniform", "lloyd" (Lloyd–Max), "pair" or "polar" angles, "dropped" or "refitted":
              the upper bits of codes with two more, radii kept or fitted again
    """

    bits: tuple[int, ...] | None = None
    average: float = 0.0
    bands: int = 4
    radii: int = 0
    page: int = 64
    weight: str = "sqrt"
    step: str = "search"
    radius: str = "e4m4"
    centroid: str = "coded"
    levels: str = "uniform"

    @property
    def count(self) -> int:
        """Bands of channels."""
        return self.bands if self.bits is None else len(self.bits)

    def code_bits(self) -> float:
        """Bits per value of the codes alone."""
        return self.average if self.bits is None else sum(self.bits) / len(self.bits)

    def counted_bits(self, d: int) -> float:
        """Bits per value with radii and header; tables and padding are a page layout's."""
        radii = self.radii or (self.count if self.bits is None else sum(b > 0 for b in self.bits))
        header = d * CENTROID_BITS[self.centroid] + 16 * (radii + 1)
        return self.code_bits() + radii * RADIUS_BITS[self.radius] / d + header / (self.page * d)

    def code(self, x: torch.Tensor, head: Head) -> torch.Tensor:
        """x [heads, tokens, d] float32, whole pages, as it is read back."""
        matrix, dual, scale, bits = self._frame(head)
        y = (x - head.centre.unsqueeze(1)) @ matrix.transpose(1, 2)
        pages = y.unflatten(1, (-1, self.page))
        centroid = self._centroid(pages.mean(2, keepdim=True))
        banded = (pages - centroid).unflatten(-1, (self.count, -1)).transpose(2, 3)
        coded = torch.stack([self._heads(*args) for args in zip(banded, scale, bits)])
        y = coded.transpose(2, 3).flatten(3) + centroid
        return y.flatten(1, 2) @ dual + head.centre.unsqueeze(1)

    def _frame(
        self, head: Head
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, ...]]]:
        """A and its dual [heads, d, d], the rms of every band in the frame [heads, bands], and the
        bits of every head's bands."""
        heads, d = head.gain.shape
        ratio = {"sqrt": (head.gain / head.spread).sqrt(), "gain": head.gain}
        weight = ratio.get(self.weight, torch.ones(heads, d))
        weight = weight / weight.log().mean(-1, keepdim=True).exp()
        order = torch.argsort(head.gain * head.spread, dim=-1, descending=True)
        sort = torch.zeros(heads, d, d).scatter_(2, order.unsqueeze(-1), 1.0)
        rotation = torch.block_diag(*[signed_hadamard(d // self.count)] * self.count)
        rms = (weight * head.spread).gather(1, order).unflatten(1, (self.count, -1))
        matrix, dual = (rotation @ (sort * w.unsqueeze(1)) for w in (weight, 1 / weight))
        worth = (head.gain * head.spread).square().gather(1, order)
        worth = worth.unflatten(1, (self.count, -1)).mean(-1)
        bits = [self.bits or water_fill(w.tolist(), self.average) for w in worth]
        return matrix, dual, rms.square().mean(-1).sqrt(), bits

    def _centroid(self, mean: torch.Tensor) -> torch.Tensor:
        bits = CENTROID_BITS[self.centroid]
        if bits == 16:
            return mean.bfloat16().float()
        if not bits:
            return torch.zeros_like(mean)
        codes, radius = code_directions(mean, bits)
        return (codes.float() - (2**bits - 1) / 2) * radius.half().float()

    def _heads(
        self, banded: torch.Tensor, scale: torch.Tensor, bits: tuple[int, ...]
    ) -> torch.Tensor:
        """One head's [pages, bands, page, width] read back; scale [bands]."""
        if self.radii and self.radii < self.count:
            return self._shared(banded, scale, bits)
        parts = [self._band(banded[:, i], b) for i, b in enumerate(bits)]
        return torch.stack(parts, 1)

    def _band(self, y: torch.Tensor, bits: int) -> torch.Tensor:
        """One band [pages, page, width] read back."""
        if not bits:
            return torch.zeros_like(y)
        if self.radius in RADIUS_TABLES:
            half = torch.full(y.shape[-1:], 2.0 ** (bits - 1))
            return radius_first(y, half, STEP[bits], self.radius)
        levels, radius = self._quantiser()(y, bits)
        return levels * self._stored(radius)

    def _stored(self, radius: torch.Tensor) -> torch.Tensor:
        """Radii [pages, page, 1] as they are stored."""
        if self.radius == "fp16":
            return radius.half().float()
        scale = radius.amax(1, keepdim=True).half().float().clamp_min(2.0**-24)
        return decode_radii(encode_radii(radius, scale), scale)

    def _shared(
        self, banded: torch.Tensor, scale: torch.Tensor, bits: tuple[int, ...]
    ) -> torch.Tensor:
        """Bands that share a radius: the frame brings all their grids to one step."""
        size, parts = self.count // self.radii, []
        step = torch.tensor([STEP.get(b, 1.0) for b in bits]) * scale
        for first in range(0, self.count, size):
            take = slice(first, first + size)
            unit = (banded[:, take] / step[take].view(-1, 1, 1)).transpose(1, 2)
            half = torch.tensor([2.0 ** (b - 1) if b else 0.0 for b in bits[take]])
            half = half.repeat_interleave(banded.shape[-1])
            coded = radius_first(unit.flatten(2), half, None, self.radius)
            coded = coded.unflatten(2, (size, -1)).transpose(1, 2)
            parts.append(coded * step[take].view(-1, 1, 1))
        return torch.cat(parts, 1)

    def _quantiser(self) -> Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
        """Rows y [..., width] and bits -> levels, and the radius that fits them best."""
        if self.levels == "uniform":
            return partial(uniform, factors=STEP_FACTORS if self.step == "search" else (1.0,))
        methods = {"lloyd": lloyd, "pair": pair_angles, "polar": recursive_polar}
        return methods.get(self.levels) or partial(dropped, refit=self.levels == "refitted")


def water_fill(variance: list[float], average: float) -> tuple[int, ...]:
    """Bits per band of equal width, greedily by error removed per bit, averaging at most that."""
    bits = [0] * len(variance)
    while True:
        spent = sum(bits)
        steps = [
            (v * (ERROR[b] - ERROR[c]) / (c - b), i, c)
            for i, (v, b) in enumerate(zip(variance, bits))
            for c in ERROR
            if c > b and spent + c - b <= average * len(bits) + 1e-9
        ]
        if not steps:
            return tuple(bits)
        _, i, c = max(steps)
        bits[i] = c


def fitted(y: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The radius [..., 1] that brings levels nearest to y."""
    norm = levels.square().sum(-1, keepdim=True).clamp_min(TINY)
    return ((y * levels).sum(-1, keepdim=True) / norm).clamp_min(0.0)


def rms(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean(-1, keepdim=True).sqrt().clamp_min(TINY)


def grid(y: torch.Tensor, half: torch.Tensor | float) -> torch.Tensor:
    """The nearest half-integer levels below `half`; zero where `half` is zero."""
    half = torch.as_tensor(half)
    levels = torch.minimum(torch.maximum(torch.floor(y), -half), half - 1) + 0.5
    return torch.where(half > 0, levels, 0.0)


def uniform(
    y: torch.Tensor, bits: int, factors: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Even steps: the product's codes, a fixed step, or the product's way for odd widths."""
    half = 2.0 ** (bits - 1)
    if bits in (2, 4, 6) and len(factors) > 1:
        codes, radius = code_directions(y, bits)
        return codes.float() - (half - 0.5), radius
    steps = [rms(y) * STEP[bits] * factor for factor in factors]
    if len(factors) > 1:  # nothing is clipped
        steps.append((y.abs().amax(-1, keepdim=True) / (half - 0.5)).clamp_min(TINY))
    tried = torch.stack([grid(y / step, half) for step in steps])
    radii = fitted(y, tried)
    best = (radii.square() * tried.square().sum(-1, keepdim=True)).argmax(0, keepdim=True)
    levels = tried.gather(0, best.expand(1, *y.shape))[0]
    return levels, radii.gather(0, best)[0]


def lloyd(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels of Max for a normal: a table look-up for every value."""
    table = lloyd_max_levels(bits)
    levels = table[torch.bucketize(y / rms(y), (table[1:] + table[:-1]) / 2)]
    return levels, fitted(y, levels)


def dropped(y: torch.Tensor, bits: int, refit: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with two more bits, cut to their upper `bits`; radii as they were, or fitted again."""
    codes, radius = code_directions(y, bits + 2)
    levels = (codes >> 2).float() - (2**bits - 1) / 2
    return levels, fitted(y, levels) if refit else 4 * radius


def radius_first(
    y: torch.Tensor, half: torch.Tensor, step: float | None, kind: str
) -> torch.Tensor:
    """[pages, page, width] read back: a radius of a table, and the codes that are best with it.

    Several around the normal's step are tried, then the one that fits the best codes; without
    `step` the rows are in units of it already.
    """
    reference = rms(y) * step if step else rms(y) / rms_of_units(half)
    top = (reference.amax(1, keepdim=True) * 2**HEADROOM).half().float().clamp_min(2.0**-24)
    table = RADIUS_TABLES[kind]
    best, least = torch.zeros_like(y), y.square().sum(-1, keepdim=True)
    for octaves in OCTAVES_TRIED:
        radius = snap(reference * 2.0**octaves / top, table) * top
        levels = grid(y / radius, half)
        for tried in (radius, snap(fitted(y, levels) / top, table) * top):
            error = (y - levels * tried).square().sum(-1, keepdim=True)
            best = torch.where(error < least, levels * tried, best)
            least = torch.minimum(error, least)
    return best


def rms_of_units(half: torch.Tensor) -> torch.Tensor:
    """Expected rms of rows whose channels are normals divided by the best step of their bits."""
    steps = [STEP[int(h).bit_length()] if h else 1.0 for h in half.tolist()]
    return (1 / torch.tensor(steps).square()).mean().sqrt()


def pair_angles(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Literal polar coordinates of channel pairs: bits + 1 of angle, bits - 1 of radius."""
    unit = y / rms(y)
    a, b = unit.unflatten(-1, (-1, 2)).unbind(-1)
    angle = circle(torch.atan2(b, a), bits + 1)
    table = trained(bits - 1, "pair", 1)
    radius = snap(torch.hypot(a, b), table)
    levels = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)
    return levels, fitted(y, levels)


def recursive_polar(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The recursive polar transform of a whole band: bits + 1 for the first angles, whose range is
    four times that of all others, and bits - 1 for those."""
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
    angles, length, depth = [circle(torch.atan2(b, a), bits + 1)], torch.hypot(a, b), 1
    while length.shape[-1] > 1:
        a, b = length.unflatten(-1, (-1, 2)).unbind(-1)
        angles.append(snap(torch.atan2(b, a), trained(bits - 1, "polar", depth)))
        length, depth = torch.hypot(a, b), depth + 1
    levels = torch.ones_like(length)
    for angle in reversed(angles):
        levels = torch.stack([levels * angle.cos(), levels * angle.sin()], -1).flatten(-2)
    return levels, fitted(y, levels)


def circle(angle: torch.Tensor, bits: int) -> torch.Tensor:
    """Angles to the middle of 2**bits equal sectors of the circle."""
    step = 2 * torch.pi / 2**bits
    return (torch.floor(angle / step) + 0.5) * step


def snap(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The nearest entries of an ascending table."""
    return table[torch.bucketize(x, (table[1:] + table[:-1]) / 2)]


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
        cell = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
        count = torch.bincount(cell, minlength=2**bits).clamp_min(1)
        levels = torch.zeros_like(levels).index_add_(0, cell, sample) / count
    return levels
