# mypy: ignore-errors
"""What a consumer of hopper.py does with 64 rows: products, weights, centroids, and the end.

A product of 64 rows lies in a warpgroup so that four neighbouring lanes have a row.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_operands import BOOST, UNITS
from .kernel import SHRUNK as _SHRUNK

SHRUNK = gl.constexpr(_SHRUNK.value)


@gluon.constexpr_function
def product_layout(columns):
    """Of a product float32 [64, columns] in a warpgroup."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def by_page(rows, BLOCK: gl.constexpr):
    """Shared [BLOCK, 64], of which one row is taken at a time, as [64, BLOCK]."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return rows._reinterpret(gl.float32, [BLOCK, 64], PLAIN).permute((1, 0))


@gluon.jit
def release(barrier):
    """Tells the producer that all warps of this consumer are done with what it guards."""
    gl.thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def fast_log2(number):
    """log2 to 2**-22: Triton's own takes 25 instructions."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [number], gl.float32, True, 1
    )


@gluon.jit
def ask(queries, page):
    """Starts the products [64, 64] of shared queries and the keys of a page."""
    none = gl.zeros([64, 64], gl.float32, product_layout(64))
    return warpgroup_mma(queries, page.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def terms(units, weighs, bases, stage, i, CALIBRATED: gl.constexpr):
    """Of the i-th page of a block: its keys' unit [1], log2 of what its weights are times [1], and
    what its centroid adds to the rows' logits [64]."""
    ROW: gl.constexpr = gl.SliceLayout(1, product_layout(64))
    if CALIBRATED:
        unit = units.index(stage).load(ROW)
        weigh = weighs.index(stage).load(ROW)
        base = bases.index(i).load(ROW)
    else:
        unit = gl.full([1], SHRUNK, gl.float32, ROW)
        weigh = gl.full([1], 0.0, gl.float32, ROW)
        base = gl.zeros([64], gl.float32, ROW)
    return unit, weigh, base


@gluon.jit
def weights(
    dots, top, mass, q_scale, base, unit, weigh, block, i, run_end, last_valid, shares_of,
    D: gl.constexpr, CALIBRATED: gl.constexpr,
):  # fmt: skip
    """A page's weights from its products [64, 64], and what the running sums become; the page's
    part of the mass goes to shares_of.

    Returns the weights as float16 operand, top, mass and, for the rows of a product, fade.
    """
    OUT: gl.constexpr = product_layout(D)
    if not CALIBRATED:
        t = gl.arange(0, 64, layout=gl.SliceLayout(0, product_layout(64)))
        valid = t < gl.where(block + i == run_end - 1, last_valid, 64)
        dots = gl.where(gl.broadcast(valid[None, :], dots)[0], dots, -float("inf"))
    per_dot = q_scale * unit
    new_top = gl.maximum(top, gl.max(dots, 1) * per_dot + base)
    fade = gl.exp2(top - new_top)
    p = gl.exp2(dots * per_dot[:, None] + (base - new_top + weigh)[:, None])
    page_mass = gl.sum(p, 1)
    if CALIBRATED:
        page_mass *= gl.exp2(-weigh)
        shares_of.index(i).store(fast_log2(page_mass) + new_top)
    right = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(0, OUT, 2))
    fade_out = gl.convert_layout(fade, gl.SliceLayout(1, OUT))
    return right, new_top, mass * fade + page_mass, fade_out


@gluon.jit
def meet_centroids(queries, q_scale, bases, key_centroids, phase, BLOCK: gl.constexpr):
    """Fills bases with what the centroids of a block's keys add to the rows' logits."""
    NEAR: gl.constexpr = product_layout(BLOCK)
    wholes, rests, radii, full, empty = key_centroids
    mbarrier.wait(full, phase)
    near = gl.zeros([64, BLOCK], gl.float32, NEAR)
    near = warpgroup_mma(queries, rests.permute((1, 0)), near, use_acc=False, is_async=True)
    near = warpgroup_mma(queries, wholes.permute((1, 0)), near, is_async=True)
    near = warpgroup_mma_wait(0, deps=[near])
    radius = radii.load(gl.SliceLayout(0, NEAR))
    scale = gl.convert_layout(q_scale, gl.SliceLayout(1, NEAR))
    by_page(bases, BLOCK).store(near * (radius[None, :] * scale[:, None]))
    release(empty)


@gluon.jit
def add_centroids(
    acc, top, count, shares_of, value_centroids, phase, D: gl.constexpr, BLOCK: gl.constexpr
):
    """acc, float32 [64, D], with what the centroids of a block's values add to it."""
    OUT: gl.constexpr = product_layout(D)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    wholes, rests, radii, full, empty = value_centroids
    mbarrier.wait(full, phase)
    n = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LEFT))
    logs = by_page(shares_of, BLOCK).load(LEFT)
    radius = radii.load(gl.SliceLayout(0, LEFT)) * BOOST
    top = gl.convert_layout(top, gl.SliceLayout(1, LEFT))
    inside = gl.broadcast((n < count)[None, :], logs)[0]
    shares = gl.where(inside, gl.exp2(logs - top[:, None]) * radius[None, :], 0.0)
    share = shares.to(gl.float16)
    rest = (shares - share.to(gl.float32)).to(gl.float16)
    acc = warpgroup_mma(share, rests, acc, is_async=True)
    acc = warpgroup_mma(share, wholes, acc, is_async=True)
    acc = warpgroup_mma(rest, wholes, acc, is_async=True)
    acc, _, _ = warpgroup_mma_wait(0, deps=[acc, share, rest])
    release(empty)
    return acc


@gluon.jit
def store_rows(
    acc, top, mass, Partial, Lse, place, order,
    D: gl.constexpr, CALIBRATED: gl.constexpr, VS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Divides by the mass and stores, joined with what is there if order is 2."""
    OUT: gl.constexpr = product_layout(D)
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    m = gl.arange(0, 64, layout=ROW)
    column = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    top = gl.convert_layout(top, ROW)
    mass = gl.convert_layout(mass, ROW)
    out = acc * (1.0 / mass * (UNITS / BOOST if CALIBRATED else SHRUNK))[:, None]
    if CALIBRATED:
        step = gl.full([D], VS[0], gl.float32, gl.SliceLayout(0, OUT))
        for b in gl.static_range(len(VS)):
            step = gl.where(column // 4 % len(VS) == b, VS[b], step)
        out *= step[None, :]
    lse = top + gl.log2(mass)
    target = Partial + place * D + (m[:, None] * D + column[None, :])
    if PDL and order > 0:
        tl.extra.cuda.gdc_wait()
    before = gl.load(Lse + place + m, mask=m * 0 + order == 2, other=-float("inf"))
    known = before > -float("inf")
    peak = gl.maximum(lse, before)
    whole = peak + gl.log2(gl.exp2(lse - peak) + gl.exp2(before - peak))
    earlier = gl.load(target, mask=gl.broadcast(known[:, None], out)[0], other=0.0)
    out = out * gl.exp2(lse - whole)[:, None] + earlier * gl.exp2(before - whole)[:, None]
    gl.store(target, out)
    gl.store(Lse + place + m, whole)
