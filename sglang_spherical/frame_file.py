"""The calibration file: statistics from which the frames of one model are rebuilt.

A safetensors file with, for all layers and KV heads of the whole model,

    centre  float32 [2, layers, kv_heads, d]   mean key, mean value
    spread  float32 [2, layers, kv_heads, d]   rms of keys and values around their page's mean
    gain    float32 [layers, kv_heads, d]      rms of the queries that a KV head serves

and, where gradients were measured too (`evaluation.gradients`),

    distortion  float32 [2, layers, kv_heads, choices]  expected divergence per token, in nats, of
                                                        each pattern of `CHOICES`

and in its metadata the format's version, the identity of the model, the page size, the names of the
patterns that distortions are of, a checksum.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_spherical.errors import StartupError
from spherical_kernels.codec.patterns import FrameKind, Pattern

FORMAT = "sglang-spherical-frames"
VERSION = "2"
SAMPLE_VALUES = 512
"""Values of each of the first layer's tensors that go into a model's identity."""


def _patterns(*bits: tuple[int, ...]) -> tuple[Pattern, ...]:
    return tuple(Pattern(FrameKind.CALIBRATED, its) for its in bits)


CHOICES = (
    _patterns((8, 6, 6, 4), (6, 4, 4, 2), (4, 4, 2, 2), (4, 2, 2, 2), (4, 2, 1, 1)),
    _patterns((6, 6, 6, 6), (4, 4, 4, 4), (4, 4, 2, 2), (4, 2, 2, 2), (2, 2, 2, 2)),
)
"""Patterns of keys and of values that a (layer, KV head) may choose among, in the file's order.

Values may not do without a band, nor keys have 2 bits in all: errors that are alike from token to
token add up, and distortions take them as independent (docs/format.md)."""

_TENSORS = ("centre", "spread", "gain", "distortion")
_CHOICE_NAMES = json.dumps([[pattern.name for pattern in side] for side in CHOICES])
_FIRST_LAYER = re.compile(r"\D*\.0\..*weight$")
_REMEDY = (
    "make it with `python -m sglang_spherical calibrate --model DIR --out FILE`, or leave the file "
    "out to calibrate online"
)


@dataclass(frozen=True)
class FrameStatistics:
    """What a calibration file holds, or the part of it that a rank needs; shapes as in the file.

    distortion  None where no gradients were measured: all heads of a level then have one pattern
    """

    centre: torch.Tensor
    spread: torch.Tensor
    gain: torch.Tensor
    page_size: int
    distortion: torch.Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.gain.shape[1]

    def part(self, layers: slice, heads: slice) -> FrameStatistics:
        """The layers and KV heads of one rank."""
        return FrameStatistics(
            self.centre[:, layers, heads],
            self.spread[:, layers, heads],
            self.gain[layers, heads],
            self.page_size,
            None if self.distortion is None else self.distortion[:, layers, heads],
        )


def rank_heads(total: int, rank: int, ranks: int) -> slice:
    """KV heads of a tensor-parallel rank: equal runs, or one each, shared by several ranks."""
    if ranks >= total:
        head = rank // (ranks // total)
        return slice(head, head + 1)
    per_rank = total // ranks
    return slice(rank * per_rank, (rank + 1) * per_rank)


def local_model(path: str, revision: str | None = None) -> Path:
    """The directory of a served model: `path` itself, or the local copy of that hub repository."""
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return Path(path)  # `model_identity` says that it has no config.json


def model_identity(model: Path) -> dict[str, Any]:
    """What tells a model from others: shape, rope, and a sample of its first layer's weights.

    Raises StartupError when the directory has no readable config.json.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise StartupError(
            f"model {model}: calibrated frames are bound to a model directory with a config.json, "
            "and there is none that can be read"
        ) from None
    architectures = config.get("architectures")
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "architectures": architectures,
        "layers": config.get("num_hidden_layers"),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config.get("hidden_size", 0) // (heads or 1),
        "hidden_size": config.get("hidden_size"),
        "vocab_size": config.get("vocab_size"),
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta"),
        "rope_type": rope.get("rope_type") or rope.get("type") or "default",
        "weights": _weights_sample(model),
    }


def _weights_sample(model: Path) -> str:
    """A hash of the first values of the first layer's tensors, so that a fine-tune differs.

    Values are taken as bfloat16: a checkpoint and its float32 copy are the same model. Empty when
    the weights are not in safetensors files.
    """
    from safetensors import safe_open

    digest = hashlib.sha256()
    samples: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        # Tensors of slices are made on the default device, which need not be where hashes are.
        with safe_open(path, "pt") as weights, torch.device("cpu"):
            for name in filter(_FIRST_LAYER.match, weights.keys()):
                values = weights.get_slice(name)
                rows = -(-SAMPLE_VALUES // max(1, math.prod(values.get_shape()[1:])))
                samples[name] = values[:rows].flatten()[:SAMPLE_VALUES]
    for name in sorted(samples):
        digest.update(name.encode())
        digest.update(samples[name].to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if samples else ""


def save(path: Path, statistics: FrameStatistics, identity: dict[str, Any]) -> None:
    """Writes a calibration file of the model `identity`; statistics of all its layers and heads."""
    from safetensors.torch import save as serialise

    held = {name: getattr(statistics, name) for name in _TENSORS}
    tensors = {name: x.float().cpu().contiguous() for name, x in held.items() if x is not None}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": json.dumps(identity, sort_keys=True),
        "page_size": str(statistics.page_size),
        "checksum": _checksum(tensors),
    }
    if "distortion" in tensors:
        metadata["patterns"] = _CHOICE_NAMES
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(serialise(tensors, metadata))
    os.replace(partial, path)


def load(path: Path, identity: dict[str, Any]) -> FrameStatistics:
    """Reads a calibration file of the model `identity`.

    Raises StartupError, naming the file and the remedy, when it is missing, cut short or damaged,
    of another version, made for another model, or its distortions are of other patterns.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise StartupError(f"frames file {path}: no such file: {_REMEDY}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError):
        raise StartupError(
            f"frames file {path}: cut short, or no safetensors file: {_REMEDY}"
        ) from None
    _check(path, metadata, tensors, identity)
    return FrameStatistics(page_size=int(metadata["page_size"]), **tensors)


def _check(
    path: Path,
    metadata: dict[str, str],
    tensors: dict[str, torch.Tensor],
    identity: dict[str, Any],
) -> None:
    if metadata.get("format") != FORMAT:
        raise StartupError(f"frames file {path}: holds no frames: {_REMEDY}")
    if metadata.get("version") != VERSION:
        raise StartupError(
            f"frames file {path}: version {metadata.get('version')} of the format, this release "
            f"reads version {VERSION}: {_REMEDY}"
        )
    if _checksum(tensors) != metadata.get("checksum"):
        raise StartupError(f"frames file {path}: damaged, its checksum does not match: {_REMEDY}")
    made_for = json.loads(metadata["model"])
    for name, value in identity.items():
        if made_for.get(name) != value:
            raise StartupError(
                f"frames file {path}: made for another model, with {name} {made_for.get(name)} "
                f"where this one has {value}: {_REMEDY}"
            )
    found = metadata.get("patterns")
    if "distortion" in tensors and found != _CHOICE_NAMES:
        raise StartupError(
            f"frames file {path}: its distortions are of the patterns {found}, this release "
            f"chooses among {_CHOICE_NAMES}: {_REMEDY}"
        )


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()[:16]
