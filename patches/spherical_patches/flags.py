"""`--kv-format` and the `--spherical-*` family: names, units, help, and the way to a configuration.

Names and defaults come from the fields of `SphericalConfig`, legal values from its own check; this
module adds only what a command line needs. The same names, with underscores, are keyword arguments
of `sglang.Engine`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

from sglang_spherical.config import (
    COLD_BITS,
    HOT_BITS,
    KV_FORMATS,
    TIERS,
    WARM_BITS,
    SphericalConfig,
)
from sglang_spherical.errors import EXIT_CODE, StartupError
from spherical_patches.hooks import require_applied

DEFAULTS = SphericalConfig()


def _choices(values: tuple[object, ...]) -> str:
    return "{" + ",".join(map(str, values)) + "}"


# field of SphericalConfig: type, metavar, help
_HELP: dict[str, tuple[type, str, str]] = {
    "kv_format": (
        str,
        _choices(KV_FORMATS),
        "How the KV cache is held: 'dense' as SGLang does, 'spherical' as radii and angle codes.",
    ),
    "hot_bits": (int, _choices(HOT_BITS), "Code bits per value of tokens being written."),
    "warm_bits": (int, _choices(WARM_BITS), "Average code bits per value of cached prefixes."),
    "cold_bits": (
        int,
        _choices(COLD_BITS),
        "Average code bits per value under eviction pressure; a last, coarser tier comes before "
        "pages are dropped.",
    ),
    "budget": (str, _choices(TIERS), "Tier that eligible prefix pages are given at once."),
    "watermark": (
        float,
        "FRACTION",
        "Used fraction of KV memory, from 0 to 1, below which nothing is re-tiered.",
    ),
    "high_watermark": (
        float,
        "FRACTION",
        "Used fraction of KV memory above which cached prefixes are lowered beyond "
        "--spherical-budget behind forward passes, so that less is left to do when memory is "
        "short; 1 never does.",
    ),
    "settle_pages": (
        int,
        "PAGES",
        "Most pages that are re-encoded for new prefixes between two forward passes; without it "
        "160 MiB of hot pages, about a millisecond's work of an H200.",
    ),
    "frames": (
        str,
        "FILE",
        "Calibration file with this model's frames; without it they are calibrated online.",
    ),
    "recent_tokens": (int, "TOKENS", "Newest tokens of each request that stay hot."),
    "kv_bytes": (
        int,
        "BYTES",
        "Memory of the KV pool in bytes on each rank; without it the pool is sized as SGLang does.",
    ),
}

FIELDS = tuple(field.name for field in dataclasses.fields(SphericalConfig))


def keyword(field: str) -> str:
    """`warm_bits` -> `spherical_warm_bits`: the name in `Engine(...)` and in a namespace."""
    return field if field == "kv_format" else f"spherical_{field}"


def option(field: str) -> str:
    """`warm_bits` -> `--spherical-warm-bits`."""
    return "--" + keyword(field).replace("_", "-")


# _StoreAction, because SGLang's `--config FILE.yaml` accepts no other kind.
class _SphericalAction(argparse._StoreAction):
    """Stores one flag. A wrong value ends in one line, without argparse's page of usage."""

    def __init__(self, *args: Any, convert: type, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.convert = convert

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            value = self.convert(values)
            if self.dest == "kv_format" and value != DEFAULTS.kv_format:
                # The hook that acts on this flag may be missing: SGLang only logs a hook that it
                # could not apply, and would go on to serve a dense cache.
                require_applied()
        except StartupError as error:
            parser.exit(EXIT_CODE, f"error: {error}\n")
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[self.convert]
            flag = option(self.dest.removeprefix("spherical_"))
            parser.exit(EXIT_CODE, f"error: {flag} {values}: expected {kind}\n")
        setattr(namespace, self.dest, value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the family to `parser`. Flags not given leave no attribute in the namespace."""
    group = parser.add_argument_group("spherical KV cache")
    for field in FIELDS:
        convert, metavar, text = _HELP[field]
        default = getattr(DEFAULTS, field)
        shown = "" if default is None else f" Default: {default}."
        group.add_argument(
            option(field),
            dest=keyword(field),
            action=_SphericalAction,
            convert=convert,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=text + shown,
        )


def take(arguments: MutableMapping[str, Any]) -> dict[str, Any]:
    """Move the family's keyword arguments out of `arguments`: `{field: value}` of those given."""
    return {f: arguments.pop(keyword(f)) for f in FIELDS if keyword(f) in arguments}


def given(namespace: argparse.Namespace) -> dict[str, Any]:
    """The family's flags on a command line, as keyword arguments of `ServerArgs`."""
    return {keyword(f): getattr(namespace, keyword(f)) for f in FIELDS if keyword(f) in namespace}


def build(values: Mapping[str, Any]) -> SphericalConfig:
    """`{field: value}` -> configuration.

    Raises StartupError for an illegal value, and for a `--spherical-*` value other than its default
    beside `--kv-format dense`, where it would do nothing.
    """
    try:
        config = SphericalConfig(**values)
    except (TypeError, ValueError) as error:
        raise StartupError(str(error)) from error
    if not config.spherical:
        for field in FIELDS:
            if field != "kv_format" and getattr(config, field) != getattr(DEFAULTS, field):
                raise StartupError(
                    f"{option(field)} {getattr(config, field)}: has no effect with --kv-format "
                    "dense: add --kv-format spherical, or leave it out"
                )
    return config
