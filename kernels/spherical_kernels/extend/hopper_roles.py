# mypy: ignore-errors
"""Warps with different work in one program, all with the same share of the registers.

Gluon's own warp_specialize moves registers between roles (setmaxnreg). Where it does, ptxas 12.8
takes the smallest share for that of every role, and waits for every single product in place of the
last of a chain (its message C7512).

Reaches into Triton 3.6, which alone launch.hopper_serves admits.
"""

from __future__ import annotations

import copy

from triton.experimental.gluon.language import _core


class _Quiet:
    """An object of the compiler, but for what says how many registers roles ask for."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def create_warp_specialize(self, *args):
        return _Quiet(self._inner.create_warp_specialize(*args))

    def set_requested_registers(self, registers):
        pass


@_core.builtin
def run_roles(functions_and_args, worker_num_warps, _semantic=None, _generator=None):
    """As Gluon's warp_specialize, without registers of roles."""
    warps = [_core._unwrap_if_constexpr(number) for number in worker_num_warps]
    semantic = copy.copy(_semantic)
    semantic.builder = _Quiet(_semantic.builder)
    return semantic.warp_specialize(functions_and_args, warps, [0] * len(warps), _generator)
