"""Decode kernels against copy bandwidth and FlashInfer, on one GPU, in one process.

usage: PYTHONPATH=kernels python benchmarks/run.py [--shapes NAME ...] [--tiers NAME ...]
       [--peers NAME ...] [--sweep] [--json OUT]

Nothing is timed before it agrees with the reference in plain PyTorch. Every time is the median over
replays of a CUDA graph with the L2 cache overwritten in between, and contains all that a layer
costs: queries into the frames, the pages, the merge. FlashInfer is timed in the same way when it is
installed: dense bf16 and fp8 pages of 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from spherical_kernels.codec.frames import calibrated_frame, signed_hadamard
from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import SCALES, SliceLayout, slice_layout
from spherical_kernels.decode.launch import (
    FRAMES,
    DecodeFrames,
    DecodePlan,
    EntryGroup,
    Tuning,
    plan_decode,
    run_decode,
    tuning_for,
)
from spherical_kernels.decode.reference import (
    AttentionState,
    CodedSide,
    attend_entries,
    empty_state,
)
from spherical_kernels.testing import assert_close

PAGE = 64
PEERS = {"flashinfer_bf16_us": torch.bfloat16, "flashinfer_fp8_us": torch.float8_e4m3fn}
TIERS = {"hot": (0, 0), "warm": (2, 3), "cold": (5, 6)}  # patterns of keys and values
MAX_ERROR, RMS_ERROR = 4e-3, 1e-3  # of the output, over its rms


@dataclass(frozen=True)
class Shape:
    """Requests of equal length; `group` query heads per KV head."""

    batch: int
    context: int
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128

    @property
    def rows(self) -> int:
        return self.batch * self.kv_heads

    @property
    def dense_elements(self) -> int:
        """Keys and values."""
        return 2 * self.rows * self.context * self.head_dim


SHAPES = {
    "16x32k": (Shape(16, 32768), ("warm", "hot", "cold", "mixed")),
    "1x8k": (Shape(1, 8192), ("warm",)),
    "1x32k": (Shape(1, 32768), ("warm",)),
    "1x130k": (Shape(1, 131072), ("warm",)),
    "64x2k": (Shape(64, 2048), ("warm",)),
    "256x1k": (Shape(256, 1024), ("warm",)),
    "d64": (Shape(32, 32768, 8, 3, 64), ("warm", "hot", "cold")),
    "group8": (Shape(16, 32768, 8, 8), ("warm",)),
    "d256": (Shape(16, 16384, 8, 4, 256), ("warm",)),
}


class Batch:
    """Random pages on the GPU: the slices of a page adjacent, the pages in random order."""

    def __init__(self, shape: Shape, tier: str) -> None:
        self.shape, self.tier = shape, tier
        torch.manual_seed(shape.context + shape.head_dim)
        d, heads = shape.head_dim, shape.kv_heads
        self.q = torch.randn(shape.batch, heads * shape.group, d, device="cuda").bfloat16()
        gain, spread = torch.randn(2, heads, d).exp().unbind()
        duals = torch.stack(
            [signed_hadamard(d).expand(heads, d, d), calibrated_frame(gain, spread)[1]]
        )
        centre = torch.randn(2, heads, d, device="cuda")
        self.frames = DecodeFrames(duals.cuda(), duals.cuda(), centre[0], centre[1])
        self.scale = 0.5 / math.sqrt(d)
        pages = -(-shape.context // PAGE)
        # mixed: the first and the last four pages of a request are hot
        counts = {tier: pages} if tier != "mixed" else {"warm": pages - 5, "hot": 5}
        self.groups: list[EntryGroup] = []
        self.entries: list[torch.Tensor] = []
        sizes, total = [], 0
        for name, count in counts.items():
            sides = [slice_layout(PATTERNS[i], PAGE, d) for i in TIERS[name]]
            row_of = torch.arange(shape.rows, device="cuda").repeat_interleave(count)
            valid = torch.full((len(row_of),), PAGE, device="cuda")
            self.groups.append(EntryGroup(sides[0], sides[1], row_of, valid))
            stride = sum(side.size_bytes for side in sides)
            place = total + torch.randperm(len(row_of), device="cuda") * stride
            self.entries.append(torch.stack([place, place + sides[0].size_bytes], 1))
            sizes.append(len(row_of) * stride)
            total += sizes[-1]
        self.arena = torch.randint(0, 256, (total,), dtype=torch.uint8, device="cuda")
        for group, places in zip(self.groups, self.entries):
            for layout, column in zip((group.keys, group.values), places.unbind(1)):
                self._write_radii(layout, column)
        self.bytes = total + sum(places.numel() * 8 for places in self.entries)

    def _write_radii(self, layout: SliceLayout, places: torch.Tensor) -> None:
        """Radii that make values of about 1, and the header's scales."""
        size, top = layout.head_dim**-0.25, max(layout.pattern.bits)
        step = torch.rand(len(places), PAGE, device="cuda") * 3 * 2.0**-top + 2.0**-top
        if layout.calibrated:
            scales = torch.rand(len(places), SCALES, device="cuda") * 0.5 + 0.5
            scales *= torch.tensor(
                [2.0 ** (1 - b) for b in layout.pattern.bits] + [0.01] * (SCALES - 4)
            ).cuda()
            self._put(places + layout.scales_offset_bytes, scales.half())
            codes = torch.randint(150, 241, (len(places), PAGE * layout.bands), device="cuda")
            self._put(places + layout.radii_offset_bytes, codes.to(torch.uint8))
        else:
            self._put(places + layout.radii_offset_bytes, (step * size).half())

    def _put(self, places: torch.Tensor, rows: torch.Tensor) -> None:
        rows = rows.view(torch.uint8).view(torch.int64)
        words = torch.arange(rows.shape[1], device="cuda")
        self.arena.view(torch.int64)[(places // 8).unsqueeze(1) + words] = rows

    def plan(self, tuning: Tuning) -> DecodePlan:
        return plan_decode(self.groups, self.shape.rows, tuning)

    def run(self, plan: DecodePlan) -> tuple[torch.Tensor, torch.Tensor]:
        return run_decode(plan, self.q, self.arena, self.entries, self.frames, self.scale)

    def expected(self, requests: list[int]) -> AttentionState:
        """The reference's attention of some requests."""
        shape, heads = self.shape, self.shape.kv_heads
        q = self.q[requests].float().view(-1, shape.group, shape.head_dim) * self.scale
        state = empty_state(q)
        for group, places in zip(self.groups, self.entries):
            frame = FRAMES.index(group.keys.pattern.frame)
            wanted = torch.full((shape.rows,), -1, device="cuda")
            for i, request in enumerate(requests):
                rows = torch.arange(heads, device="cuda")
                wanted[request * heads + rows] = i * heads + rows
            at = (wanted[group.row_of] >= 0).nonzero().squeeze(1)
            for part in at.split(2048):
                sides = []
                for layout, duals, centre, column in (
                    (group.keys, self.frames.key_duals, self.frames.key_centre, 0),
                    (group.values, self.frames.value_duals, self.frames.value_centre, 1),
                ):
                    offsets = torch.arange(layout.size_bytes, device="cuda")
                    slices = self.arena[places[part, column].unsqueeze(1) + offsets]
                    sides.append(CodedSide(layout, slices, duals[frame], centre))
                row_of, valid = wanted[group.row_of[part]], group.valid[part]
                state = state.merge(attend_entries(q, sides[0], sides[1], row_of, valid))
        return state

    def check(self, plan: DecodePlan) -> tuple[float, float]:
        """Largest and rms error of a float32 output over its rms; raises where they are large."""
        q = self.q.float()
        out, lse = run_decode(plan, q, self.arena, self.entries, self.frames, self.scale)
        requests = sorted({0, self.shape.batch // 2, self.shape.batch - 1})
        expected = self.expected(requests)
        wanted = expected.out.view(len(requests), -1, self.shape.head_dim)
        size = float(wanted.square().mean().sqrt())
        error = (out[requests] - wanted) / size
        bounds = {"max_error": MAX_ERROR, "rms_error": RMS_ERROR}
        assert_close(out[requests] / size, wanted / size, **bounds, name="out")
        wanted_lse = expected.lse.view(len(requests), -1)
        assert_close(lse[requests], wanted_lse, max_error=2e-3, rms_error=1e-3, name="lse")
        return float(error.abs().max()), float(error.square().mean().sqrt())


def graph_us(function: Callable[[], object]) -> float:
    """Median microseconds of a replay of `function`'s CUDA graph, the L2 cache cold."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return triton.testing.do_bench(graph.replay, warmup=10, rep=60, return_mode="median") * 1e3


def copy_gb_s() -> float:
    """Bytes read and written per second by a large device-to-device copy, in GB/s."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(
        lambda: target.copy_(source), warmup=30, rep=150, return_mode="median"
    )
    return 2 * source.numel() * 4 / ms / 1e6


def flashinfer_us(shape: Shape, dtype: torch.dtype) -> float | None:
    """FlashInfer's paged batch decode on dense random pages; None where it is not installed."""
    try:
        import flashinfer
    except ImportError:
        return None
    pages = -(-shape.context // PAGE)
    cache = torch.randn(
        shape.batch * pages,
        2,
        PAGE,
        shape.kv_heads,
        shape.head_dim,
        device="cuda",
        dtype=torch.bfloat16,
    ).to(dtype)
    order = torch.randperm(shape.batch * pages, device="cuda").int()
    starts = torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32) * pages
    last = torch.full(
        (shape.batch,), (shape.context - 1) % PAGE + 1, device="cuda", dtype=torch.int32
    )
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    heads = shape.kv_heads * shape.group
    wrapper.plan(
        starts, order, last, heads, shape.kv_heads, shape.head_dim, PAGE,
        q_data_type=torch.bfloat16, kv_data_type=dtype,
    )  # fmt: skip
    q = torch.randn(shape.batch, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    return graph_us(lambda: wrapper.run(q, cache))


def sweep(batch: Batch, base: Tuning, copy: float) -> list[dict[str, Any]]:
    """Times of many tunings."""
    found = []
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for stages, registers in ((4, None), (6, None), (8, None), (10, None), (6, 224)):
        for per_sm in (4, 5, 8, 16):
            tuning = Tuning(sms * per_sm, stages, base.warps, registers)
            try:
                plan = batch.plan(tuning)
                us = graph_us(lambda plan=plan: batch.run(plan))
            except triton.runtime.errors.OutOfResources:
                break
            fraction = batch.bytes / us / 1e3 / copy
            found.append({"us": us, "per_sm": per_sm, "fraction": fraction, **asdict(tuning)})
    found.sort(key=lambda row: row["us"])
    for row in found[:4] + found[-1:]:
        print(
            f"    {row['us']:7.1f} us {row['fraction']:.3f} stages {row['stages']} "
            f"per_sm {row['per_sm']} registers {row['registers']}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tiers", nargs="+", default=["hot", "warm", "cold", "mixed"])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    copy = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s", flush=True)
    rows, sweeps = [], {}
    for name in args.shapes:
        shape, tiers = SHAPES[name]
        peers = {key: PEERS[key] for key in args.peers}
        dense = {}
        for key, dtype in peers.items():
            try:
                dense[key] = flashinfer_us(shape, dtype)
            except Exception as error:
                print(f"{name} {key}: {type(error).__name__} {str(error)[:200]}")
                dense[key] = None
        for tier in (tier for tier in tiers if tier in args.tiers):
            try:
                row = measure(name, shape, tier, copy, dense, sweeps if args.sweep else None)
            except Exception as error:
                print(f"{name} {tier}: {type(error).__name__} {str(error)[:600]}", flush=True)
                continue
            rows.append(row)
        save(args.json, copy, rows, sweeps)


def measure(
    name: str,
    shape: Shape,
    tier: str,
    copy: float,
    dense: dict[str, float | None],
    sweeps: dict[str, list[dict[str, Any]]] | None,
) -> dict[str, object]:
    """Checks, then times one shape at one tier."""
    batch = Batch(shape, tier)
    tuning = tuning_for(batch.groups[0].keys)
    plan = batch.plan(tuning)
    max_error, rms_error = batch.check(plan)
    if sweeps is not None:
        sweeps[f"{name} {tier}"] = sweep(batch, tuning, copy)
    if sweeps is not None:
        best = sweeps[f"{name} {tier}"][0]
        tuning = Tuning(*(best[key] for key in ("items", "stages", "warps", "registers")))
        plan = batch.plan(tuning)
    us = graph_us(lambda: batch.run(plan))
    fraction = batch.bytes / us / 1e3 / copy
    ratios = " ".join(f"{key[11:-3]} {value / us:.2f}x" for key, value in dense.items() if value)
    print(
        f"{name} {tier}: {us:.1f} us, {fraction:.3f} of copy, {ratios}, error max {max_error:.4f} "
        f"rms {rms_error:.5f}",
        flush=True,
    )
    return {
        "kernel": "decode", "shape": asdict(shape), "tier": tier, "ours_us": us,
        "bytes": batch.bytes, "fraction_of_copy": fraction, **dense,
        "max_error": max_error, "rms_error": rms_error, "tuning": asdict(tuning),
    }  # fmt: skip


def save(path: Path | None, copy: float, rows: list[object], sweeps: dict[str, object]) -> None:
    if path is None:
        return
    shown = [path.name if argument == str(path) else argument for argument in sys.argv[1:]]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["triton"] = triton.__version__
    if "flashinfer" in sys.modules:
        versions["flashinfer"] = sys.modules["flashinfer"].__version__
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
