"""Other codecs of keys and values, measured beside the tiers by `evaluate --compare`.

fp8        float8 e4m3, without and with a scale per head
min_max    per-channel keys and per-token values between minimum and maximum (KIVI)
lloyd      rotated Lloyd–Max levels and one radius (TurboQuant)
codebook   grouped spherical codebooks

To add one: a module with a `Comparator`, an entry of `COMPARATORS`. The tests run over the entries.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_spherical.evaluation.comparators.base import Comparator, ComparatorRead, bits_per_value
from sglang_spherical.evaluation.comparators.codebook import GroupedCodebook
from sglang_spherical.evaluation.comparators.fp8 import Float8
from sglang_spherical.evaluation.comparators.lloyd import RotatedLloydMax
from sglang_spherical.evaluation.comparators.min_max import MinMax

__all__ = ["ALL", "COMPARATORS", "Comparator", "ComparatorRead", "bits_per_value", "make"]

ALL = "all"

COMPARATORS: dict[str, Callable[[str], Comparator]] = {
    "fp8": lambda name: Float8(name, scaled=False),
    "fp8-scaled": lambda name: Float8(name, scaled=True),
    "kivi4": lambda name: MinMax(name, 4),
    "kivi2": lambda name: MinMax(name, 2),
    "lloyd4": lambda name: RotatedLloydMax(name, 4),
    "lloyd3": lambda name: RotatedLloydMax(name, 3),
    "codebook16x64": lambda name: GroupedCodebook(name, 16, 64),
    "codebook16x16": lambda name: GroupedCodebook(name, 16, 16),
    "codebook16x8": lambda name: GroupedCodebook(name, 16, 8),
    "codebook32x64": lambda name: GroupedCodebook(name, 32, 64),
    "codebook32x16": lambda name: GroupedCodebook(name, 32, 16),
    "codebook32x8": lambda name: GroupedCodebook(name, 32, 8),
}


def make(listed: str) -> list[Comparator]:
    """The comparators of a list by commas, or `all` of them. Raises ValueError on another name."""
    names = list(COMPARATORS) if listed == ALL else [name.strip() for name in listed.split(",")]
    for name in names:
        if name not in COMPARATORS:
            expected = ",".join([ALL, *COMPARATORS])
            raise ValueError(f"--compare {listed}: expected some of {expected}, got {name!r}")
    return [COMPARATORS[name](name) for name in dict.fromkeys(names)]
