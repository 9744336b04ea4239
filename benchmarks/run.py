"""Speed of the decode kernel on one GPU: correctness first, then time, then JSON.

usage: PYTHONPATH=kernels python benchmarks/run.py [--shapes NAME ...] [--tiers NAME ...]
       [--peers [NAME ...]] [--sweep] [--json OUT]

Nothing is timed before it agrees with the reference in plain PyTorch. Every time is the median over
replays of a CUDA graph with the L2 cache overwritten in between, and contains all that a layer
costs: queries into the frames, the pages, the merge. Peers are timed in the same way where they are
installed: FlashInfer on dense bf16 and fp8 pages of 64 tokens, SGLang's Triton kernel on bf16.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from decode_cases import SHAPES, Batch, Shape
from decode_peers import PEERS
from timing import copy_gb_s, graph_us, kernel_us

from spherical_kernels.decode.launch import Tuning, tuning_for

TIERS = ("hot", "warm", "cold", "mixed", "random", "heads")
Row = dict[str, Any]


def tunings(base: Tuning) -> list[Tuning]:
    """Those that a sweep tries."""
    found = []
    for stages in (3, 4, 6):
        for programs, registers in ((8, None), (8, 248), (10, 200), (12, 168), (4, None)):
            found.append(Tuning(programs, stages, base.warps, registers))
    return found


def compile_one(name: str, tier: str, tuning: Tuning) -> None:
    """Leaves a tuning's kernel in Triton's cache. In a process of its own."""
    try:
        Batch(SHAPES[name][0], tier).plan(tuning).run()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"    {tuning}: {type(error).__name__} {str(error)[:80]}", flush=True)


def sweep(name: str, batch: Batch, tier: str, copy: float) -> list[Row]:
    """Times of many tunings."""
    base = tuning_for(batch.kinds, batch.shape.group)
    tried = tunings(base)
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for waiting in [pool.submit(compile_one, name, tier, tuning) for tuning in tried]:
            waiting.result()
    found = []
    for tuning in tried:
        try:
            us = graph_us(batch.plan(tuning).run)
        except triton.runtime.errors.OutOfResources:
            continue
        found.append({"us": us, "fraction": batch.bytes / us / 1e3 / copy, **asdict(tuning)})
    found.sort(key=lambda row: row["us"])
    for row in found[:4] + found[-1:]:
        print(f"    {row}")
    return found


def measure(
    name: str, shape: Shape, tier: str, copy: float, dense: Row, sweeps: dict[str, Any] | None
) -> Row:
    """Checks, then times one shape at one tier."""
    batch = Batch(shape, tier)
    tuning = tuning_for(batch.kinds, shape.group)
    max_error, rms_error = batch.plan(tuning).check()
    if sweeps is not None:
        sweeps[f"{name} {tier}"] = sweep(name, batch, tier, copy)
    decode = batch.plan(tuning)
    us, kernels = graph_us(decode.run), kernel_us(decode.run)
    fraction = batch.bytes / us / 1e3 / copy
    ratios = " ".join(f"{key[:-3]} {value / us:.2f}x" for key, value in dense.items() if value)
    print(
        f"{name} {tier}: {us:.1f} us, {fraction:.3f} of copy, {ratios}, error max {max_error:.5f} "
        f"rms {rms_error:.6f}, {kernels}",
        flush=True,
    )
    return {
        "kernel": "decode", "shape": asdict(shape), "tier": tier, "ours_us": us,
        "bytes": batch.bytes, "fraction_of_copy": fraction, **dense,
        "max_error": max_error, "rms_error": rms_error, "tuning": asdict(tuning),
        "kernels_us": kernels,
    }  # fmt: skip


def peer_us(name: str, shape: Shape, peers: list[str]) -> Row:
    """Times of the peers on a shape, None where one is missing or fails."""
    found: Row = dict.fromkeys(PEERS)
    for key in peers:
        try:
            run = PEERS[key](shape)
            found[key] = run and graph_us(run)
        except Exception as error:
            print(f"{name} {key}: {type(error).__name__} {str(error)[:200]}", flush=True)
    torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    copy = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s", flush=True)
    rows: list[Row] = []
    sweeps: dict[str, Any] = {}
    for name in args.shapes:
        shape, tiers = SHAPES[name]
        dense = peer_us(name, shape, args.peers)
        for tier in (tier for tier in tiers if tier in args.tiers):
            try:
                row = measure(name, shape, tier, copy, dense, sweeps if args.sweep else None)
            except Exception as error:
                print(f"{name} {tier}: {type(error).__name__} {str(error)[:600]}", flush=True)
                continue
            rows.append(row)
            torch.cuda.empty_cache()
        save(args.json, copy, rows, sweeps)


def save(path: Path | None, copy: float, rows: list[Row], sweeps: dict[str, Any]) -> None:
    if path is None:
        return
    shown = [path.name if argument == str(path) else argument for argument in sys.argv[1:]]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["triton"] = triton.__version__
    for name in ("flashinfer", "sglang"):
        if name in sys.modules:
            versions[name] = getattr(sys.modules[name], "__version__", "unknown")
    found = {
        "device": torch.cuda.get_device_name(),
        "copy_gb_s": copy,
        "command": "PYTHONPATH=kernels python benchmarks/run.py " + shlex.join(shown),
        "versions": versions,
        "rows": rows,
    }
    path.write_text(json.dumps(found | ({"sweeps": sweeps} if sweeps else {}), indent=1) + "\n")


if __name__ == "__main__":
    main()
