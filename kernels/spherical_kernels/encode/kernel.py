"""Triton body of the hot encoder; launch.py sets up what it assumes."""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(2.0**-126)  # float32's smallest normal number
SHIFT = tl.constexpr(2.0**23)  # adding it rounds to an integer, which is then in the low bits


@triton.jit
def rotate(y, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Sylvester's Hadamard matrix, without its scale, on every BLOCK = 2**STAGES channels of y
    [rows, D].

    Every stage adds and subtracts the neighbours in the lowest bit of the channel, then moves that
    bit to the top of the block: after all stages the bits are where they were.
    """
    ROWS: tl.constexpr = y.shape[0]
    D: tl.constexpr = y.shape[1]
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(y, [ROWS * (D // BLOCK), BLOCK // 2, 2]))
        y = tl.permute(tl.join(even + odd, even - odd), 0, 2, 1)
        y = tl.reshape(y, [ROWS, D])
    return y


@triton.jit(do_not_specialize=["num_tokens"])  # a graph of any batch runs the same code
def encode_tokens_kernel(
    Arena, PageBlocks, Loc, K, V, Places, Centre, Signs,
    num_tokens, k_row, k_head, v_row, v_head, centre_side, block_bytes,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr, PAGE: tl.constexpr, RADII: tl.constexpr, TILE: tl.constexpr,
    H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one KV head, keys or values, by every program."""
    encode_rows(
        Arena, PageBlocks, Loc, K, V, Places, Centre, Signs,
        num_tokens, k_row, k_head, v_row, v_head, centre_side, block_bytes,
        tl.program_id(0), tl.program_id(1), tl.program_id(2),
        D, DP, BLOCK, STAGES, BITS, PAGE, RADII, TILE, H, ROWS,
    )  # fmt: skip


@triton.jit
def encode_rows(
    Arena, PageBlocks, Loc, K, V, Places, Centre, Signs,
    num_tokens, k_row, k_head, v_row, v_head, centre_side, block_bytes, rows, head, side,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr, PAGE: tl.constexpr, RADII: tl.constexpr, TILE: tl.constexpr,
    H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tokens rows * ROWS to (rows + 1) * ROWS of one KV head, keys (side 0) or values.

    Arena       uint8, addresses inside it are multiples of 16
    PageBlocks  int32 [num_pages, H]; Loc int64 [num_tokens]
    K, V        [num_tokens, kv_heads, D]; strides are in elements
    Places      int32 [kv_heads, 2, 2]: slot and byte offset of the slice
    Centre      float32 [2, kv_heads, D], heads contiguous
    Signs       float32 [D], signs times the rotation's scale
    """
    row = rows * ROWS + tl.arange(0, ROWS)
    real = row < num_tokens
    loc = tl.load(Loc + row, mask=real, other=0)
    page = loc // PAGE
    place = Places + (head * 2 + side) * 2
    block = tl.load(PageBlocks + page * H + tl.load(place), mask=real, other=0)
    token = loc % PAGE
    slices = block.to(tl.int64) * block_bytes + tl.multiple_of(tl.load(place + 1), 16)
    d = tl.arange(0, DP)
    inside = d < D
    known = real[:, None] & inside[None, :]
    if side == 0:
        at = row.to(tl.int64)[:, None] * k_row + head * k_head + d[None, :]
        x = tl.load(K + at, mask=known, other=0.0).to(tl.float32)
    else:
        at = row.to(tl.int64)[:, None] * v_row + head * v_head + d[None, :]
        x = tl.load(V + at, mask=known, other=0.0).to(tl.float32)
    centre = Centre + side.to(tl.int64) * centre_side + head * D + d
    centre = tl.load(centre, mask=inside, other=0.0)
    signs = tl.load(Signs + d, mask=inside, other=0.0)
    y = rotate((x - centre[None, :]) * signs[None, :], BLOCK, STAGES)

    TOP: tl.constexpr = 2**BITS - 1  # the largest code; a level is code - TOP / 2
    peak = tl.max(tl.abs(y), 1)
    per_step = 1.0 / tl.maximum(peak * (2.0 / TOP), TINY)
    shifted = (y * per_step[:, None] + TOP / 2) + SHIFT  # rounded to the code: none is clipped
    level = (shifted - SHIFT) - TOP / 2
    if D != DP:
        level = tl.where(inside[None, :], level, 0.0)
    radius = tl.sum(y * level, 1) / tl.sum(level * level, 1)
    radii = (Arena + slices + RADII).to(tl.pointer_type(tl.float16), bitcast=True)
    tl.store(radii + token, radius.to(tl.float16), mask=real)

    # a row that is not finite has made its radius NaN, and gets the codes of zeros
    codes = tl.where(
        (radius == radius)[:, None], shifted.to(tl.int32, bitcast=True), (TOP + 1) // 2
    )
    rows = Arena + (slices + (TILE + token * (D * BITS // 8)))[:, None]
    if BITS == 8:
        tl.store(rows + d[None, :], codes.to(tl.uint8), mask=known)
    else:  # a byte has a channel of each half of the head
        j = tl.arange(0, DP // 2)[None, :]
        low = tl.broadcast_to(j, [ROWS, DP // 2])
        high = tl.broadcast_to(tl.minimum(j + D // 2, DP - 1), [ROWS, DP // 2])
        packed = tl.gather(codes, low, 1) & 15 | (tl.gather(codes, high, 1) << 4)
        tl.store(rows + j, packed.to(tl.uint8), mask=real[:, None] & (j < D // 2))
