"""Make the frame file of a model, for `--spherical-frames` and for `evaluate --frames`.

A few windows of text run through the model; the file keeps, per layer and KV head, the mean and the
spread of what is cached and the size of the queries that read it. It is bound to this model.
Gradients of further windows say what coding each of them in one bit pattern or another would do to
the predictions, by which a server gives heads patterns of their own. They take most of the time.
Without a file a server learns its frames from its first prompts, goes by an estimate in place of
gradients, and forgets both at every flush.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_spherical.config import PAGE_SIZES

if TYPE_CHECKING:
    import torch

    from sglang_spherical.pool.frames import Frames

TEXT = Path(__file__).with_name("calibration.txt")
"""The last pages of Newton's Opticks (1730), in the public domain: about 35 kB."""

WINDOWS = 4
GRADIENT_WINDOWS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument(
        "--text",
        type=Path,
        default=TEXT,
        help="text to learn from, in UTF-8 (default: a passage that comes with the package)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument(
        "--windows",
        type=int,
        default=WINDOWS,
        help="windows of 2,048 tokens to read at most (default: %(default)s)",
    )
    parser.add_argument(
        "--gradient-windows",
        type=int,
        metavar="N",
        help="windows to take gradients of, from the text's end; 0 leaves them out, and a server "
        f"then gives all heads the same patterns (default: {GRADIENT_WINDOWS}, or fewer where the "
        "text has fewer)",
    )
    parser.add_argument(
        "--page-size",
        type=int,
        choices=PAGE_SIZES,
        default=64,
        help="tokens of the pages that spreads are taken in (default: 64)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and activations (default: float32)",
    )
    parser.add_argument(
        "--device", default="cpu", help="that runs the model and the codecs (default: cpu)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the file. Raises ValueError on bad input."""
    from sglang_spherical.evaluation import inputs

    with inputs.usable_device(args.device):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sglang_spherical import frame_file
    from sglang_spherical.evaluation import inputs, runner
    from sglang_spherical.pool.frames import Frames

    windows, pulled = _choose(args)
    identity = frame_file.model_identity(args.model)
    model = inputs.load_model(args.model, args.dtype, args.device)
    frames = Frames(*inputs.cache_shape(model), args.page_size, args.device)
    runner.learn_frames(model, frames, tqdm(windows, unit="window", desc="frames"))
    seen = frames.statistics
    statistics = frame_file.FrameStatistics(
        frames.centre,
        seen.spread(),
        seen.gain(),
        args.page_size,
        _distortion(model, frames, pulled) if len(pulled) else None,
    )
    frame_file.save(args.out, statistics, identity)
    print(
        f"{args.out}: frames of {args.model.resolve().name} from {windows.numel():,} tokens, "
        f"gradients from {pulled.numel():,}"
    )
    return 0


def _choose(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows to learn frames from, the text's first, and to take gradients of, its last: the
    same ones only where there are too few."""
    from sglang_spherical.evaluation import inputs

    inputs.require_model(args.model)
    if args.windows < 1:
        raise ValueError(f"--windows {args.windows}: expected 1 or more")
    asked = args.gradient_windows
    if asked is not None and asked < 0:
        raise ValueError(f"--gradient-windows {asked}: expected 1 or more, or 0 for none")
    every = inputs.load_windows(args.model, args.text)
    if asked is not None and asked > len(every):
        raise ValueError(
            f"--gradient-windows {asked}: {args.text} has {len(every)} windows of "
            f"{every.shape[1]} tokens: use a longer text or fewer windows"
        )
    count = GRADIENT_WINDOWS if asked is None else asked
    return every[: args.windows], every[max(len(every) - count, 0) :]


def _distortion(model: Any, frames: Frames, windows: torch.Tensor) -> torch.Tensor:
    from tqdm import tqdm

    from sglang_spherical.evaluation import gradients

    shown = tqdm(windows, unit="window", desc="gradients")
    return gradients.distortion(model, gradients.Coder(frames), shown)
