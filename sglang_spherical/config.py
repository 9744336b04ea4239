"""The one place that knows the product's flags, their defaults and what values are legal.

`SphericalConfig` is frozen and picklable: it travels to every scheduler process as
`server_args._spherical`, and nothing else reads flags or environment variables.
"""

from __future__ import annotations

from dataclasses import dataclass

KV_FORMATS = ("dense", "spherical")
PAGE_SIZES = (16, 32, 64)
TIERS = ("hot", "warm", "cool", "cold", "frozen")
"""Levels of precision, finest first."""

HOT_BITS = (4, 8)
WARM_BITS = (3, 4)
COLD_BITS = (2, 3)


@dataclass(frozen=True)
class SphericalConfig:
    """What `--kv-format` and the `--spherical-*` flags say.

    Raises ValueError, in one line that names the value and the remedy, when they cannot hold.
    """

    kv_format: str = "dense"
    hot_bits: int = 8  # code bits per value of tokens being written
    warm_bits: int = 4  # average code bits per value of cached prefixes
    cold_bits: int = 2  # average code bits per value under eviction pressure, before the last tier
    budget: str = "warm"  # the tier that eligible prefix pages are given at once
    watermark: float = 0.0  # used fraction of memory below which nothing is re-tiered
    high_watermark: float = 1.0  # used fraction above which pages are lowered beyond the budget
    settle_pages: int | None = None  # pages re-encoded between two forward passes; None: by bytes
    recent_tokens: int = 256  # newest tokens of a request that stay hot
    frames: str | None = None  # calibration file; None calibrates online
    kv_bytes: int | None = None  # memory for the pool, in bytes; None sizes it as SGLang does

    @property
    def spherical(self) -> bool:
        return self.kv_format == "spherical"

    def __post_init__(self) -> None:
        _one_of("--kv-format", self.kv_format, KV_FORMATS)
        _one_of("--spherical-hot-bits", self.hot_bits, HOT_BITS)
        _one_of("--spherical-warm-bits", self.warm_bits, WARM_BITS)
        _one_of("--spherical-cold-bits", self.cold_bits, COLD_BITS)
        _one_of("--spherical-budget", self.budget, TIERS)
        if not self.hot_bits > self.warm_bits > self.cold_bits:
            raise ValueError(
                f"--spherical-warm-bits {self.warm_bits} must lie above --spherical-cold-bits "
                f"{self.cold_bits} and below --spherical-hot-bits {self.hot_bits}: "
                "use for example 8, 4 and 2"
            )
        if not 0.0 <= self.watermark <= 1.0:
            raise ValueError(
                f"--spherical-watermark {self.watermark}: expected a fraction from 0 to 1"
            )
        if not self.watermark <= self.high_watermark <= 1.0:
            raise ValueError(
                f"--spherical-high-watermark {self.high_watermark}: expected a fraction from "
                f"--spherical-watermark {self.watermark} to 1"
            )
        if self.settle_pages is not None and self.settle_pages < 1:
            raise ValueError(
                f"--spherical-settle-pages {self.settle_pages}: expected 1 or more pages"
            )
        if self.recent_tokens < 0:
            raise ValueError(
                f"--spherical-recent-tokens {self.recent_tokens}: expected 0 or more tokens"
            )
        if self.kv_bytes is not None and self.kv_bytes <= 0:
            raise ValueError(
                f"--spherical-kv-bytes {self.kv_bytes}: expected a positive byte count"
            )


def _one_of(flag: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{flag} {value}: expected one of {', '.join(map(str, choices))}")
