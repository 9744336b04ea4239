"""Which codecs `format_study.py` compares: one choice at a time, beside the product's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from study_codecs import CENTROID_BITS, Codec

AVERAGES = (4.0, 3.0, 2.5, 2.0, 1.5)
EVEN_PATTERNS = (
    *((6, 4, 4, 2), (4, 4, 4, 4), (8, 4, 2, 2), (6, 6, 2, 2), (4, 4, 2, 2), (6, 4, 2, 0)),
    *((4, 2, 2, 2), (4, 4, 2, 0), (4, 2, 2, 0), (2, 2, 2, 2), (4, 4, 0, 0), (6, 2, 0, 0)),
    *((4, 2, 0, 0), (2, 2, 2, 0)),
)
ODD_PATTERNS = (
    *((5, 4, 4, 3), (5, 5, 3, 3), (5, 5, 4, 2), (4, 3, 3, 2), (5, 3, 3, 1), (3, 3, 3, 3)),
    *((4, 3, 2, 1), (3, 3, 2, 2), (3, 2, 2, 1), (3, 3, 1, 1), (4, 2, 1, 1), (3, 3, 2, 0)),
    *((2, 2, 1, 1), (3, 2, 1, 0)),
)
WARM, COLD = ((6, 4, 4, 2), (4, 4, 4, 4)), ((4, 2, 2, 2), (2, 2, 2, 2))
"""The product's patterns of keys and values."""

BASES = (*WARM, *COLD)
SPLITS = (
    *((6, 4, 4, 2), (5, 4, 4, 3), (4, 4, 4, 4), (4, 4, 2, 2), (4, 3, 3, 2)),
    *((4, 2, 2, 2), (4, 2, 2, 0), (3, 2, 2, 1), (2, 2, 2, 2)),
)
BANDS_OF = {  # bands: patterns of 4, 2.5 and 2 bits
    8: ((6, 6, 4, 4, 4, 4, 2, 2), (4, 4, 2, 2, 2, 2, 2, 2), (4, 4, 2, 2, 2, 2, 0, 0), (2,) * 8),
    2: ((6, 2), (5, 3), (4, 4), (3, 2), (2, 2), (3, 1)),
    1: ((4,), (2,)),
}
EVEN_ONLY = "pair", "polar"
"""Code forms for patterns of one width; a codebook of 256 vectors has none of 6 bits."""


@dataclass(frozen=True)
class Run:
    """A codec in its part of the study. `after`: what the tokens have been through before."""

    group: str
    label: str
    codec: Codec
    after: Codec | None = None


def name(bits: tuple[int, ...]) -> str:
    return "-".join(map(str, bits))


def runs(d: int) -> list[Run]:
    """All parts of the study that look at one side alone; d channels."""
    found = [Run("even pattern", name(bits), Codec(bits)) for bits in EVEN_PATTERNS]
    found += [Run("odd pattern", name(bits), Codec(bits)) for bits in ODD_PATTERNS]
    return found + widths(d) + choices() + planes()


def widths(d: int) -> list[Run]:
    """Bands of 16 channels and more, a radius each: patterns, and water-filling."""
    found = []
    for count in (8, 4, 2, 1):
        width = d // count
        if width < 16:
            continue
        for bits in BANDS_OF.get(count, BASES):
            found.append(Run(f"bands of {width}", name(bits), Codec(bits)))
        for average in AVERAGES if count > 1 else ():
            codec = Codec(average=average, bands=count)
            found.append(Run(f"water-filling, bands of {width}", f"{average:g}", codec))
    return found


def choices() -> list[Run]:
    """What differs from the product in one thing."""
    options: dict[str, dict[str, dict[str, Any]]] = {
        "radius": {
            "fp16, after": {"radius": "fp16"},
            "e4m4 per band, after": {"radius": "e4m4"},
            "log8": {"radius": "log8"},
            "e3m3": {"radius": "e3m3"},
            "e2m2 per band": {"per_band": True},
            "e2m2": {},
            "e3m1": {"radius": "e3m1"},
            "one log8": {"radius": "log8", "shared": True},
            "one e2m2": {"shared": True},
        },
        "page": {str(page): {"page": page} for page in (16, 32, 64, 128)},
        "centroid": {centroid: {"centroid": centroid} for centroid in CENTROID_BITS},
        "weight": {weight: {"weight": weight} for weight in ("sqrt", "gain", "none")},
        "levels": {
            f"{levels} {how}": {"levels": levels, "search": how == "searched"}
            for levels in ("uniform", "lloyd", "vector", "pair", "polar")
            for how in ("searched", "fixed")
        }
        | {"polar, log8": {"levels": "polar", "radius": "log8"}},
    }
    found = []
    for group, variants in options.items():
        for base in BASES:
            for label, change in variants.items():
                uneven, levels = len(set(base)) > 1, change.get("levels")
                if (uneven and levels in EVEN_ONLY) or (6 in base and levels == "vector"):
                    continue
                codec = replace(Codec(base), **change)
                found.append(Run(group, f"{name(base)} {label}", codec))
    for how in ("searched", "fixed"):  # what 2 bits of keys would be with a codebook
        codec = Codec((4, 2, 2, 0), levels="vector", search=how == "searched")
        found.append(Run("levels", f"4-2-2-0 vector {how}", codec))
    return found


def planes() -> list[Run]:
    """Two bits less: dropped in place, or coded anew."""
    found = []
    for fine, coarse in (((6, 4, 4, 2), (4, 2, 2, 0)), ((4, 4, 4, 4), (2, 2, 2, 2))):
        for drop in ("kept", "refitted"):
            codec = Codec(coarse, drop=drop)
            found.append(Run("planes", f"{name(coarse)} radii {drop}", codec))
        found.append(Run("planes", f"{name(coarse)} coded anew", Codec(coarse), Codec(fine)))
        found.append(Run("planes", f"{name(coarse)} from exact", Codec(coarse)))
    for fine, bits in zip(WARM, COLD):
        found.append(Run("planes", f"{name(bits)} from {name(fine)}", Codec(bits), Codec(fine)))
    found.append(Run("planes", f"{name(COLD[0])} from exact", Codec(COLD[0])))
    return found
