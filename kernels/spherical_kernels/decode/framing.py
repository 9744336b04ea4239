# mypy: ignore-errors
"""Triton bodies before the pages: new tokens into theirs, queries into the frames."""

from __future__ import annotations

import triton
import triton.language as tl

from ..encode.kernel import encode_rows

BANDS = tl.constexpr(4)  # of a calibrated frame
QUERY_PEAK = tl.constexpr(32000.0)  # largest integer of a query: high part at most 125


@triton.jit
def signs_of(i, j, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Elements (i, j), below SIZE, of `codec.frames.hadamard` in blocks of BLOCK, at most 256:
    bfloat16."""
    odd = i & j & (BLOCK - 1)
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    bits = (odd & 1) << 15 | 0x3F80  # of 1.0 or -1.0
    if BLOCK < SIZE:
        bits = tl.where(i // BLOCK == j // BLOCK, bits, 0)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def add_signed(x, signs, out, PTX: tl.constexpr):
    """out + x @ signs, to 2**-16 of x: in two pieces of bfloat16, which Triton's interpreter does
    not multiply."""
    if not PTX:
        return tl.dot(x, signs.to(tl.float32), out, input_precision="ieee")
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(high, signs, tl.dot(low, signs, out))


@triton.jit
def add_and_subtract(x):
    """[ROWS, n, 2, m] -> the sum and the difference of its pairs, of x's shape."""
    first, second = tl.split(tl.permute(x, (0, 1, 3, 2)))
    return tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))


@triton.jit
def turn_runs(x, OUTER: tl.constexpr):
    """The rest of a rotation whose blocks are OUTER of x's runs [ROWS, BANDS, RUN] wide."""
    ROWS: tl.constexpr = x.shape[0]
    RUN: tl.constexpr = x.shape[2]
    if OUTER > 1:
        x = tl.reshape(add_and_subtract(tl.reshape(x, [ROWS, 2, 2, RUN])), [ROWS, 4, RUN])
    if OUTER > 2:
        x = tl.reshape(add_and_subtract(tl.reshape(x, [ROWS, 1, 2, 2 * RUN])), [ROWS, 4, RUN])
    return x


@triton.jit(do_not_specialize=["batch", "stride"])  # one binary for all batches
def frame_queries(
    Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, HOT_BLOCK: tl.constexpr,
    BAND_BLOCK: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries into the key frames: ROWS queries of one KV head and a frame by every program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    frame_rows(
        Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale,
        tl.program_id(0), D, DP, G, HOT_BLOCK, BAND_BLOCK, ROWS, PTX,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "batch", "stride", "encoding"])
def encode_and_frame(
    Arena, PageBlocks, Loc, K, V, Places, HotCentre, Signs,
    num_tokens, k_row, k_head, v_row, v_head, centre_side, block_bytes,
    Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale, encoding,
    D: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    BITS: tl.constexpr, PAGE: tl.constexpr, RADII: tl.constexpr, TILE: tl.constexpr,
    H: tl.constexpr, TOKENS: tl.constexpr,
    DP: tl.constexpr, G: tl.constexpr, HOT_BLOCK: tl.constexpr, BAND_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The step's tokens into their pages by the first `encoding` programs, as
    `encode_tokens_kernel` does it, and its queries into the frames by the others.

    Neither waits for the other, and a launch that starts beside another one starts 1 us late.
    """
    if PDL:  # what comes next may start, and waits for the pages where it reads them
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < encoding:
        encode_rows(
            Arena, PageBlocks, Loc, K, V, Places, HotCentre, Signs,
            num_tokens, k_row, k_head, v_row, v_head, centre_side, block_bytes,
            program // 2 // kv_heads, program // 2 % kv_heads, program % 2,
            D, CODED, BLOCK, STAGES, BITS, PAGE, RADII, TILE, H, TOKENS,
        )  # fmt: skip
    else:
        frame_rows(
            Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale,
            program - encoding, D, DP, G, HOT_BLOCK, BAND_BLOCK, ROWS, PTX,
        )  # fmt: skip


@triton.jit
def frame_rows(
    Q, Channel, Weight, Centre, Parts, Units, Near, batch, q_row, kv_heads, stride, scale, program,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, HOT_BLOCK: tl.constexpr,
    BAND_BLOCK: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Queries into a key frame and to integers: ROWS queries of one KV head and a frame.

    Q       [batch, kv_heads * G, D], rows q_row apart; logits in base 2 are `scale` times q . k
    Channel int32, Weight float32 [2, kv_heads, D], picks of the key frames, whose rotations have
            blocks of HOT_BLOCK and BAND_BLOCK; Centre float32 [kv_heads, D]
    Near    float32 [batch, kv_heads * G], q . centre, base 2
    The rest by set, which are `stride` queries apart: in the hot frame, in the calibrated one by
    bands, in the calibrated one as a whole; [3, batch, kv_heads * G, ...]:
    Parts   int8 [..., 2, D], integers, their high then their low part: 256 * high + low
    Units   float32 [..., BANDS], what an integer of the band stands for, base 2; the same for all
            bands where the query has one unit
    """
    of_frame = program % 2
    head = program // 2 % kv_heads
    m = program // 2 // kv_heads * ROWS + tl.arange(0, ROWS)
    known = m < batch * G
    query = (m // G * kv_heads + head) * G + m % G
    row = Q + (m // G).to(tl.int64) * q_row + (head * G + m % G) * D
    # bands are padded on their own, so that they are a dimension; hot channels lie as they are
    RUN: tl.constexpr = DP // BANDS
    INNER: tl.constexpr = HOT_BLOCK if HOT_BLOCK < RUN else RUN
    place = tl.arange(0, DP)
    in_band = place % RUN
    d = tl.where(of_frame == 0, place, place // RUN * (D // BANDS) + in_band)
    real = tl.where(of_frame == 0, place, in_band) < tl.where(of_frame == 0, D, D // BANDS)
    # nothing here waits for anything else here
    picked = (of_frame * kv_heads + head) * D + d
    channel = tl.load(Channel + picked, mask=real, other=0)
    weight = tl.load(Weight + picked, mask=real, other=0.0) * scale
    centre = tl.load(Centre + head * D + place, mask=place < D, other=0.0)
    inside = known[:, None] & (place < D)[None, :]
    q = tl.load(row[:, None] + place[None, :], mask=inside, other=0.0).to(tl.float32)
    if of_frame == 0:
        tl.store(Near + query, tl.sum(q * centre[None, :], 1) * scale, mask=known)
    else:
        q = tl.gather(q, tl.broadcast_to(channel[None, :], [ROWS, DP]), 1)
    i, j = tl.arange(0, RUN)[:, None], tl.arange(0, RUN)[None, :]
    turn = tl.where(of_frame == 0, signs_of(i, j, RUN, INNER), signs_of(i, j, RUN, BAND_BLOCK))
    framed = tl.reshape(q * weight[None, :], [ROWS * BANDS, RUN])
    framed = add_signed(framed, turn, tl.zeros([ROWS * BANDS, RUN], tl.float32), PTX)
    by_band = tl.reshape(framed, [ROWS, BANDS, RUN])
    if of_frame == 0:
        by_band = turn_runs(by_band, HOT_BLOCK // INNER)
    peak = tl.max(tl.abs(by_band), 2)
    highest = tl.broadcast_to(tl.max(peak, 1)[:, None], [ROWS, BANDS])
    if of_frame == 0:
        store_integers(by_band, highest, Parts, Units, query, known, d, real, D)
    else:
        first = stride + query
        store_integers(by_band, peak, Parts, Units, first, known, d, real, D)
        store_integers(by_band, highest, Parts, Units, first + stride, known, d, real, D)


@triton.jit
def store_integers(
    by_band, peak, Parts, Units, query, known, d, real, D: tl.constexpr
):  # fmt: skip
    """Queries [ROWS, BANDS, PADDED] as integers, of which `peak` [ROWS, BANDS] becomes the largest,
    and their units."""
    ROWS: tl.constexpr = by_band.shape[0]
    PADDED: tl.constexpr = by_band.shape[2]
    per_unit = tl.where(peak > 0, QUERY_PEAK / peak, 1.0)
    query = query.to(tl.int64)
    at = (query * BANDS)[:, None] + tl.arange(0, BANDS)[None, :]
    tl.store(Units + at, 1.0 / per_unit, mask=known[:, None])
    whole = tl.floor(by_band * per_unit[:, :, None] + 0.5).to(tl.int32)
    whole = tl.reshape(whole, [ROWS, BANDS * PADDED])
    high = (whole + 128) >> 8
    inside = known[:, None] & real[None, :]
    target = Parts + query[:, None] * (2 * D) + d[None, :]
    tl.store(target, high.to(tl.int8), mask=inside)
    tl.store(target + D, (whole - (high << 8)).to(tl.int8), mask=inside)
