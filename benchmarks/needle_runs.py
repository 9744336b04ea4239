"""The caches that `needle_margins.py` reads haystacks from, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from head_patterns import Chosen, choose, size_bytes
from needle_reader import OneSide, Rounded

from sglang_spherical.config import PAGE_SIZES, TIERS
from sglang_spherical.evaluation.attention import CacheForm
from sglang_spherical.evaluation.coding import TierCoder, TierRead, bits_per_value
from sglang_spherical.evaluation.gradients import Coder
from sglang_spherical.frame_file import CHOICES, FrameStatistics
from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import PageLayout
from spherical_kernels.codec.patterns import FrameKind, Pattern

DENSE = "dense"
PAGE = max(PAGE_SIZES)
SIDES = {"keys": KEYS, "values": VALUES}
FLOATS = {"bf16": (torch.bfloat16, 16.0), "fp8": (torch.float8_e4m3fn, 8.0)}
BITS, AND_HOT = "bits", "+hot"
HOT = Pattern(FrameKind.HOT, (8,))

HOT_SHARE = 1 / 64
"""Of the distortion of warm's patterns, hot codes': SmolLM2's keys have a 72nd, values a 200th."""

WARM = 1
"""Place of warm's patterns in `CHOICES`."""


@dataclass(frozen=True)
class Form:
    """A run: its cache, and what a key or value component takes in it."""

    cache: CacheForm | None
    bits: float


def forms(
    names: Sequence[str], frames: Frames, layout: PageLayout, known: FrameStatistics
) -> dict[str, Form]:
    """The dense run and those of these names. Raises ValueError on a name that is none."""
    tiers = {name.partition(":")[0] for name in names}
    hot, *lower = layout.levels
    stops = hot, *(level for level in lower if level.name in tiers)
    places = [layout.levels.index(stop) for stop in stops]
    coder = TierCoder(frames, stops, layout.assignment.at(places))
    found = {DENSE: Form(None, 16.0)}
    for name in names:
        tier, _, side = name.partition(":")
        bits, more, and_hot = name.partition(BITS)
        if name in FLOATS:
            dtype, width = FLOATS[name]
            found[name] = Form(Rounded(dtype, PAGE), width)
        elif tier in TIERS and side in ("", *SIDES):
            stop = next(i for i, level in enumerate(stops) if level.name == tier)
            read: CacheForm = TierRead(coder, stop)
            taken = bits_per_value(layout, places[stop])
            found[name] = Form(OneSide(read, SIDES[side]) if side else read, taken)
        elif more and bits.replace(".", "", 1).isdigit() and and_hot in ("", AND_HOT):
            found[name] = _of_bits(float(bits), bool(and_hot), Coder(frames), known)
        else:
            raise ValueError(
                f"--runs {name}: expected a tier, TIER:keys, TIER:values, bf16, fp8, or bits as in "
                "2.5bits or 2.5bits+hot"
            )
    return found


def _of_bits(bits: float, and_hot: bool, coder: Coder, known: FrameStatistics) -> Form:
    """Every slice in the pattern that the least distortion for so many bits gives it."""
    if known.distortion is None:
        raise ValueError("--runs: bits are given out by distortions, --frames has none")
    loss, head_dim = known.distortion.double(), known.gain.shape[-1]
    choices = CHOICES
    if and_hot:
        choices = tuple((*side, HOT) for side in CHOICES)
        loss = torch.cat([loss, loss[..., WARM : WARM + 1] * HOT_SHARE], -1)
    each = [[size_bytes(its, head_dim) for its in side] for side in choices]
    sizes = torch.tensor(each, dtype=torch.float64)
    picked = choose(loss, sizes, bits / 8 * PAGE * head_dim)
    sides = range(len(choices))
    patterns = [
        [[choices[side][i] for i in layer] for layer in picked[side].tolist()] for side in sides
    ]
    taken = torch.stack([sizes[side][picked[side]] for side in sides])
    return Form(Chosen(coder, patterns), float(taken.mean()) * 8 / PAGE / head_dim)
