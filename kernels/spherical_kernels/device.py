"""What a device lets a kernel use, and how kernels are launched."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, cached_property
from typing import Any

import torch
import triton
from triton.runtime import driver

_compiling: ContextVar[list[Any] | None] = ContextVar("compiling", default=None)
"""What Triton is compiling instead of launching it."""

Grid = tuple[int, int, int]


class Launch:
    """A kernel and what it is specialised on; called with its grid and its other arguments.

    Triton works out at every launch which binary its arguments ask for, which takes the host some
    40 us, longer than most kernels here run. This asks Triton once for all arguments that look
    alike to it, and then launches the binary itself.
    """

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self.constants = constants
        self._kernel = kernel
        self._binaries: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: Grid, *args: Any) -> None:
        """Launches on `grid`; `args` are the kernel's parameters before the constants."""
        compiled = _compiling.get()
        if compiled is not None:
            compiled.append(self._kernel.warmup(*args, grid=grid, **self.constants))
        elif isinstance(self._kernel, triton.JITFunction):
            look, values = _look(args)
            binary = self._binaries.get(look)
            if binary is None:
                self._binaries[look] = self._kernel[grid](*args, **self.constants)
            else:
                binary[grid](*values, *self._last)
        else:  # interpreted
            self._kernel[grid](*args, **self.constants)

    @cached_property
    def _last(self) -> tuple[Any, ...]:
        """The constants that are parameters, in their order."""
        names = self._kernel.arg_names
        return tuple(self.constants[name] for name in names if name in self.constants)


def _look(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """All that Triton may specialise a binary on, and the arguments with tensors as addresses,
    which its launcher then need not ask for, nor the driver whose they are."""
    look: list[Any] = [driver.active.get_current_device()]
    values: list[Any] = []
    for argument in args:
        kind = type(argument)  # isinstance takes three times as long
        if kind is torch.Tensor:
            address = argument.data_ptr()
            look.append(argument.dtype)
            look.append(address & 15)
            values.append(address)
            continue
        values.append(argument)
        if kind is float:
            look.append(None)
        elif argument == 1 or argument >> 31:
            look.append(argument)
        else:
            look.append(-16 if argument & 15 else 0)
    return tuple(look), values


@contextmanager
def compiling(threads: int) -> Iterator[None]:
    """Launches inside the block run nothing: what they would launch is compiled, `threads` at once,
    and ready when the block ends.

    Ready is what Triton leaves to the first launch, too: the module on the device, and a launcher
    for such parameters, which takes a C compiler half a second where Triton's cache has none.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    with ThreadPoolExecutor(threads, initializer=_work_on, initargs=(device,)) as executor:
        with triton.AsyncCompileMode(executor):
            compiled: list[Any] = []
            token = _compiling.set(compiled)
            try:
                yield
            finally:
                _compiling.reset(token)
        binaries = [binary for binary in map(_awaited, compiled) if binary is not None]
        launchers = {str(binary.src.signature): binary for binary in binaries}
        for some in (launchers.values(), binaries):  # one for each list first, and no list twice
            list(executor.map(lambda binary: binary.run, some))  # the property does it


def _work_on(device: int | None) -> None:
    """What a thread loads goes to `device`, which it would not know of."""
    if device is not None:
        torch.cuda.set_device(device)


def _awaited(binary: Any) -> Any:
    """Triton hands out a promise where it had to compile, nothing where a hook of its cache says
    so."""
    return binary.result() if hasattr(binary, "result") else binary


@cache
def has_ptx(device: torch.device) -> bool:
    """Whether kernels may contain PTX: not in the interpreter, nor on GPUs of another maker."""
    return device.type == "cuda" and torch.version.cuda is not None


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it ends (Hopper and later)."""
    return has_ptx(device) and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_wgmma(device: torch.device) -> bool:
    """Whether it has the products of warpgroups, which only Hopper has."""
    return has_ptx(device) and torch.cuda.get_device_capability(device)[0] == 9


def launch_options(dependent: bool) -> dict[str, Any]:
    """Arguments of a launch that may start early."""
    return {"launch_pdl": True} if dependent else {}
