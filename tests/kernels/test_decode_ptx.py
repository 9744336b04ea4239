"""What the compiler makes of the decode kernel, run in numpy, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from compiled_decode import Compiled, compile_decode
from decode_case import COLD, COOL, FROZEN, HOT, PAGE, WARM, Case, Kinds
from warp import Warp

from spherical_kernels.decode import launch

ALIGNMENT = 256


class CompiledKernel:
    """Stands in for `decode_pages` at its launch."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*arguments: Any, **_: Any) -> None:
            self.start(grid, arguments)

        return start

    def start(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        stores, params, end = [], [], ALIGNMENT
        for argument in arguments:
            if isinstance(argument, int):
                params.append(argument)
                continue
            bytes_of = np.frombuffer(bytearray(argument.untyped_storage()), np.uint8)
            params.append(end + argument.storage_offset() * argument.element_size())
            stores.append((argument, end, bytes_of))
            end += -(-len(bytes_of) // ALIGNMENT) * ALIGNMENT
        memory = np.full(end + ALIGNMENT, 0xFF, np.uint8)
        for _, at, bytes_of in stores:
            memory[at : at + len(bytes_of)] = bytes_of
        warp = Warp(self.compiled.ptx, memory, self.compiled.shared_bytes)
        for block in product(*(range(n) for n in (*grid, 1, 1)[:3])):
            warp.run([*params, 0, 0], block)
        for tensor, at, bytes_of in stores:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            whole.copy_(torch.from_numpy(memory[at : at + len(bytes_of)]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it itself")
@pytest.mark.parametrize(
    ("head_dim", "group", "kinds", "tokens"),
    [
        (128, 4, (HOT, WARM, COLD), [(PAGE + 9, 3 * PAGE, 2 * PAGE), (0, 0, PAGE)]),
        (64, 3, (HOT, WARM, COLD), [(17, 3 * PAGE, PAGE)]),
        (128, 8, (HOT, WARM), [(PAGE + 33, 3 * PAGE)]),
        (80, 2, (HOT, WARM, COLD), [(5, 2 * PAGE, PAGE)]),
        (128, 4, (COLD, FROZEN), [(2 * PAGE, 3 * PAGE)]),
        (64, 3, (HOT, FROZEN), [(9, 3 * PAGE)]),
        (96, 4, (WARM, COLD), [(PAGE, 2 * PAGE)]),
        (256, 4, (HOT, WARM), [(5, 2 * PAGE)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_compiled_code_agrees(
    head_dim: int,
    group: int,
    kinds: Kinds,
    tokens: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(monkeypatch, kinds, tokens, head_dim, group, PAGE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_decode.py has it")
@pytest.mark.parametrize(("head_dim", "page"), [(64, 32), (128, 16)])
def test_smallest_pages(head_dim: int, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows of left-over digits are narrowest (attention/factory.py: SMALLEST_PAGES)."""
    check(monkeypatch, (HOT, COOL, COLD), [(page + 5, 2 * page, page)], head_dim, 4, page)


def check(
    monkeypatch: pytest.MonkeyPatch,
    kinds: Kinds,
    tokens: list[tuple[int, ...]],
    head_dim: int,
    group: int,
    page: int,
) -> None:
    kernel = CompiledKernel(compile_decode(kinds, head_dim, group, page=page))
    monkeypatch.setattr(launch, "decode_pages", kernel)
    launch._page_launch.cache_clear()
    try:
        Case(kinds, tokens, head_dim, group=group, page=page).check()
    finally:
        launch._page_launch.cache_clear()
