"""A GPU that is not there: Triton compiles for it, and hears of launches instead of making them.

For processes of their own: Triton's driver is set for good.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED_BYTES = 227 << 10
"""Shared memory that a program may have on Hopper."""

Launched = tuple[tuple[int, ...], int, list[Any]]
"""Grid, binary and arguments, tensors as their addresses."""


class FakeGpu:
    """Triton's driver of an sm_90 GPU.

    launched  what was launched, in order
    loaded    binaries that were put onto the device
    """

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda _: {"max_shared_mem": 228 << 10}
        )
        self.loaded, self._lock = 0, Lock()

    def _load(self, *_: Any) -> tuple[str, int, int, int, int]:
        with self._lock:  # binaries may be loaded by several threads
            self.loaded += 1
            number = self.loaded
        return "module", number, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            grid, function, rest = arguments[:3], arguments[4], arguments[9:]
            rest = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in rest]
            self.launched.append((grid, function, rest))

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def use() -> FakeGpu:
    """Makes Triton's driver one of these."""
    gpu = FakeGpu()
    triton.runtime.driver.set_active(gpu)
    return gpu
