"""The attention backend on a small pool, called as SGLang's model runner calls it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from backend_tools import DIM, GROUP, HEADS, LAYERS, PAGE, Prompt, Runner, dense
from cache_tools import Layer
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_spherical.attention.plan import ReadPlan
from sglang_spherical.pool.arena import KEYS, VALUES
from spherical_kernels.codec.pages import decode_slices, encode_slices
from spherical_kernels.codec.patterns import PATTERN_ID, PATTERNS, FrameKind
from spherical_kernels.codec.slices import slice_layout
from spherical_kernels.testing import assert_close

# Against dense attention: 8-bit keys and values of unit spread have steps of about 3.5/127.5, rms
# 0.008; a logit moves by as much (unit queries, scale 1/sqrt(d)), an output by both at most.
HOT_MAX, HOT_RMS = 0.06, 0.012
# Against attention over the same codes, decoded: float32.
SAME_MAX, SAME_RMS = 2e-5, 3e-6


def assert_dense(prompt: Prompt, out: torch.Tensor, start: int) -> None:
    end = start + out.shape[1]
    expected = dense(prompt, start, end, prompt.k, prompt.v)
    assert_close(out, expected, max_error=HOT_MAX, rms_error=HOT_RMS)


# --- extend --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[150], [70, 33, 47], [64, 64, 22], [66, 1, 83]], ids=str)
def test_a_prompt_in_chunks_is_causal_attention(chunks: list[int]) -> None:
    runner, prompt = Runner(), Prompt(1, seed=1)
    outs = [runner.extend((prompt, count))[0] for count in chunks]
    assert_dense(prompt, torch.cat(outs, 1), 0)
    # The first chunk has no prefix, so that nothing of it goes through codes.
    first = dense(prompt, 0, chunks[0], prompt.k, prompt.v)
    assert_close(outs[0], first, max_error=SAME_MAX, rms_error=SAME_RMS)


def test_a_chunk_reads_its_prefix_from_codes_and_itself_exactly() -> None:
    runner, prompt = Runner(), Prompt(1, seed=1)
    runner.extend((prompt, 70))
    past_k, past_v = runner.cached(prompt)
    (out,) = runner.extend((prompt, 25))
    k = torch.cat([past_k, prompt.k[:, 70:95]], 1)
    v = torch.cat([past_v, prompt.v[:, 70:95]], 1)
    assert_close(out, dense(prompt, 70, 95, k, v), max_error=SAME_MAX, rms_error=SAME_RMS)


def test_a_batch_of_mixed_lengths_is_as_many_single_ones() -> None:
    runner = Runner()
    prompts = [Prompt(slot, seed=10 * slot) for slot in (3, 1, 4, 2)]
    runner.extend((prompts[0], 80), (prompts[1], 5))
    outs = runner.extend((prompts[0], 20), (prompts[2], 64), (prompts[1], 1), (prompts[3], 17))
    for prompt, out, start in zip(
        (prompts[0], prompts[2], prompts[1], prompts[3]), outs, (80, 0, 5, 0)
    ):
        assert_dense(prompt, out, start)


def test_prefills_tell_what_heads_read_to_copy() -> None:
    """Token ids reach the statistics: in these prompts every token comes again."""
    runner = Runner()
    runner.extend((Prompt(1, seed=1), 5 * PAGE), (Prompt(2, seed=2), 4 * PAGE))
    seen = runner.pool.frames.statistics
    assert bool((seen.copy_count > 0).all())
    assert bool((seen.copy_square > 0).all()) and bool((seen.copy_square < seen.read_square).all())


def test_nothing_is_written_without_leave() -> None:
    runner, prompt = Runner(), Prompt(1, seed=1)
    runner.extend((prompt, 70))
    before = runner.pool.arena.bytes.clone()
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=torch.tensor([1]),
        seq_lens=torch.tensor([70]),
        out_cache_loc=torch.tensor([999]),
    )
    runner.backend.init_forward_metadata(batch)
    q, k, v = (x[0, 69:70].flatten(1) for x in (prompt.q, prompt.k, prompt.v))
    layer = Layer(0, HEADS, GROUP, DIM)
    out = runner.backend.forward_decode(q, k, v, layer, batch, save_kv_cache=False)
    assert torch.equal(runner.pool.arena.bytes, before)
    expected = dense(prompt, 69, 70, prompt.k, prompt.v)[0]
    assert_close(out.view(1, -1, DIM), expected, max_error=HOT_MAX, rms_error=HOT_RMS)


# --- decode --------------------------------------------------------------------------------------


def test_decode_steps_across_page_boundaries() -> None:
    """Lengths 70 and 93, then 40 steps: both open pages, at different steps."""
    runner, prompts = Runner(), [Prompt(1, seed=1), Prompt(2, seed=2)]
    runner.extend((prompts[0], 70), (prompts[1], 93))
    for step in range(40):
        outs = runner.decode(*prompts)
        for prompt, out in zip(prompts, outs):
            assert_dense(prompt, out, prompt.length - 1)
            if step % 13 == 0:
                expected = dense(prompt, prompt.length - 1, prompt.length, *runner.cached(prompt))
                assert_close(out, expected, max_error=SAME_MAX, rms_error=SAME_RMS)


def test_decoding_is_the_same_in_any_batch() -> None:
    alone, together = Runner(), Runner()
    outs = []
    for runner, slots in ((alone, [1]), (together, [1, 2, 3])):
        prompts = [Prompt(slot, seed=slot) for slot in slots]
        runner.extend((prompts[0], 90))
        for prompt in prompts[1:]:
            runner.extend((prompt, 30 * prompt.slot))
        outs.append(runner.decode(*prompts)[0])
    assert_close(outs[1], outs[0], max_error=1e-5, rms_error=1e-6)


def test_padding_rows_change_nothing() -> None:
    """Padded rows write to and read from page 0, whose bytes may be anything."""
    plain, padded = Runner(), Runner()
    outs = []
    for runner, padding in ((plain, 0), (padded, 3)):
        prompts = [Prompt(1, seed=1), Prompt(2, seed=2)]
        runner.extend((prompts[0], 70), (prompts[1], 33))
        outs.append(runner.decode(*prompts, padding=padding))
    for one, other in zip(*outs):
        assert_close(other, one, max_error=1e-5, rms_error=1e-6)
    for slot in (1, 2):
        prompts = Prompt(slot, seed=slot)
        prompts.length = 71 if slot == 1 else 34
        for x, y in zip(plain.cached(prompts), padded.cached(prompts)):
            assert torch.equal(x, y)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_request_that_is_not_finite_stays_alone(bad: float) -> None:
    runner, healthy, ill = Runner(), Prompt(1, seed=1), Prompt(2, seed=2)
    runner.extend((healthy, 70))
    ill.k[:, 40] = bad
    first, second = runner.extend((healthy, 5), (ill, 60))
    assert_dense(healthy, first, 70)
    assert bool(second[:, 40:].isnan().any(-1).all()), "who attends to it sees it"
    for _ in range(20):
        good, loud = runner.decode(healthy, ill)
        assert_dense(healthy, good, healthy.length - 1)
        assert bool(loud.isnan().all())


def test_bfloat16_in_and_out() -> None:
    runner, prompt = Runner(dtype=torch.bfloat16), Prompt(1, seed=1)
    prompt.q, prompt.k, prompt.v = (x.bfloat16().float() for x in (prompt.q, prompt.k, prompt.v))
    outs = [runner.extend((prompt, 70))[0], runner.extend((prompt, 9))[0], runner.decode(prompt)[0]]
    expected = dense(prompt, 0, 80, prompt.k, prompt.v)
    # An output of up to 6 is rounded to 8 bits: 2**-7 of it at most.
    assert_close(torch.cat(outs, 1), expected, max_error=HOT_MAX + 0.03, rms_error=HOT_RMS + 0.01)


# --- levels --------------------------------------------------------------------------------------


def lowered(runner: Runner, prompt: Prompt, level: int, pages: slice = slice(1, 4)) -> None:
    runner.allocator.lower(runner.pages(prompt)[pages], 0, level)


@pytest.mark.parametrize("level", [1, 2])
def test_a_lowered_prefix_is_attended_to_as_it_decodes(level: int) -> None:
    """Hot and lowered pages in one prefix, read by a chunk and by a decode step."""
    runner, prompt = Runner(), Prompt(1, seed=1)
    runner.extend((prompt, 90))
    lowered(runner, prompt, level)
    past = [
        torch.cat([x, y[:, 90:]], 1) for x, y in zip(runner.cached(prompt), (prompt.k, prompt.v))
    ]
    (chunk,) = runner.extend((prompt, 10))
    assert_close(chunk, dense(prompt, 90, 100, *past), max_error=SAME_MAX, rms_error=SAME_RMS)
    (step,) = runner.decode(prompt)
    expected = dense(prompt, 100, 101, *runner.cached(prompt))
    assert_close(step, expected, max_error=SAME_MAX, rms_error=SAME_RMS)


def test_a_lowered_prefix_still_says_what_the_prompt_said() -> None:
    """Half of the tokens at a level; errors against dense attention grow with it, within reason.

    A warm token is off by about 0.12 of its spread and a cold one by 0.33, in keys and values;
    some 40 tokens with weight average it down.
    """
    errors = []
    for level in (0, 1, 2):
        runner, prompt = Runner(), Prompt(1, seed=1)
        runner.extend((prompt, 90))
        if level:
            lowered(runner, prompt, level)
        (out,) = runner.extend((prompt, 40))
        expected = dense(prompt, 90, 130, prompt.k, prompt.v)
        errors.append(float((out - expected).square().mean().sqrt()))
        centred = expected - expected.mean(1, keepdim=True), out - out.mean(1, keepdim=True)
        alike = torch.nn.functional.cosine_similarity(
            centred[0].flatten(), centred[1].double().flatten(), dim=0
        )
        assert float(alike) > (0.999, 0.98, 0.9)[level]
    assert errors[0] < errors[1] < errors[2]
    assert errors[1] < 0.06
    assert errors[2] < 0.15


def test_heads_of_a_page_may_have_patterns_of_their_own() -> None:
    """What retention will do later: the reader takes every slice by its own descriptor."""
    runner, prompt = Runner(), Prompt(1, seed=1)
    runner.extend((prompt, 90))
    pool, pages = runner.pool, runner.pages(prompt)
    pool.frames.calibrate()
    coarser = [i for i, pattern in enumerate(PATTERNS) if pattern.frame is FrameKind.CALIBRATED]
    patterns, addresses = pool.arena.locate(pages)
    for turn, (layer, page, head, side) in enumerate(
        [(0, 0, 1, KEYS), (0, 2, 0, VALUES), (0, 2, 1, KEYS), (1, 1, 0, KEYS), (1, 4, 1, VALUES)]
    ):
        pattern = PATTERNS[coarser[turn % len(coarser)]]
        hot = pool.layout.side_layouts(0)[side]
        own = slice_layout(pattern, PAGE, DIM)
        at = addresses[layer, page, head, side].view(1)
        centre = pool.frames.centre[side, layer, head].view(1, -1)
        rotation = pool.frames.rotation.unsqueeze(0)
        x = decode_slices(hot, pool.arena.read_slices(hot, at), rotation, centre)
        matrix = pool.frames.matrices(pattern.frame, layer, side)[head].unsqueeze(0)
        pool.arena.write_slices(own, at, encode_slices(own, x, matrix, centre))
        word = int(pool.arena.descriptors[layer, pages[page], head, side])
        assert word & 15 == int(patterns[layer, page, head, side])
        pool.arena.descriptors[layer, pages[page], head, side] = (
            word - (word & 15) + PATTERN_ID[pattern]
        )
    (out,) = runner.decode(prompt)
    expected = dense(prompt, 90, 91, *runner.cached(prompt))
    assert_close(out, expected, max_error=SAME_MAX, rms_error=SAME_RMS)
    plan = ReadPlan.for_lengths(
        pool.arena, pool.frames, runner.req_to_token, torch.tensor([1]), torch.tensor([91])
    )
    assert len(plan.groups(0)) > 1
    for layer in range(LAYERS):
        rows = torch.cat([group.row_of for group in plan.groups(layer)])
        assert rows.bincount().tolist() == [6, 6], "every page of every head once"


def test_a_plan_covers_each_token_of_each_request_once() -> None:
    runner, prompts = Runner(), [Prompt(1, seed=1), Prompt(2, seed=2), Prompt(3, seed=3)]
    runner.extend((prompts[0], 70), (prompts[1], 16), (prompts[2], 33))
    lowered(runner, prompts[0], 1)
    lengths = torch.tensor([70, 16, 0, 33])
    plan = ReadPlan.for_lengths(
        runner.pool.arena,
        runner.pool.frames,
        runner.req_to_token,
        torch.tensor([1, 2, 5, 3]),
        lengths,
    )
    for layer in range(LAYERS):
        tokens = torch.zeros(4 * HEADS, dtype=torch.int64)
        for group in plan.groups(layer):
            tokens.index_add_(0, group.row_of, group.valid)
        assert tokens.view(4, HEADS).T.tolist() == [lengths.tolist()] * HEADS
