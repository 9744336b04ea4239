"""Make the frame file of a model, for `--spherical-frames` and for `evaluate --frames`.

A few windows of text run through the model; the file keeps, per layer and KV head, the mean and the
spread of what is cached and the size of the queries that read it. It is bound to this model.
Without a file a server learns the same from its first prompts, and forgets it at every flush.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sglang_spherical.config import PAGE_SIZES

TEXT = Path(__file__).with_name("calibration.txt")
"""The last pages of Newton's Opticks (1730), in the public domain: about 35 kB."""

WINDOWS = 4


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


def run(args: argparse.Namespace) -> int:
    """Writes the file. Raises ValueError on bad input."""
    from tqdm import tqdm

    from sglang_spherical import frame_file
    from sglang_spherical.evaluation import inputs, runner
    from sglang_spherical.pool.frames import Frames

    inputs.require_model(args.model)
    if args.windows < 1:
        raise ValueError(f"--windows {args.windows}: expected 1 or more")
    identity = frame_file.model_identity(args.model)
    windows = inputs.load_windows(args.model, args.text)[: args.windows]
    model = inputs.load_model(args.model, args.dtype)
    frames = Frames(*inputs.cache_shape(model), args.page_size, "cpu")
    runner.learn_frames(model, frames, tqdm(windows, unit="window"))
    seen = frames.statistics
    statistics = frame_file.FrameStatistics(
        frames.centre, seen.spread(), seen.gain(), args.page_size
    )
    frame_file.save(args.out, statistics, identity)
    print(f"{args.out}: frames of {args.model.resolve().name} from {windows.numel():,} tokens")
    return 0
