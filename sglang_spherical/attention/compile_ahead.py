"""Compiles what serving will launch before the first request waits for it, side by side.

The launches themselves are called, on tensors of no content, while `compiling` keeps them from
running: what is compiled is what they ask for.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import combinations

import torch

from sglang_spherical.attention.decode_plan import DecodeTables
from sglang_spherical.attention.extend_plan import ExtendPlan
from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.layout import SIDES
from spherical_kernels.decode.launch import MERGES
from spherical_kernels.device import compiling
from spherical_kernels.encode.launch import SMALL_TOKENS, NewTokens, encode_tokens
from spherical_kernels.extend.launch import (
    MULTIPROCESSORS,
    ExtendWorkspace,
    run_extend,
    tuning_for,
)
from spherical_kernels.extend.tables import ExtendTables
from spherical_kernels.retier.launch import Move, Moves, Turns, reencode_pages

MOST_THREADS = 16


def compile_kernels(
    pool: SphericalKVPool, req_to_token: torch.Tensor, q_heads: int, dtype: torch.dtype
) -> None:
    """Leaves the kernels of decoding, extending and re-encoding in Triton's cache. Plans are made
    outside graphs, by small kernels, and compiled with the first.

    q_heads, dtype  of the model's queries
    """
    with compiling(min(MOST_THREADS, os.cpu_count() or 1)):
        _decode(pool, req_to_token, q_heads, dtype)
        _extend(pool, req_to_token, q_heads, dtype)
        _reencode(pool)


def _decode(
    pool: SphericalKVPool, req_to_token: torch.Tensor, q_heads: int, dtype: torch.dtype
) -> None:
    # the merge alone is another for other batches
    fewest = (-(-pairs // pool.layout.kv_heads) for pairs in MERGES)
    batches = [batch for batch in fewest if batch <= len(req_to_token)]
    tables = DecodeTables(pool, req_to_token, max(batches), q_heads)
    for batch in batches:
        q = _empty(pool, dtype, batch, q_heads, pool.layout.head_dim)
        tables.attend(0, q, 0.5, _new_tokens(pool, dtype, batch))


def _extend(
    pool: SphericalKVPool, req_to_token: torch.Tensor, q_heads: int, dtype: torch.dtype
) -> None:
    layout, arena = pool.layout, pool.arena
    slots = torch.zeros(1, dtype=torch.int64, device=arena.device)
    plan = ExtendPlan(pool, req_to_token, slots, [layout.page_size], [1])
    plan.prepare(q_heads // layout.kv_heads, dtype)
    entries = plan.entries_of(0)
    for tokens in (1, SMALL_TOKENS + 1):
        new = _new_tokens(pool, dtype, tokens)
        encode_tokens(new)
    q = _empty(pool, dtype, len(new.k), q_heads, layout.head_dim)
    k, v, words = new.k, new.v, arena.bytes.view(torch.int32)
    tuning = tuning_for(layout.head_dim, layout.page_size, arena.device)
    for tiles in (1, MULTIPROCESSORS):  # few and many
        for present in ((0,), tuple(range(len(arena.kinds)))):
            tables = _tables(pool, len(q), tiles, present, tuning.tile_rows)
            work = ExtendWorkspace.allocate(
                tables, arena.kinds, q_heads, layout.kv_heads, arena.device, dtype, tuning
            )
            run_extend(
                tables, q, k, v, words, entries, arena.kind_levels[0], pool.layer_frames[0],
                0.5, work,
            )  # fmt: skip


def _new_tokens(pool: SphericalKVPool, dtype: torch.dtype, tokens: int) -> NewTokens:
    """Without content."""
    layout = pool.layout
    k, v = (_empty(pool, dtype, tokens, layout.kv_heads, layout.head_dim) for _ in range(2))
    loc = torch.empty(tokens, dtype=torch.int64, device=pool.arena.device)
    return pool.new_tokens(0, loc, k, v)


def _tables(
    pool: SphericalKVPool, tokens: int, tiles: int, present: tuple[int, ...], tile_rows: int
) -> ExtendTables:
    """Tables of one request, without content."""

    def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=pool.arena.device)

    return ExtendTables(
        numbers(1), numbers(1, dtype=torch.uint8), numbers(len(pool.layout.levels) + 1),
        numbers(1, 4), numbers(tiles, 4), numbers(tiles, 4), len(pool.layout.levels), present,
        tile_rows, (tokens,),
    )  # fmt: skip


def _reencode(pool: SphericalKVPool) -> None:
    layout, arena = pool.layout, pool.arena
    d, device = layout.head_dim, arena.device
    shape = SIDES, layout.layers, layout.kv_heads
    turns = Turns(
        torch.empty(*shape, d, d, dtype=torch.float16, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )
    pages = torch.empty(1, dtype=torch.int64, device=device)
    slices = layout.layers * layout.kv_heads
    one = torch.zeros(1, dtype=torch.int32, device=device)
    # of kinds and not of levels: those that heads pick from their first prompts come later
    for old, new in combinations(arena.kinds, 2):
        both = [Move(side, old[side], new[side], one) for side in (KEYS, VALUES)]
        sizes = [side.size_bytes for side in new] * slices
        moves = Moves.over(both, arena.places[0], arena.places[-1], sizes)
        # heads may keep theirs from level to level
        moves = replace(moves, kept=moves.whole)
        reencode_pages(arena.bytes, arena.page_blocks, pages, moves, turns, layout.block_bytes)


def _empty(pool: SphericalKVPool, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=pool.arena.device)
