"""The encoder of new tokens and the re-encoding of pages, against copy bandwidth, on one GPU.

usage: PYTHONPATH=.:kernels python benchmarks/encode.py [--tokens N ...] [--pages N] [--sweep]
       [--json OUT]

The shape is Llama-3.1-8B's: 32 layers, 8 KV heads of dimension 128, pages of 64 tokens. Nothing is
timed before it agrees with the codec in plain PyTorch. Encoding is timed as 32 launches in a CUDA
graph, one per layer, with and without a flush of the L2 cache before each; re-encoding of all pages
between two events, the arena restored and the cache flushed before every repetition.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from timing import copy_gb_s, launch_us

from sglang_spherical.pool.arena import Arena
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import Level, PageLayout
from sglang_spherical.pool.retier import lower_pages
from spherical_kernels.codec.frames import calibrated_frame
from spherical_kernels.codec.pages import code_directions, decode_slices, read_radii
from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import read_codes
from spherical_kernels.encode.launch import NewTokens, encode_tokens, rotation_signs
from spherical_kernels.encode.launch import Tuning as EncodeTuning
from spherical_kernels.retier.launch import TUNING, Tuning, Turns, reencode_pages

PAGE, LAYERS, HEADS, D = 64, 32, 8, 128
LEVELS = (
    Level("hot", PATTERNS[0], PATTERNS[0]),
    Level("warm", PATTERNS[2], PATTERNS[3]),
    Level("cold", PATTERNS[5], PATTERNS[6]),
)
CHECKED_PAGES = 4
REPETITIONS = 7


class Cache:
    """An arena of hot pages in random blocks, frames, and random tokens for them."""

    def __init__(self, pages: int) -> None:
        torch.manual_seed(0)
        self.layout = PageLayout.fit(PAGE, D, LAYERS, HEADS, LEVELS)
        blocks = pages * self.layout.hot_blocks
        self.arena = Arena(self.layout, blocks, 1 + pages, "cuda")
        self.pages = 1 + torch.randperm(pages, device="cuda")
        order = self.layout.hot_blocks + torch.randperm(blocks, device="cuda")
        self.arena.place_pages(self.pages, order.view(pages, -1))
        self.frames = Frames(LAYERS, HEADS, D, PAGE, "cuda")
        self.frames.calibrated = True
        self.frames.centre.normal_()
        self.spread = torch.randn(2, LAYERS, HEADS, D, device="cuda").mul(0.5).exp()
        for side in range(2):
            gain = torch.randn(LAYERS * HEADS, D, device="cuda").mul(0.5).exp()
            frame = calibrated_frame(gain, self.spread[side].flatten(0, 1))
            for found, target in zip(frame, (self.frames.matrix, self.frames.dual)):
                target[side] = found.view(LAYERS, HEADS, D, D)
        self.signs = rotation_signs(self.frames.rotation)
        self.turns = Turns.between(self.frames.rotation, self.frames.matrix)

    def tokens(self, n: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, heads, d] bf16, rows of one wider tensor as a projection makes them;
        every run of a page has a mean."""
        x = torch.randn(n, 2, HEADS, D, device="cuda") * self.spread[:, layer]
        mean = torch.randn(-(-n // PAGE), 2, HEADS, D, device="cuda")
        x += mean.repeat_interleave(PAGE, 0)[:n] + self.frames.centre[:, layer]
        k, v = x.bfloat16().unbind(1)
        return k, v

    def encode(
        self,
        loc: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        tuning: EncodeTuning | None = None,
    ) -> None:
        new = NewTokens(
            self.arena.bytes, self.arena.page_blocks, loc, k, v, self.arena.places[0, layer],
            self.frames.centre[:, layer], self.signs, self.layout.block_bytes,
            self.layout.side_layouts(0)[0],
        )  # fmt: skip
        encode_tokens(new, tuning)

    def reencode(self, old: int, pages: torch.Tensor, **options: Any) -> None:
        reencode_pages(
            self.arena.bytes, self.arena.page_blocks, pages, self.arena.moves(old, old + 1),
            self.turns, self.layout.block_bytes, **options,
        )  # fmt: skip


def check_encode(cache: Cache, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Encodes layer 0 and compares; the share of codes that lie on the other side of an edge."""
    cache.encode(loc, k, v, 0)
    layout = cache.layout.side_layouts(0)[0]
    (tile,) = layout.tiles
    _, addresses = cache.arena.locate(loc // PAGE, 0)
    far = []
    for side, x in enumerate((k, v)):
        y = (x.float() - cache.frames.centre[side, 0]) @ cache.frames.rotation.T
        codes, radii = code_directions(y, 8)
        start = addresses[..., side] + tile.offset_bytes + (loc % PAGE * D).unsqueeze(1)
        found = cache.arena.bytes[start.unsqueeze(-1) + torch.arange(D, device="cuda")]
        apart = (found.int() - codes.int()).abs()
        radius = cache.arena.bytes.view(torch.float16)[
            (addresses[..., side] + (loc % PAGE * 2).unsqueeze(1)) // 2
        ]
        ratio = radius.float() / radii.squeeze(-1).half().float() - 1
        if int(apart.max()) > 1 or float(ratio.abs().max()) > 2**-10:
            raise AssertionError(f"codes {int(apart.max())} apart, radii {ratio.abs().max()}")
        far.append((apart > 0).float().mean())
    share = float(torch.stack(far).mean())
    if share > 1e-3:
        raise AssertionError(f"{share:.2e} of the codes differ")
    return share


def measure_encode(cache: Cache, n: int, copy: float, sweep: bool) -> dict[str, Any]:
    """Checks, then times n tokens."""
    places = torch.randperm(len(cache.pages) * PAGE, device="cuda")[:n] + PAGE
    if n >= PAGE:  # a prefill: pages in order, but for their ids
        places = (cache.pages[: n // PAGE].unsqueeze(1) * PAGE).add(
            torch.arange(PAGE, device="cuda")
        )
        places = places.flatten()
    tokens = [cache.tokens(n, layer) for layer in range(LAYERS)]
    far = check_encode(cache, places, *tokens[0])

    def launches(tuning: EncodeTuning | None) -> list[Callable[[], None]]:
        return [
            lambda layer=layer, kv=kv: cache.encode(places, *kv, layer, tuning)
            for layer, kv in enumerate(tokens)
        ]

    moved = n * HEADS * 2 * (2 * D + D + 2)
    row = {
        "kernel": "encode", "tokens": n, "us": launch_us(launches(None), cold=True),
        "us_warm_l2": launch_us(launches(None), cold=False), "bytes": moved,
        "codes_on_an_edge": far,
    }  # fmt: skip
    row["fraction_of_copy"] = moved / row["us"] / 1e3 / copy
    print(
        f"encode {n}: {row['us']:.2f} us cold, {row['us_warm_l2']:.2f} us warm, "
        f"{row['fraction_of_copy']:.3f} of copy, {far:.1e} of the codes on an edge",
        flush=True,
    )
    if sweep:
        row["sweep"] = []
        for rows, warps in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (16, 4)):
            tuning = EncodeTuning(rows, warps)
            us = launch_us(launches(tuning), cold=True)
            row["sweep"].append({**asdict(tuning), "us": us})
            print(f"    rows {rows} warps {warps}: {us:.2f} us", flush=True)
    return row


def check_reencode(cache: Cache, old: int) -> dict[str, float]:
    """Re-encodes a few pages twice, by the kernel and by the pool; the arena stays as it was."""
    pages = cache.pages[:CHECKED_PAGES]
    arena, kept = cache.arena, cache.arena.bytes.clone()
    _, before = arena.locate(pages)
    cache.reencode(old, pages)
    ours = arena.bytes.clone()
    arena.bytes.copy_(kept)
    arena.set_level(pages, old)
    lower_pages(arena, cache.frames, pages, old, old + 1, kernels=False)
    _, after = arena.locate(pages)
    sums = dict.fromkeys(("radii", "codes", "ours", "theirs"), 0.0)
    for side in range(2):
        layouts = [cache.layout.side_layouts(level)[side] for level in (old, old + 1)]
        for layer in (0, LAYERS // 2, LAYERS - 1):
            at = [a[layer, ..., side].flatten().unsqueeze(1) for a in (before, after)]
            offsets = [
                a + torch.arange(layout.size_bytes, device="cuda") for a, layout in zip(at, layouts)
            ]
            centre = cache.frames.centre[side, layer].repeat(CHECKED_PAGES, 1)
            duals = [
                cache.frames.duals(layout.pattern.frame, layer, side).repeat(CHECKED_PAGES, 1, 1)
                for layout in layouts
            ]
            x = decode_slices(layouts[0], kept[offsets[0]], duals[0], centre)
            found, wanted = ours[offsets[1]], arena.bytes[offsets[1]]
            radii = [read_radii(layouts[1], slices) for slices in (found, wanted)]
            same = (radii[0] / radii[1].clamp_min(1e-30) - 1).abs() < 3e-3
            codes = [read_codes(layouts[1], slices) for slices in (found, wanted)]
            sums["radii"] += float((~same).float().mean()) / 6
            apart = (codes[0] != codes[1])[same]
            sums["codes"] += float(apart.float().mean()) / 6
            matrix = cache.frames.matrix[side, layer].repeat(CHECKED_PAGES, 1, 1)
            for name, slices in (("ours", found), ("theirs", wanted)):
                lost = decode_slices(layouts[1], slices, duals[1], centre) - x
                sums[name] += float((lost @ matrix.transpose(-1, -2)).square().sum())
    arena.bytes.copy_(kept)
    arena.set_level(pages, old)
    outcome = {
        "radii_apart": sums["radii"], "codes_apart": sums["codes"],
        "error_energy_ratio": sums["ours"] / sums["theirs"],
    }  # fmt: skip
    if (
        sums["radii"] > 2e-2
        or sums["codes"] > 5e-3
        or abs(sums["ours"] / sums["theirs"] - 1) > 2e-3
    ):
        raise AssertionError(f"level {old}: {outcome}")
    return outcome


def reencode_us(cache: Cache, old: int, kept: torch.Tensor, **options: Any) -> float:
    """Median microseconds for all pages."""
    times = []
    for _ in range(REPETITIONS + 1):
        cache.arena.bytes.copy_(kept)
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        cache.reencode(old, cache.pages, **options)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times[1:])[REPETITIONS // 2]


def measure_reencode(cache: Cache, old: int, copy: float, sweep: bool) -> dict[str, Any]:
    """Checks, then times all pages from one level to the next; leaves them there."""
    agreement = check_reencode(cache, old)
    kept = cache.arena.bytes.clone()
    sizes = [
        side.size_bytes for level in (old, old + 1) for side in cache.layout.side_layouts(level)
    ]
    moved = len(cache.pages) * LAYERS * HEADS * sum(sizes)
    us = reencode_us(cache, old, kept)
    name = f"{LEVELS[old].name} to {LEVELS[old + 1].name}"
    row = {
        "kernel": "retier", "step": name, "pages": len(cache.pages), "us": us, "bytes": moved,
        "fraction_of_copy": moved / us / 1e3 / copy, **agreement, "tuning": asdict(TUNING),
    }  # fmt: skip
    print(f"{name}: {us:.0f} us, {row['fraction_of_copy']:.3f} of copy, {agreement}", flush=True)
    if sweep:
        row["sweep"] = []
        for tuning in (
            Tuning(512, 2, 4), Tuning(1024, 1, 4), Tuning(1024, 3, 4), Tuning(1024, 2, 8),
            Tuning(1024, 2, 4, 168), Tuning(1024, 1, 4, 168), Tuning(2048, 2, 4, 168),
        ):  # fmt: skip
            us = reencode_us(cache, old, kept, tuning=tuning)
            row["sweep"].append({**asdict(tuning), "us": us})
            print(f"    {tuning}: {us:.0f} us", flush=True)
        for mib in (16, 32, 96, 192):
            us = reencode_us(cache, old, kept, scratch_bytes=mib << 20)
            row["sweep"].append({"scratch_mib": mib, "us": us})
            print(f"    scratch {mib} MiB: {us:.0f} us", flush=True)
    cache.arena.bytes.copy_(kept)
    cache.reencode(old, cache.pages)
    cache.arena.set_level(cache.pages, old + 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 64, 256, 8192])
    parser.add_argument("--pages", type=int, default=256)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    copy = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s", flush=True)
    cache = Cache(args.pages)
    rows = [measure_encode(cache, n, copy, args.sweep) for n in args.tokens]
    save(args.json, copy, rows)
    loc = (cache.pages.unsqueeze(1) * PAGE + torch.arange(PAGE, device="cuda")).flatten()
    for layer in range(LAYERS):
        cache.encode(loc, *cache.tokens(len(loc), layer), layer)
    for old in (0, 1):
        rows.append(measure_reencode(cache, old, copy, args.sweep))
        save(args.json, copy, rows)


def save(path: Path | None, copy: float, rows: list[dict[str, Any]]) -> None:
    if path is None:
        return
    shown = [path.name if argument == str(path) else argument for argument in sys.argv[1:]]
    found = {
        "device": torch.cuda.get_device_name(),
        "copy_gb_s": copy,
        "command": "PYTHONPATH=.:kernels python benchmarks/encode.py " + shlex.join(shown),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "rows": rows,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
