"""Codecs of one layer's keys or values for `format_study.py`.

A `Codec` names every choice of the format; its defaults are the product's, and take tokens through
the product's own functions. `Codec.code` takes tokens through any other choice, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from study_forms import AFTER, FORMS, RADII, dropped, radius_after, radius_first

from spherical_kernels.codec.frames import calibrated_frame, signed_hadamard
from spherical_kernels.codec.pages import GAUSSIAN_STEP, code_banded, code_directions, steps_of
from spherical_kernels.codec.patterns import BANDS
from spherical_kernels.codec.radii import radius_table
from spherical_kernels.codec.slices import FEWEST_SCALES

ERROR = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104, 8: 0.000094}
"""Mean squared error of a unit normal coded with the best uniform step (Max 1960)."""

CENTROID_BITS = {"bf16": 16, "8": 8, "4": 4, "none": 0}


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
    bands     bands that water-filling fills; those of a pattern are counted
    page      tokens
    weight    of channels: "sqrt" of gain / spread, "gain", "none"
    radius    chosen before the codes (`RADII`) or after them (`AFTER`)
    per_band  units or scales of radii: one for every band of a slice, or one for the slice
    shared    one radius for all bands of a token
    search    whether neighbours of the nearest radius are tried
    centroid  of the page (`CENTROID_BITS`)
    levels    form of the codes (`FORMS`)
    drop      the upper bits of codes with two more: radii "kept" or "refitted"; "": coded anew
    """

    bits: tuple[int, ...] | None = None
    average: float = 0.0
    bands: int = BANDS
    page: int = 64
    weight: str = "sqrt"
    radius: str = "e2m2"
    per_band: bool = False
    shared: bool = False
    search: bool = True
    centroid: str = "8"
    levels: str = "uniform"
    drop: str = ""

    @property
    def count(self) -> int:
        """Bands of channels."""
        return self.bands if self.bits is None else len(self.bits)

    def code_bits(self) -> float:
        """Bits per value of the codes alone."""
        return self.average if self.bits is None else sum(self.bits) / len(self.bits)

    def counted_bits(self, d: int) -> float:
        """Bits per value of a slice: codes, radii, centroid, scales. What pages and blocks round
        up is left out."""
        radius = AFTER.get(self.radius) or RADII[self.radius].bits
        radii = radius * (1 if self.shared else self.count) / d
        header = CENTROID_BITS[self.centroid] + 16 * FEWEST_SCALES / d
        return self.code_bits() + radii + header / self.page

    def code(self, x: torch.Tensor, head: Head) -> torch.Tensor:
        """x [heads, tokens, d] float32, whole pages, as it is read back."""
        matrix, dual = frame(head, self.count, self.weight)
        y = (x - head.centre.unsqueeze(1)) @ matrix.transpose(1, 2)
        pages = y.unflatten(1, (-1, self.page))
        centroid = self._centroid(pages.mean(2, keepdim=True))
        banded = (pages - centroid).unflatten(-1, (self.count, -1)).transpose(2, 3)
        patterns = self._patterns(head)
        coded = torch.empty_like(banded)
        for bits in set(patterns):
            mine = torch.tensor([pattern == bits for pattern in patterns])
            worth = importance(head, self.count)[mine].repeat_interleave(pages.shape[1], 0)
            part = self._slices(banded[mine].flatten(0, 1), bits, worth)
            coded[mine] = part.unflatten(0, (-1, pages.shape[1]))
        y = coded.transpose(2, 3).flatten(3) + centroid
        return y.flatten(1, 2) @ dual + head.centre.unsqueeze(1)

    def _patterns(self, head: Head) -> list[tuple[int, ...]]:
        """Bits of every head's bands."""
        if self.bits is not None:
            return [self.bits] * len(head.gain)
        worth = importance(head, self.count)
        return [water_fill(tuple(w.tolist()), self.average) for w in worth]

    def _centroid(self, mean: torch.Tensor) -> torch.Tensor:
        """Page centroids [heads, pages, 1, d] of the frame as they are stored."""
        bits = CENTROID_BITS[self.centroid]
        if bits in (0, 16):
            return mean.bfloat16().float() if bits else torch.zeros_like(mean)
        codes, radius = code_directions(mean, bits)
        return (codes.float() - (2**bits - 1) / 2) * radius.half().float()

    def _slices(self, y: torch.Tensor, bits: tuple[int, ...], worth: torch.Tensor) -> torch.Tensor:
        """Slices [n, bands, page, width] read back; worth of their bands [n, bands]."""
        if self.drop:
            return dropped(y, bits, self.drop == "refitted")
        if self.radius in AFTER:
            return radius_after(y, bits, self.radius)
        if self._is_product(bits):
            return product(y, bits)
        radius, form = RADII[self.radius], FORMS[self.levels]
        shared = worth.unsqueeze(-1) if self.shared else None
        return radius_first(y, bits, form, radius, self.per_band, self.search, shared)

    def _is_product(self, bits: tuple[int, ...]) -> bool:
        """Whether the product's functions code slices like this, in whatever frame."""
        form = self.radius, self.levels, self.per_band, self.shared, self.search
        return form == ("e2m2", "uniform", False, False, True) and set(bits) <= GAUSSIAN_STEP.keys()


def product(y: torch.Tensor, bits: tuple[int, ...]) -> torch.Tensor:
    """Slices [n, bands, page, width] read back, through the product's own coding."""
    codes, radius, unit = code_banded(y, bits)
    offset = torch.tensor([(2.0**b - 1) / 2 for b in bits]).view(-1, 1, 1)
    multiplier = (radius_table()[radius] * unit.view(-1, 1, 1)).unsqueeze(-1) * steps_of(bits)
    return (codes.float() - offset) * multiplier


def importance(head: Head, bands: int) -> torch.Tensor:
    """Weight of a squared error in each band of the frame: [heads, bands], falling."""
    worth = (head.gain * head.spread).square().sort(-1, descending=True).values
    return worth.unflatten(1, (bands, -1)).mean(-1)


def frame(head: Head, bands: int, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and its dual [heads, d, d]: `calibrated_frame` with other numbers of bands and weights.

    Every band has a spread of one.
    """
    if bands == BANDS and weight == "sqrt":
        return calibrated_frame(head.gain, head.spread)
    heads, d = head.gain.shape
    ratio = {"sqrt": (head.gain / head.spread).sqrt(), "gain": head.gain}
    weights = ratio.get(weight, torch.ones(heads, d))
    order = torch.argsort(head.gain * head.spread, dim=-1, descending=True, stable=True)
    sort = torch.zeros(heads, d, d).scatter_(2, order.unsqueeze(-1), 1.0)
    weighted = (weights * head.spread).gather(1, order).unflatten(1, (bands, -1))
    spread = weighted.square().mean(-1, keepdim=True).sqrt().expand_as(weighted).flatten(1)
    weights = weights / torch.empty_like(weights).scatter_(1, order, spread)
    rotation = torch.block_diag(*[signed_hadamard(d // bands)] * bands)
    return rotation @ (sort * weights.unsqueeze(1)), rotation @ (sort / weights.unsqueeze(1))


@cache
def water_fill(variance: tuple[float, ...], average: float) -> tuple[int, ...]:
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
