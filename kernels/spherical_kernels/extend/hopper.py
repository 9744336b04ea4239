# mypy: ignore-errors
"""Attention of many new tokens over coded pages on Hopper: what kernel.py computes, by other means.

A program has three warpgroups. One *produces*: it unpacks every page to float16 in shared memory
(hopper_operands.py). Two *consume*: each has half of a tile of 128 rows and meets the same unpacked
pages in tensor cores. So a page is unpacked once for 128 rows; while a consumer works out the
weights of a page, the tensor cores have its values of the page before and the other's products. All
have the same share of the registers (hopper_roles.py).

Rings of STAGES buffers lie between them, and one buffer for the centroids of BLOCK pages: the
producer waits for *empty*, which both consumers arrive at, consumers for *full*.

Written in Gluon: Triton's own pipelines wait for every product whose operand the loop wrote.
Arguments, constants and tables are kernel.py's.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_operands import next_stage, produce
from .hopper_roles import run_roles
from .hopper_rows import (
    add_centroids,
    ask,
    meet_centroids,
    product_layout,
    release,
    store_rows,
    terms,
    weights,
)
from .kernel import NONE as _NONE

NONE = gl.constexpr(_NONE.value)


@gluon.constexpr_function
def operand_layout():
    """Of float16 operands in shared memory, rows of 64 columns or more."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def consume(
    given, pages, key_centroids, value_centroids, own, HALF: gl.constexpr,
    D: gl.constexpr, G: gl.constexpr, CALIBRATED: gl.constexpr, BLOCK: gl.constexpr,
    SPAN: gl.constexpr, VS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Rows HALF * 64 .. of the tile over all pages that the producer unpacks.

    given      arguments and places of extend_pages_hopper, as below
    pages, key_centroids, value_centroids  what the producer fills, as in `produce`
    own        buffers in shared memory that only this consumer uses:
        queries    float16 [64, D]
        bases      float32 [BLOCK, 64]: q.centroid of the block's pages
        shares_of  float32 [BLOCK, 64]: log2 of the pages' parts of the mass, their top included
    """
    (
        Q, QScale, Partial, Lse, tokens, first_row, row, place, order, first, end, run_end,
        last_valid,
    ) = given  # fmt: skip
    keys, values, units, weighs, full, empty = pages
    queries, bases, shares_of = own
    LOGITS: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(D)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])

    first_row += HALF * 64
    row += HALF * 64
    place += HALF * 64
    if first_row >= tokens * G:  # no rows: keeps the producer going
        _pass_on(
            end - first, full, empty, key_centroids, value_centroids, CALIBRATED, BLOCK, STAGES
        )
    else:
        m = gl.arange(0, 64, layout=gl.SliceLayout(1, LOADED))
        c = gl.arange(0, D, layout=gl.SliceLayout(0, LOADED))
        known = first_row + m < tokens * G
        at = Q + row * D + (m[:, None] * D + c[None, :])
        queries.store(gl.load(at, mask=known[:, None], other=0.0))
        fence_async_shared()
        gl.thread_barrier()
        m = gl.arange(0, 64, layout=ROW)
        q_scale = gl.load(QScale + row + m, mask=first_row + m < tokens * G, other=0.0)
        top = gl.full([64], NONE, gl.float32, ROW)
        mass = gl.zeros([64], gl.float32, ROW)
        acc = gl.zeros([64, D], gl.float32, OUT)
        stage, phase, block_phase = 0, 0, 0
        for block in range(first, end, SPAN):
            count = gl.minimum(end - block, SPAN)
            if CALIBRATED:
                meet_centroids(queries, q_scale, bases, key_centroids, block_phase, BLOCK)
            mbarrier.wait(full.index(stage), phase)
            dots = ask(queries, keys.index(stage))
            unit, weigh, base = terms(units, weighs, bases, stage, 0, CALIBRATED)
            dots = warpgroup_mma_wait(0, deps=[dots])
            right, top, mass, fade = weights(
                dots, top, mass, q_scale, base, unit, weigh, block, 0, run_end, last_valid,
                shares_of, D, CALIBRATED,
            )  # fmt: skip
            acc = acc * fade[:, None]
            # `before` must not be `stage` ahead of the loop: Triton would take it for unchanged
            before = stage
            stage, phase = next_stage(stage, phase, STAGES)
            for i in range(1, count):
                mbarrier.wait(full.index(stage), phase)
                dots = ask(queries, keys.index(stage))
                running = warpgroup_mma(right, values.index(before), acc, is_async=True)
                unit, weigh, base = terms(units, weighs, bases, stage, i, CALIBRATED)
                dots = warpgroup_mma_wait(1, deps=[dots])  # the values' products go on
                later, top, mass, fade = weights(
                    dots, top, mass, q_scale, base, unit, weigh, block, i, run_end, last_valid,
                    shares_of, D, CALIBRATED,
                )  # fmt: skip
                acc, right = warpgroup_mma_wait(0, deps=[running, right])  # keeps its registers
                release(empty.index(before))
                acc = acc * fade[:, None]
                right = later
                before = stage
                stage, phase = next_stage(stage, phase, STAGES)
            acc = warpgroup_mma(right, values.index(before), acc)
            release(empty.index(before))
            if CALIBRATED:
                acc = add_centroids(
                    acc, top, count, shares_of, value_centroids, block_phase, D, BLOCK
                )
                block_phase = block_phase ^ 1
        store_rows(acc, top, mass, Partial, Lse, place, order, D, CALIBRATED, VS, PDL)


@gluon.jit
def _pass_on(
    pages, full, empty, key_centroids, value_centroids,
    CALIBRATED: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Takes every page from the producer, and every block's centroids, without reading them.

    All warps take one together: a warp two phases behind would wait for a phase that has passed.
    """
    _, _, _, key_full, key_empty = key_centroids
    _, _, _, value_full, value_empty = value_centroids
    stage, phase, block_phase = 0, 0, 0
    for i in range(pages):
        if CALIBRATED:
            if i % BLOCK == 0:
                mbarrier.wait(key_full, block_phase)
                release(key_empty)
        mbarrier.wait(full.index(stage), phase)
        release(empty.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        if CALIBRATED:
            if (i % BLOCK == BLOCK - 1) | (i == pages - 1):
                mbarrier.wait(value_full, block_phase)
                release(value_empty)
                block_phase = block_phase ^ 1


@gluon.jit(
    do_not_specialize=["rows", "pages", "order"],
    do_not_specialize_on_alignment=["QScale", "Levels"],
)
def extend_pages_hopper(
    Arena, Entries, Items, Requests, Runs, Levels, Q, QScale, Partial, Lse, rows, pages, order,
    D: gl.constexpr, DC: gl.constexpr, P: gl.constexpr, G: gl.constexpr, M: gl.constexpr,
    W: gl.constexpr, WORDS: gl.constexpr, KIND: gl.constexpr, LEVELS: gl.constexpr,
    CALIBRATED: gl.constexpr, RADII: gl.constexpr, BLOCK: gl.constexpr,
    KT: gl.constexpr, KB: gl.constexpr, KC: gl.constexpr, VT: gl.constexpr, VB: gl.constexpr,
    VC: gl.constexpr, VS: gl.constexpr, CB: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One item of one KV head, as kernel.py's extend_pages."""
    gl.static_assert(M == 128 and P == 64 and D == DC and W == WORDS, "launch.hopper_serves")
    item, head = gl.program_id(0), gl.program_id(1)
    request = gl.load(Items + item * 4)
    first_row = gl.load(Items + item * 4 + 1)
    split = gl.load(Items + item * 4 + 2)
    splits = gl.load(Items + item * 4 + 3)
    levels = Levels + (KIND * gl.num_programs(1) + head) * 2
    begin = gl.load(Runs + request * LEVELS + gl.load(levels))
    run_end = gl.load(Runs + request * LEVELS + gl.load(levels + 1))
    first = begin + (run_end - begin) * split // splits
    end = begin + (run_end - begin) * (split + 1) // splits
    place = (item * gl.num_programs(1) + head).to(gl.int64) * M
    if PDL:
        if order == 0:  # for the queries; later kinds start when all programs are past it
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if first >= end:
        if PDL and order > 0:
            tl.extra.cuda.gdc_wait()
        if order < 2:
            layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            m = gl.arange(0, M, layout=layout)
            gl.store(Lse + place + m, gl.full([M], -float("inf"), gl.float32, layout))
    else:
        row = head.to(gl.int64) * rows + gl.load(Requests + request * 4) * G + first_row
        last_valid = gl.load(Requests + request * 4 + 2)
        entries = Entries + head.to(gl.int64) * pages * 2
        OPERAND: gl.constexpr = operand_layout()
        ONE: gl.constexpr = mbarrier.MBarrierLayout()
        LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        SPAN: gl.constexpr = BLOCK if CALIBRATED else 1 << 24
        SOME: gl.constexpr = BLOCK if CALIBRATED else 8  # a swizzle's rows, of what nothing uses
        keys = gl.allocate_shared_memory(gl.float16, [STAGES, 64, D], OPERAND)
        values = gl.allocate_shared_memory(gl.float16, [STAGES, 64, D], OPERAND)
        queries = gl.allocate_shared_memory(gl.float16, [2, 64, D], OPERAND)
        centroids = gl.allocate_shared_memory(gl.float16, [4, SOME, D], OPERAND)
        radii = gl.allocate_shared_memory(gl.float32, [2, SOME], LINE)
        upper_bases = gl.allocate_shared_memory(gl.float32, [SOME, 64], LINE)
        lower_bases = gl.allocate_shared_memory(gl.float32, [SOME, 64], LINE)
        upper_shares = gl.allocate_shared_memory(gl.float32, [SOME, 64], LINE)
        lower_shares = gl.allocate_shared_memory(gl.float32, [SOME, 64], LINE)
        units = gl.allocate_shared_memory(gl.float32, [STAGES, 1], LINE)
        weighs = gl.allocate_shared_memory(gl.float32, [STAGES, 1], LINE)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], ONE)
        block_full = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
        block_empty = gl.allocate_shared_memory(gl.int64, [2, 1], ONE)
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=2)
        for i in gl.static_range(2):
            mbarrier.init(block_full.index(i), count=1)
            mbarrier.init(block_empty.index(i), count=2)
        gl.thread_barrier()
        of_pages = keys, values, units, weighs, full, empty
        of_keys = (
            centroids.index(0), centroids.index(1), radii.index(0), block_full.index(0),
            block_empty.index(0),
        )  # fmt: skip
        of_values = (
            centroids.index(2), centroids.index(3), radii.index(1), block_full.index(1),
            block_empty.index(1),
        )  # fmt: skip
        tokens = gl.load(Requests + request * 4 + 1)
        rows_of = (
            Q, QScale, Partial, Lse, tokens, first_row, row, place, order, first, end, run_end,
            last_valid,
        )  # fmt: skip
        upper = queries.index(0), upper_bases, upper_shares
        lower = queries.index(1), lower_bases, lower_shares
        # constants would not stay constants in a tuple with a name
        run_roles(
            [
                (consume, (
                    rows_of, of_pages, of_keys, of_values, upper, 0, D, G, CALIBRATED, BLOCK, SPAN,
                    VS, STAGES, PDL,
                )),
                (consume, (
                    rows_of, of_pages, of_keys, of_values, lower, 1, D, G, CALIBRATED, BLOCK, SPAN,
                    VS, STAGES, PDL,
                )),
                (produce, (
                    Arena, entries, first, end, run_end, last_valid, of_pages, of_keys, of_values,
                    D, W, CALIBRATED, RADII, BLOCK, SPAN, KT, KB, KC, VT, VB, VC, CB, STAGES,
                )),
            ],
            [4, 4],
        )  # fmt: skip
