"""Extending over a coded prefix against FlashInfer over a dense one, on one GPU, in one process.

usage: PYTHONPATH=kernels python benchmarks/extend.py [--shapes NAME ...] [--sweep] [--json OUT]

Nothing is timed before some of its tokens agree with the reference in plain PyTorch. Every time is
the median over replays of a CUDA graph and contains all that a layer costs. FlashInfer's peer is
its paged prefill (fa2) in bf16 over prefix and new tokens, pages of 64. The prefix is warm but for
its first page, which is hot; all three levels are launched, as a server does that does not know
which are in use. Memory is what a call allocates at most beyond the cache it reads.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from timing import graph_us, kernel_us

from spherical_kernels.codec.frames import LayerFrames, calibrated_frame, signed_hadamard
from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import CENTROID, UNIT, SliceLayout, slice_layout
from spherical_kernels.decode.reference import CodedSide, attend_entries, empty_state
from spherical_kernels.extend.launch import (
    FRAMES,
    HOPPER_TUNING,
    MULTIPROCESSORS,
    ExtendWorkspace,
    Tuning,
    run_extend,
    tuning_for,
)
from spherical_kernels.extend.new_tokens import LOG2_E
from spherical_kernels.extend.tables import ExtendTables, build_tables, locate_entries
from spherical_kernels.testing import assert_close

PAGE = 64
TIERS = (0, 0), (2, 3), (5, 6)  # patterns of keys and values: hot, warm, cold
MAX_ERROR, RMS_ERROR = 4e-3, 1e-3  # of the output, over its rms; operands are rounded to bf16
CHECKED_TOKENS = 3


@dataclass(frozen=True)
class Shape:
    """One request; `group` query heads per KV head."""

    new: int
    prefix: int
    level: int = 1
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128


SHAPES = {
    "16x32k": Shape(16, 32768),
    "64x32k": Shape(64, 32768),
    "256x32k": Shape(256, 32768),
    "256x130k": Shape(256, 131072),
    "8192x32k": Shape(8192, 32768),
    "256x32k-hot": Shape(256, 32768, level=0),
    "256x32k-cold": Shape(256, 32768, level=2),
    "256x32k-d64": Shape(256, 32768, head_dim=64, kv_heads=8, group=3),
}
CANDIDATES = (
    Tuning(tile_rows=64, warps=4, stages=6, programs=2),
    Tuning(tile_rows=64, warps=4, stages=4, programs=2),
    Tuning(tile_rows=64, warps=4, stages=6, programs=3, registers=168),
    Tuning(tile_rows=128, warps=8, stages=6, programs=1),
    Tuning(tile_rows=128, warps=4, stages=6, programs=2),
    HOPPER_TUNING,
    replace(HOPPER_TUNING, stages=3),
    replace(HOPPER_TUNING, stages=5),
)


class Batch:
    """A request over random pages; the slices of a page adjacent, the pages in random order."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        torch.manual_seed(shape.prefix + shape.new)
        d, heads, tokens = shape.head_dim, shape.kv_heads, shape.new
        self.q = torch.randn(tokens, heads * shape.group, d, device="cuda").bfloat16()
        self.k, self.v = torch.randn(2, tokens, heads, d, device="cuda").bfloat16().unbind()
        gain, spread = (torch.randn(2, heads, d) / 2).exp().unbind()
        hot = signed_hadamard(d).expand(heads, d, d)
        duals = torch.stack([hot, calibrated_frame(gain, spread)[1]]).cuda()
        centre = torch.randn(2, heads, d, device="cuda")
        self.frames = LayerFrames.over(duals, duals, centre[0], centre[1])
        self.scale = 0.5 / math.sqrt(d)
        self.kinds = tuple(
            (slice_layout(PATTERNS[k], PAGE, d), slice_layout(PATTERNS[v], PAGE, d))
            for k, v in TIERS
        )
        # kind i at level i
        ends = torch.arange(len(self.kinds) + 1, dtype=torch.int32).unfold(0, 2, 1)
        self.kind_levels = ends.unsqueeze(1).expand(-1, heads, -1).contiguous().cuda()
        pages = -(-shape.prefix // PAGE)
        self.levels = torch.full((pages,), shape.level, dtype=torch.uint8, device="cuda")
        self.levels[:1] = 0
        sizes = torch.tensor([[side.size_bytes for side in pair] for pair in self.kinds])
        self.block_bytes = int(sizes.sum(1)[self.levels.long().cpu()].max()) * heads
        head = torch.arange(heads).view(1, -1, 1)
        offset_of = head * sizes.sum(1).view(-1, 1, 1) + torch.stack(
            [torch.zeros(len(sizes), dtype=torch.int64), sizes[:, 0]], 1
        ).unsqueeze(1)
        places = torch.stack((torch.zeros_like(offset_of), offset_of), -1)
        self.places = places.int().unsqueeze(1).cuda()  # of one layer
        self.page_blocks = torch.randperm(pages, device="cuda").int().unsqueeze(1)
        size = pages * self.block_bytes
        self.arena = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
        self.tables = self.tables_for(CANDIDATES[0])
        self.entries = self.locate()
        for kind, pair in enumerate(self.kinds):
            at = (self.tables.page_levels == kind).nonzero().squeeze(1)
            for side, layout in enumerate(pair):
                self._write_radii(layout, self.entries[:, at, side].flatten())

    def locate(self) -> torch.Tensor:
        (entries,) = locate_entries(self.tables, self.page_blocks, self.places, self.block_bytes)
        return entries

    def _write_radii(self, layout: SliceLayout, places: torch.Tensor) -> None:
        """Radii that make values of about 1, and the header's scales."""
        n = len(places)
        if layout.calibrated:
            scales = torch.zeros(n, layout.scales, device="cuda")
            scales[:, UNIT] = torch.rand(n, device="cuda") * 0.1 + 0.2
            scales[:, CENTROID] = 0.01
            self._put(places + layout.scales_offset_bytes, scales.half())
        else:
            radii = torch.rand(n, PAGE, device="cuda") * 0.01 + 0.01
            self._put(places + layout.radii_offset_bytes, radii.half())

    def _put(self, places: torch.Tensor, rows: torch.Tensor) -> None:
        rows = rows.view(torch.uint8).view(torch.int64)
        words = torch.arange(rows.shape[1], device="cuda")
        self.arena.view(torch.int64)[(places // 8).unsqueeze(1) + words] = rows

    def tables_for(self, tuning: Tuning) -> ExtendTables:
        shape = self.shape
        tokens = torch.arange(len(self.levels) * PAGE, dtype=torch.int32, device="cuda")
        return build_tables(
            tokens.unsqueeze(0), torch.zeros(1, dtype=torch.int64, device="cuda"), self.levels,
            [shape.prefix], [shape.new], page_size=PAGE, group=shape.group,
            levels=len(self.kinds), tile_rows=tuning.tile_rows,
            most_items=MULTIPROCESSORS * tuning.programs // shape.kv_heads,
            present=range(len(self.kinds)),
        )  # fmt: skip

    def runner(self, tuning: Tuning) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """All of a layer, planned."""
        tables = self.tables_for(tuning)
        heads, device = self.q.shape[1], self.q.device
        work = ExtendWorkspace.allocate(
            tables, self.kinds, heads, self.shape.kv_heads, device, self.q.dtype, tuning
        )
        words = self.arena.view(torch.int32)
        return lambda: run_extend(
            tables, self.q, self.k, self.v, words, self.entries, self.kind_levels, self.frames,
            self.scale, work,
        )  # fmt: skip

    def expected(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's attention of some tokens: [tokens, heads, d] and [tokens, heads]."""
        shape = self.shape
        q = self.q[tokens].float().unflatten(1, (shape.kv_heads, -1)).permute(1, 2, 0, 3)
        rows = (q * self.scale).flatten(1, 2)
        k, v = (x.float().transpose(0, 1) for x in (self.k, self.v))
        logits = rows @ k.transpose(-1, -2)
        future = torch.arange(shape.new, device="cuda") > tokens.repeat(shape.group).unsqueeze(1)
        logits.masked_fill_(future, -torch.inf)
        state = empty_state(rows)
        state.lse = logits.logsumexp(-1)
        state.out = torch.exp(logits - state.lse.unsqueeze(-1)) @ v
        heads = torch.arange(shape.kv_heads, device="cuda")
        for kind, pair in enumerate(self.kinds):
            frame = FRAMES.index(pair[0].pattern.frame)
            at = (self.tables.page_levels == kind).nonzero().squeeze(1)
            for part in at.split(128):
                row_of = heads.repeat_interleave(len(part))
                sides = []
                for side, layout in enumerate(pair):
                    duals = (self.frames.key_duals, self.frames.value_duals)[side][frame]
                    centre = (self.frames.key_centre, self.frames.value_centre)[side]
                    places = self.entries[:, part, side].flatten()
                    offsets = torch.arange(layout.size_bytes, device="cuda")
                    slices = self.arena[places.unsqueeze(1) + offsets]
                    sides.append(CodedSide(layout, slices, duals, centre))
                valid = torch.full_like(row_of, PAGE)
                state = state.merge(attend_entries(rows, *sides, row_of, valid))
        n = len(tokens)
        out = state.out.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2)
        return out, state.lse.unflatten(1, (-1, n)).permute(2, 0, 1).flatten(1, 2)

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[float, float]:
        """Largest and rms error over the output's rms, bf16's own rounding of `out` taken away as
        far as it is sure; raises where they are large."""
        tokens = torch.linspace(0, self.shape.new - 1, CHECKED_TOKENS, device="cuda").long()
        wanted, wanted_lse = self.expected(tokens)
        size = float(wanted.square().mean().sqrt())
        got = out[tokens].float()
        rounding = wanted.abs() * 2.0**-8
        error = ((got - wanted).abs() - rounding).clamp_min(0) / size
        bounds = {"max_error": MAX_ERROR, "rms_error": RMS_ERROR}
        assert_close(error, torch.zeros_like(error), **bounds, name="out")
        assert_close(lse[tokens] / LOG2_E, wanted_lse, max_error=3e-3, rms_error=1e-3, name="lse")
        return float(error.max()), float(error.square().mean().sqrt())


def peak_bytes(function: Callable[[], object]) -> int:
    """What a call allocates at most beyond what is there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def flashinfer_runner(shape: Shape) -> tuple[Callable[[], object], int] | None:
    """FlashInfer's paged prefill over random dense pages, and the bytes of those; None without."""
    try:
        import flashinfer
    except ImportError:
        return None
    total = shape.prefix + shape.new
    pages = -(-total // PAGE)
    size = pages, 2, PAGE, shape.kv_heads, shape.head_dim
    cache = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    order = torch.randperm(pages, device="cuda").int()
    ints: dict[str, Any] = {"device": "cuda", "dtype": torch.int32}
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
    heads = shape.kv_heads * shape.group
    wrapper.plan(
        torch.tensor([0, shape.new], **ints), torch.tensor([0, pages], **ints), order,
        torch.tensor([(total - 1) % PAGE + 1], **ints), heads, shape.kv_heads, shape.head_dim, PAGE,
        causal=True, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    q = torch.randn(shape.new, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
    return lambda: wrapper.run(q, cache), cache.numel() * 2


def sweep(batch: Batch) -> list[dict[str, Any]]:
    """Times of all candidates, the best first."""
    found = []
    for tuning in CANDIDATES:
        try:
            run = batch.runner(tuning)
            batch.check(*run())
            found.append({"us": graph_us(run), **asdict(tuning)})
        except Exception as error:
            print(f"    {tuning}: {type(error).__name__} {str(error)[:300]}", flush=True)
    found.sort(key=lambda row: row["us"])
    for row in found:
        print("    " + " ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return found


def measure(name: str, shape: Shape, sweeps: dict[str, Any] | None) -> dict[str, Any]:
    """Checks, then times one shape."""
    batch = Batch(shape)
    if sweeps is not None:
        sweeps[name] = sweep(batch)
        best = {key: value for key, value in sweeps[name][0].items() if key != "us"}
        tuning = Tuning(**best)
    else:
        tuning = tuning_for(shape.head_dim, PAGE, batch.q.device)
    row: dict[str, Any] = {"name": name, "shape": asdict(shape), "tuning": asdict(tuning)}
    run = batch.runner(tuning)
    row["max_error"], row["rms_error"] = batch.check(*run())
    row["ours_us"] = graph_us(run)
    row["ours_peak_bytes"] = peak_bytes(lambda: batch.runner(tuning)())  # its workspace too
    row["ours_cache_bytes"] = batch.arena.numel()
    row["kernels_us"] = kernel_us(run)
    peer = flashinfer_runner(shape)
    if peer is not None:
        row["flashinfer_us"] = graph_us(peer[0])
        row["flashinfer_peak_bytes"] = peak_bytes(peer[0])
        row["flashinfer_cache_bytes"] = peer[1]
        row["ours_over_flashinfer"] = row["ours_us"] / row["flashinfer_us"]
    flop = 4 * shape.kv_heads * shape.group * shape.head_dim * shape.new
    row["ours_tflop_s"] = flop * (shape.prefix + shape.new / 2) / row["ours_us"] / 1e6
    print(
        f"{name}: {row['ours_us']:.1f} us, "
        f"{row['ours_tflop_s']:.0f} TFLOP/s, FlashInfer {row.get('flashinfer_us', 0):.1f} us, "
        f"ratio {row.get('ours_over_flashinfer', 0):.3f}, allocates "
        f"{row['ours_peak_bytes'] / 2**20:.0f} MiB over {row['ours_cache_bytes'] / 2**20:.0f}, "
        f"error max {row['max_error']:.4f} rms {row['rms_error']:.5f}",
        flush=True,
    )
    print(f"    {row['kernels_us']}", flush=True)
    return row


def compile_all() -> None:
    """Fills Triton's cache, a process per candidate."""
    command = [sys.executable, str(Path(__file__).resolve()), "--compile"]
    running = [subprocess.Popen([*command, str(i)]) for i in range(len(CANDIDATES))]
    for process in running:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--compile", type=int, help="only compile this candidate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.compile is not None:
        Batch(Shape(40, 256)).runner(CANDIDATES[args.compile])()
        return
    if args.sweep:
        compile_all()
    print(torch.cuda.get_device_name(), flush=True)
    rows, sweeps = [], {}
    for name in args.shapes:
        try:
            rows.append(measure(name, SHAPES[name], sweeps if args.sweep else None))
        except Exception as error:
            print(f"{name}: {type(error).__name__} {str(error)[:800]}", flush=True)
        torch.cuda.empty_cache()
        save(args.json, rows, sweeps)


def save(path: Path | None, rows: list[Any], sweeps: dict[str, Any]) -> None:
    if path is None:
        return
    shown = [path.name if argument == str(path) else argument for argument in sys.argv[1:]]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["triton"] = triton.__version__
    if "flashinfer" in sys.modules:
        versions["flashinfer"] = sys.modules["flashinfer"].__version__
    found = {
        "device": torch.cuda.get_device_name(),
        "command": "PYTHONPATH=kernels python benchmarks/extend.py " + shlex.join(shown),
        "versions": versions,
        "rows": rows,
    }
    path.write_text(json.dumps(found | ({"sweeps": sweeps} if sweeps else {}), indent=1) + "\n")


if __name__ == "__main__":
    main()
