"""How benchmarks time: medians over CUDA graph replays, beside the GPU's own copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

FLUSH_BYTES = 256 << 20
"""Written between two launches, so that the second finds nothing of its own in the L2 cache."""


def replay_us(*functions: Callable[[], object], replays: int = 20) -> list[float]:
    """Median microseconds of a replay of every function's CUDA graph, replayed in turns: what a
    device's clock does meets all of them."""
    graphs = []
    for function in functions:
        function()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(replays):
        for graph, found in zip(graphs, times):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e3)
    return [sorted(found)[len(found) // 2] for found in times]


def launch_us(launches: list[Callable[[], object]], cold: bool) -> float:
    """Microseconds of one of several launches in a graph; cold: each finds its L2 cache flushed.

    The flushes' own time, of a graph without the launches, is taken off.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def run(work: bool) -> None:
        for launch in launches:
            if cold:
                flush.zero_()
            if work:
                launch()

    if not cold:
        return replay_us(lambda: run(True))[0] / len(launches)
    whole, flushes = replay_us(lambda: run(True), lambda: run(False))
    return (whole - flushes) / len(launches)


def graph_us(function: Callable[[], object]) -> float:
    """Median microseconds of a replay of `function`'s CUDA graph, the L2 cache cold."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return triton.testing.do_bench(graph.replay, warmup=10, rep=60, return_mode="median") * 1e3


def kernel_us(function: Callable[[], object]) -> dict[str, float]:
    """Microseconds of every kernel of one call, the L2 cache as it comes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.events():
        name = event.name[:40]
        times[name] = round(times.get(name, 0.0) + event.device_time_total, 1)
    return times


def copy_gb_s() -> float:
    """Bytes read and written per second by a large device-to-device copy, in GB/s."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(
        lambda: target.copy_(source), warmup=30, rep=150, return_mode="median"
    )
    return 2 * source.numel() * 4 / ms / 1e6
