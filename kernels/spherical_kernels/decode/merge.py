# mypy: ignore-errors
"""Triton body after the pages: the items of every request into one output, out of the frames."""

from __future__ import annotations

import triton
import triton.language as tl

from .framing import BANDS, add_and_subtract

NONE = tl.constexpr(-1e30)  # the maximum of no logits
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def turn(x, BLOCK: tl.constexpr):
    """x [ROWS, n] times `codec.frames.hadamard` in blocks of BLOCK, at most 256."""
    for step in tl.static_range(8):
        x = turn_pairs(x, 1 << step, BLOCK)
    return x


@triton.jit
def turn_pairs(x, APART: tl.constexpr, BLOCK: tl.constexpr):
    """The step of a rotation that takes channels APART from each other together."""
    ROWS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    RUN: tl.constexpr = 4  # channels that a lane loads at once, and then holds
    LANES: tl.constexpr = 32 if SIZE > 32 * RUN else SIZE // RUN
    if APART < BLOCK:
        if APART >= RUN and APART < LANES * RUN:  # two lanes shuffle, nothing goes through memory
            lane = tl.arange(0, LANES)[None, :, None]
            runs = tl.reshape(x, [ROWS * SIZE // (LANES * RUN), LANES, RUN])
            other = tl.gather(runs, tl.broadcast_to(lane ^ (APART // RUN), runs.shape), 1)
            sign = tl.where((lane & (APART // RUN)) == 0, 1.0, -1.0)
            x = tl.reshape(other + runs * sign, [ROWS, SIZE])
        else:
            pairs = tl.reshape(x, [ROWS, SIZE // (2 * APART), 2, APART])
            x = tl.reshape(add_and_subtract(pairs), [ROWS, SIZE])
    return x


@triton.jit
def fours(x):
    """[ROWS, n] -> four of [ROWS, n / 4], every fourth column: of each a lane holds one."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_items(
    Partial, Lse, item, end, column, real, ROW: tl.constexpr, D: tl.constexpr,
    ROUNDS: tl.constexpr, ABREAST: tl.constexpr,
):  # fmt: skip
    """Logarithms [ITEMS] and channels [ITEMS, columns] of the items from `item` on, below `end`,
    which are ROW rows apart, in the order of `number_items`."""
    i = tl.arange(0, ABREAST)[:, None]
    n = tl.arange(0, ROUNDS)[None, :]
    inside = n * ABREAST < end - item - i
    first = tl.full([], ROW, tl.int64) * item
    # rounds lie at constant distances, so that none of them needs addresses of its own
    logs = tl.load(Lse + first + i * ROW + n * (ABREAST * ROW), mask=inside, other=-float("inf"))
    parts = Partial + first * D + (i * (ROW * D))[:, :, None] + column[None, None, :]
    parts += (n * (ABREAST * ROW * D))[:, :, None]
    parts = tl.load(parts, mask=inside[:, :, None] & real[None, None, :], other=0.0)
    ITEMS: tl.constexpr = ABREAST * ROUNDS
    return tl.reshape(logs, [ITEMS]), tl.reshape(parts, [ITEMS, column.shape[0]])


@triton.jit
def number_items(ROUNDS: tl.constexpr, ABREAST: tl.constexpr):
    """Which of a tile's items is where: those that one load of all lanes takes are neighbours."""
    i = tl.arange(0, ABREAST * ROUNDS)
    return i // ROUNDS + i % ROUNDS * ABREAST


@triton.jit
def weigh(logs, top):
    """What items with logarithms [ITEMS] weigh, the new maximum [1], and what sums so far fade
    by."""
    higher = tl.maximum(top, tl.max(logs, 0))
    return tl.exp2(logs - higher), higher, tl.exp2(top - higher)


@triton.jit
def add_items(parts, share):
    """[ITEMS, n] times what they weigh -> [1, n]."""
    return tl.sum(parts * share[:, None], 0)[None, :]


@triton.jit
def add_tiles(
    parts, share, top, fade, Partial, Lse, first, end, column, real, ROW: tl.constexpr,
    D: tl.constexpr, ROUNDS: tl.constexpr, ABREAST: tl.constexpr,
):  # fmt: skip
    """Sums [1, columns] and mass [1] of the items in [first, end), and the maximum of their
    logarithms; the first tile and what it weighs were asked for before."""
    ITEMS: tl.constexpr = ROUNDS * ABREAST
    sums = tl.zeros([1, column.shape[0]], tl.float32)
    mass = tl.zeros([1], tl.float32)
    for item in range(first, end, ITEMS):
        sums = sums * fade + add_items(parts, share)
        mass = mass * fade + tl.sum(share, 0)
        if item + ITEMS < end:
            logs, parts = load_items(
                Partial, Lse, item + ITEMS, end, column, real, ROW, D, ROUNDS, ABREAST
            )
            share, top, fade = weigh(logs, top)
    return sums, mass, top


@triton.jit
def merge_rows(
    Partial, Lse, ItemStart, HotItems, Channel, Weight, Centre, Near, Out, OutLse,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr,
    HOT_BLOCK: tl.constexpr, BAND_BLOCK: tl.constexpr, TAKEN: tl.constexpr, ROUNDS: tl.constexpr,
    ABREAST: tl.constexpr, HOT_ROUNDS: tl.constexpr, HOT_ABREAST: tl.constexpr,
    HOT: tl.constexpr, CALIBRATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The channels of TAKEN bands, all or one, of the output of a request and query head by every
    program.

    Partial    float32 [items, KV_HEADS, G, D], in the value frames; Lse likewise, base 2
    ItemStart  int32 [requests + 1], HotItems int32 [requests]
    Channel    int32, Weight float32 [2, KV_HEADS, D], picks of the value frames, whose rotations
               have blocks of HOT_BLOCK and BAND_BLOCK; Centre float32 [KV_HEADS, D]
    Near       float32 [requests, KV_HEADS * G], q . centre of the keys, base 2
    Out        [requests, KV_HEADS * G, D], zero without items; OutLse float32, natural
    ROUNDS * ABREAST  items of a request at once, HOT_ROUNDS * HOT_ABREAST hot ones where these have
               more channels or others: ABREAST for each load of all lanes
    HOT, CALIBRATED  whether items may be of the frame
    """
    head = tl.program_id(0) % KV_HEADS
    request = tl.program_id(0) // KV_HEADS
    own_head = head * G + tl.program_id(2)
    # what does not depend on the kernel before comes first: the plan was ready long ago
    first = tl.load(ItemStart + request)
    end = tl.load(ItemStart + request + 1)
    middle = end
    if CALIBRATED:
        middle = first
        if HOT:
            middle += tl.load(HotItems + request)
    RUN: tl.constexpr = DP // BANDS
    WIDTH: tl.constexpr = D // BANDS
    COLUMNS: tl.constexpr = TAKEN * RUN
    column = tl.arange(0, COLUMNS)
    real = column % RUN < WIDTH
    column = (tl.program_id(1) * TAKEN + column // RUN) * WIDTH + column % RUN
    # bands of the calibrated frame are of any channels, and these take all of the hot frame
    channel = column
    if CALIBRATED:
        channel = tl.load(Channel + (KV_HEADS + head) * D + column, mask=real, other=0)
        weight = tl.load(Weight + (KV_HEADS + head) * D + column, mask=real, other=0.0)
    hot_weight = tl.load(Weight + head * D + channel, mask=real, other=0.0)
    centre = tl.load(Centre + head * D + channel, mask=real, other=0.0)
    query = request * (KV_HEADS * G) + own_head
    if PDL:
        tl.extra.cuda.gdc_wait()

    # a tile and its weights ahead of the loop that adds it up: of all that is on its way from one
    # block to another ptxas waits for the last, so weights would wait for the tile
    near = tl.load(Near + query)
    ROW: tl.constexpr = KV_HEADS * G
    Partial += own_head * D
    Lse += own_head
    place = tl.arange(0, DP)
    ITEMS: tl.constexpr = ROUNDS * ABREAST
    top = tl.full([1], NONE, tl.float32)
    mass = tl.zeros([1], tl.float32)
    hot_sums = tl.zeros([1, DP], tl.float32)
    sums = tl.zeros([1, COLUMNS], tl.float32)
    if HOT and CALIBRATED and TAKEN == BANDS and D == DP:  # items of both frames lie alike
        logs, parts = load_items(
            Partial, Lse, first, end, place, place < D, ROW, D, ROUNDS, ABREAST
        )  # fmt: skip
        share, top, fade = weigh(logs, top)
        for item in range(first, end, ITEMS):
            hot_sums *= fade
            sums *= fade
            hot = number_items(ROUNDS, ABREAST) < middle - item
            if item < middle:
                hot_sums += add_items(parts, tl.where(hot, share, 0.0))
            if item + ITEMS > middle:
                sums += add_items(parts, tl.where(hot, 0.0, share))
            mass = mass * fade + tl.sum(share, 0)
            if item + ITEMS < end:
                logs, parts = load_items(
                    Partial, Lse, item + ITEMS, end, place, place < D, ROW, D, ROUNDS, ABREAST
                )  # fmt: skip
                share, top, fade = weigh(logs, top)
    else:
        hot_top, hot_mass = top, mass
        if CALIBRATED:
            logs, parts = load_items(
                Partial, Lse, middle, end, column, real, ROW, D, ROUNDS, ABREAST
            )
        if HOT:
            hot_logs, hot_parts = load_items(
                Partial, Lse, first, middle, place, place < D, ROW, D, HOT_ROUNDS, HOT_ABREAST
            )
        if CALIBRATED:
            share, top, fade = weigh(logs, top)
        if HOT:
            hot_share, hot_top, hot_fade = weigh(hot_logs, hot_top)
        if CALIBRATED:
            sums, mass, top = add_tiles(
                parts, share, top, fade, Partial, Lse, middle, end, column, real, ROW, D, ROUNDS,
                ABREAST,
            )  # fmt: skip
        if HOT:
            hot_sums, hot_mass, hot_top = add_tiles(
                hot_parts, hot_share, hot_top, hot_fade, Partial, Lse, first, middle, place,
                place < D, ROW, D, HOT_ROUNDS, HOT_ABREAST,
            )  # fmt: skip
        both = tl.maximum(top, hot_top)
        fade, hot_fade = tl.exp2(top - both), tl.exp2(hot_top - both)
        top, mass = both, mass * fade + hot_mass * hot_fade
        sums *= fade
        hot_sums *= hot_fade

    lse = (top + tl.log2(mass) + near) * LN_2
    lse = tl.where(mass > 0, lse, -float("inf"))
    tl.store(OutLse + query + tl.arange(0, 1), lse, mask=tl.program_id(1) == 0)
    out = tl.zeros([1, COLUMNS], tl.float32)
    if CALIBRATED:
        out = turn(sums, BAND_BLOCK) * weight[None, :]
    if HOT:  # noqa: SIM102
        if first < middle:
            out += tl.gather(turn(hot_sums, HOT_BLOCK), channel[None, :], 1) * hot_weight[None, :]
    out = out * tl.where(mass == 0, 0.0, 1.0 / mass)  # NaN stays
    out = tl.where(mass == 0, 0.0, out + centre[None, :])
    numbers = fours(out.to(Out.dtype.element_ty))
    channels, inside = fours(channel[None, :]), fours(real[None, :])
    target = Out + query.to(tl.int64) * D
    for n in tl.static_range(4):  # channels lie in any order: no two are stored together
        tl.store(target + channels[n], numbers[n], mask=inside[n])
