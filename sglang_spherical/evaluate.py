"""Perplexity and divergence of a model whose attention reads prefixes from codes, by tier.

Windows of 2,048 tokens under teacher forcing: queries read the page they are in, and the first one,
at the hot tier, and everything between at the tier measured. Codes come from the server's encoder,
reached as the server reaches them: hot when written, and every tier named from the one before it.
Frames, and what heads choose their patterns by, come from a file, or are learnt as a server learns
them, from the window after the last one scored.

Comparators (--compare) go through the same windows. They read the page of the query and the first
one exactly, and learn scales and codebooks from the same unscored window.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_spherical.config import PAGE_SIZES, TIERS

if TYPE_CHECKING:
    import torch

    from sglang_spherical.evaluation.comparators import Comparator
    from sglang_spherical.evaluation.runner import Evaluation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--text", type=Path, required=True, help="text to score, in UTF-8")
    parser.add_argument(
        "--tiers",
        default="hot,warm,cold",
        help=f"tiers to measure, by commas, of {', '.join(TIERS)}; each is coded from the codes of "
        "the one before it (default: %(default)s)",
    )
    parser.add_argument(
        "--windows", type=int, help="windows to score (default: as many as the text fills)"
    )
    parser.add_argument(
        "--skip-windows", type=int, default=0, help="windows to leave out first (default: 0)"
    )
    parser.add_argument(
        "--page-size", type=int, choices=PAGE_SIZES, default=64, help="tokens (default: 64)"
    )
    parser.add_argument(
        "--frames", type=Path, help="calibration file (default: calibrate on an unscored window)"
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
    parser.add_argument(
        "--compare",
        help="other codecs to measure, by commas, or `all`: fp8, fp8-scaled, kivi4, kivi2, lloyd4, "
        "lloyd3, codebook16x64 and 16x16, 16x8, 32x64, 32x16, 32x8 (default: none)",
    )
    parser.add_argument(
        "--alike",
        action="store_true",
        help="heads of a page are coded alike, by its level's bits",
    )
    parser.add_argument("--json", type=Path, required=True, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="PNG file: divergence against bits per value")


def run(args: argparse.Namespace) -> int:
    """Scores the text, writing the report after every window. Raises ValueError on bad input."""
    from sglang_spherical.evaluation import inputs

    with inputs.usable_device(args.device):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from sglang_spherical.evaluation import report

    tiers, compared = _tier_names(args.tiers), _comparators(args.compare)
    windows, spare = _choose(args)
    evaluation = _prepare(args, tiers, compared, spare)
    summary: dict[str, Any] = _header(args)
    try:
        for _ in _score(evaluation, windows):
            summary |= {
                "windows": evaluation.windows,
                "tokens": evaluation.windows * windows.shape[1],
                "runs": evaluation.summaries(),
            }
            report.write_json(args.json, summary)
    finally:  # an interrupted evaluation still shows the windows that are done
        if evaluation.windows:
            print(report.table(summary["runs"]))
    if args.plot is not None:
        report.plot(args.plot, summary)
    return 0


def _tier_names(listed: str) -> list[str]:
    tiers = [tier.strip() for tier in listed.split(",")]
    for tier in tiers:
        if tier not in TIERS:
            raise ValueError(f"--tiers {listed}: expected some of {','.join(TIERS)}, got {tier!r}")
    return list(dict.fromkeys(tiers))


def _comparators(listed: str | None) -> list[Comparator]:
    from sglang_spherical.evaluation import comparators

    return [] if listed is None else comparators.make(listed)


def _choose(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows to score, and the one after them to learn from, where anything has to."""
    from sglang_spherical.evaluation import inputs

    inputs.require_model(args.model)
    if args.skip_windows < 0 or (args.windows is not None and args.windows < 1):
        raise ValueError("--windows, --skip-windows: expected at least 1 and at least 0")
    every = inputs.load_windows(args.model, args.text)
    spare = 0 if args.frames is not None and args.compare is None else 1
    most = len(every) - args.skip_windows - spare
    wanted = most if args.windows is None else args.windows
    if most < 1 or wanted > most:
        needed = max(wanted, 1) + args.skip_windows + spare
        reason = ", one to calibrate on" if spare else ""
        remedy = " or --frames" if spare and args.compare is None else ""
        raise ValueError(
            f"--text {args.text}: {len(every)} windows of {every.shape[1]} tokens, {needed} are "
            f"needed{reason}: use a longer text, fewer windows{remedy}"
        )
    end = args.skip_windows + wanted
    return every[args.skip_windows : end], every[end : end + spare]


def _prepare(
    args: argparse.Namespace, tiers: list[str], compared: list[Comparator], spare: torch.Tensor
) -> Evaluation:
    from sglang_spherical import frame_file
    from sglang_spherical.config import SphericalConfig
    from sglang_spherical.evaluation import inputs, runner
    from sglang_spherical.pool.choice import choose_kinds
    from sglang_spherical.pool.estimate import expected_distortion
    from sglang_spherical.pool.frames import Frames
    from sglang_spherical.pool.layout import PageLayout, default_levels

    known = None
    if args.frames is not None:
        known = frame_file.load(args.frames, frame_file.model_identity(args.model))
    model = inputs.load_model(args.model, args.dtype, args.device)
    layers, kv_heads, head_dim = inputs.cache_shape(model)
    levels = default_levels(SphericalConfig())
    layout = PageLayout.fit(args.page_size, head_dim, layers, kv_heads, levels)
    frames = Frames(layers, kv_heads, head_dim, args.page_size, args.device)
    if known is not None:
        frames.load(known.centre, known.gain, known.spread)
        distortion = known.distortion
    else:
        runner.learn_frames(model, frames, spare)
        distortion = expected_distortion(frames)
    if distortion is not None and not args.alike:
        layout = layout.with_kinds(choose_kinds(layout, distortion, finer=known is not None))
    if compared:
        runner.learn_comparators(model, compared, spare)
    return runner.Evaluation(model, layout, frames, tiers, compared)


def _score(evaluation: Evaluation, windows: torch.Tensor) -> Iterator[None]:
    """Scores one window after another, showing progress by run."""
    from tqdm import tqdm

    with tqdm(total=len(windows) * (1 + len(evaluation.coded)), unit="run") as bar:
        for ids in windows:
            evaluation.score(ids, bar.update)
            yield


def _header(args: argparse.Namespace) -> dict[str, Any]:
    """What was run, on what. Folders are left out: reports are meant to be shared."""
    words: list[tuple[str, ...]] = []
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append((flag,))
        elif value is not None and value is not False:
            words.append((flag, value.name if isinstance(value, Path) else str(value)))
    command = shlex.join(["python", "-m", "sglang_spherical", "evaluate", *chain(*words)])
    packages = ("sglang-spherical", "torch", "transformers")
    return {
        "model": args.model.resolve().name,
        "text": args.text.name,
        "windows": 0,
        "tokens": 0,
        "command": command,
        "versions": {name: version(name) for name in packages},
        "runs": [],
    }
