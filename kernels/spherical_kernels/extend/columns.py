# mypy: ignore-errors
"""The order of channels in rows that meet unpacked codes: a word is four bytes, four neighbouring
channels, and unpacks to pairs of 16-bit lanes (kernel.py)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_of(column, D: tl.constexpr, NB: tl.constexpr):
    """The channel of each column; D where a column is none."""
    band = column // 4 % NB
    within = column // (4 * NB) * 4 + column % 2 * 2 + column // 2 % 2
    return tl.where(within < D // NB, band * (D // NB) + within, D)


@triton.jit
def step_of(column, STEPS: tl.constexpr):
    """The step of each column's band."""
    step = tl.full([column.shape[0]], STEPS[0], tl.float32)
    for b in tl.static_range(len(STEPS)):
        step = tl.where(column // 4 % len(STEPS) == b, STEPS[b], step)
    return step


@triton.constexpr_function
def entry_of(table, index):
    """An entry that is a tuple itself; Triton passes those on in no other way."""
    return table[index]


@triton.jit
def columns_of_kind(column, D: tl.constexpr, STEPS: tl.constexpr, KIND: tl.constexpr):
    """Channel and step of each column, by the steps of a kind."""
    MINE: tl.constexpr = entry_of(STEPS, KIND)
    return channel_of(column, D, len(MINE)), step_of(column, MINE)
