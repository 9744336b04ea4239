"""What a device lets a kernel use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
import triton

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """What launches `kernel` on `grid`, or inside `compiling` only compiles it."""
    return partial(kernel.warmup, grid=grid) if _compiling.get() else kernel[grid]


@contextmanager
def compiling(threads: int) -> Iterator[None]:
    """Launches inside the block run nothing: what they would launch is compiled, `threads` at once,
    and ready when the block ends."""
    with ThreadPoolExecutor(threads) as executor, triton.AsyncCompileMode(executor):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)


@cache
def has_ptx(device: torch.device) -> bool:
    """Whether kernels may contain PTX: not in the interpreter, nor on GPUs of another maker."""
    return device.type == "cuda" and torch.version.cuda is not None


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it ends (Hopper and later)."""
    return has_ptx(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(dependent: bool) -> dict[str, Any]:
    """Arguments of a launch that may start early."""
    return {"launch_pdl": True} if dependent else {}
