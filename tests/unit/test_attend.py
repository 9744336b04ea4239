"""Attention over codes against attention over what they decode to, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from cache_tools import head_frames, normal
from torch.utils._python_dispatch import TorchDispatchMode

from spherical_kernels.codec import pages as codec_pages
from spherical_kernels.codec.pages import decode_slices, encode_slices
from spherical_kernels.codec.patterns import PATTERNS, Pattern
from spherical_kernels.codec.slices import UNIT, read_codes, slice_layout, write_codes
from spherical_kernels.decode import reference
from spherical_kernels.decode.reference import (
    AttentionState,
    CodedSide,
    attend_entries,
    empty_state,
)
from spherical_kernels.extend import reference as extend_reference
from spherical_kernels.extend.reference import attend_new_tokens
from spherical_kernels.testing import assert_close

HOT, HOT4, WARM_KEYS, WARM_VALUES, *_ = PATTERNS
REQUESTS, HEADS = 3, 2
ROWS = REQUESTS * HEADS

# float32 against float64 on logits of a few units: a dot product of codes up to 255 loses its
# offset again, some 100 units in the last place of the logit, and softmax passes that on.
MAX_ERROR, RMS_ERROR = 2e-5, 5e-6


def pattern_id(pattern: Pattern) -> str:
    return f"{pattern.frame.value}-{pattern.name}"


@dataclass
class Entries:
    """Pages of one pair of patterns, and the row that each belongs to."""

    keys: CodedSide
    values: CodedSide
    row_of: torch.Tensor
    valid: torch.Tensor

    def attend(self, q: torch.Tensor) -> AttentionState:
        return attend_entries(q, self.keys, self.values, self.row_of, self.valid)


def make_side(
    pattern: Pattern, row_of: torch.Tensor, page_size: int, head_dim: int, seed: int
) -> CodedSide:
    """Random pages: unit normals around a centre of twice their size, one for every head."""
    layout = slice_layout(pattern, page_size, head_dim)
    frames = head_frames(pattern, HEADS, head_dim, seed)
    head = row_of % HEADS
    x = normal(len(row_of), page_size, head_dim, seed=seed) + frames.centre[head].unsqueeze(1)
    slices = encode_slices(layout, x, frames.matrix[head], frames.centre[head])
    return CodedSide(layout, slices, frames.dual, frames.centre)


def make_entries(
    keys: Pattern = HOT,
    values: Pattern = HOT,
    rows: tuple[int, ...] = (0, 0, 1, 2, 2, 2, 4, 5, 0, 4),
    valid: tuple[int, ...] | None = None,
    page_size: int = 16,
    head_dim: int = 64,
    seed: int = 0,
) -> Entries:
    """Entries in no particular order; with the default rows, row 3 has none."""
    row_of = torch.tensor(rows, dtype=torch.int64)
    counts = valid or tuple(page_size if i % 3 else 1 + i for i in range(len(rows)))
    return Entries(
        make_side(keys, row_of, page_size, head_dim, seed + 20),
        make_side(values, row_of, page_size, head_dim, seed + 40),
        row_of,
        torch.tensor(counts),
    )


def make_queries(group: int = 3, head_dim: int = 64, seed: int = 7) -> torch.Tensor:
    return 1.5 * head_dim**-0.5 * normal(ROWS, group, head_dim, seed=seed)


def decoded(side: CodedSide, row_of: torch.Tensor) -> torch.Tensor:
    head = row_of % HEADS
    return decode_slices(side.layout, side.slices, side.dual[head], side.centre[head]).double()


def decode_then_attend(q: torch.Tensor, groups: list[Entries]) -> AttentionState:
    """Softmax over all decoded keys of each row, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    parts = [
        (group, decoded(group.keys, group.row_of), decoded(group.values, group.row_of))
        for group in groups
    ]
    for row in range(len(q)):
        keys, values = [], []
        for group, k, v in parts:
            for entry in (group.row_of == row).nonzero().flatten().tolist():
                keys.append(k[entry, : group.valid[entry]])
                values.append(v[entry, : group.valid[entry]])
        if keys and sum(map(len, keys)):
            logits = q[row].double() @ torch.cat(keys).T
            out[row] = logits.softmax(-1) @ torch.cat(values)
            lse[row] = logits.logsumexp(-1)
    return AttentionState(out, lse)


def assert_same(actual: AttentionState, expected: AttentionState) -> None:
    attended = expected.lse > -torch.inf
    assert_close(actual.lse, expected.lse, max_error=MAX_ERROR, rms_error=RMS_ERROR, name="lse")
    # frames spread channels over a factor of 50: float32 is as exact as the largest of a sum
    largest = float(expected.out[attended].abs().max().clamp_min(1))
    assert_close(
        actual.out[attended],
        expected.out[attended],
        max_error=MAX_ERROR * largest,
        rms_error=RMS_ERROR * largest,
        name="out",
    )


# --- over codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("values", PATTERNS, ids=pattern_id)
@pytest.mark.parametrize("keys", PATTERNS, ids=pattern_id)
def test_equals_decode_then_attend(keys: Pattern, values: Pattern) -> None:
    entries, q = make_entries(keys, values), make_queries()
    assert_same(entries.attend(q), decode_then_attend(q, [entries]))


@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_equals_decode_then_attend_in_every_shape(page_size: int, head_dim: int) -> None:
    shape = {"page_size": page_size, "head_dim": head_dim}
    hot, warm = make_entries(**shape), make_entries(WARM_KEYS, WARM_VALUES, **shape)
    q = make_queries(head_dim=head_dim)
    for entries in (hot, warm):
        assert_same(entries.attend(q), decode_then_attend(q, [entries]))


@pytest.mark.parametrize("group", range(1, 9))
def test_every_query_head_of_a_group_attends_alone(group: int) -> None:
    entries, q = make_entries(WARM_KEYS, WARM_VALUES), make_queries(group)
    together = entries.attend(q)
    assert_same(together, decode_then_attend(q, [entries]))
    alone = entries.attend(q[:, -1:])
    assert_close(together.out[:, -1:], alone.out, max_error=1e-5, rms_error=1e-6)


def test_groups_of_different_patterns_merge_to_attention_over_all() -> None:
    groups = [
        make_entries(keys, values, seed=100 * i)
        for i, (keys, values) in enumerate(zip(PATTERNS, reversed(PATTERNS)))
    ]
    # The frames' kinds share a head's centre in the cache; here each group may have its own.
    q = make_queries()
    state = empty_state(q)
    for group in groups:
        state = state.merge(group.attend(q))
    assert_same(state, decode_then_attend(q, groups))


@pytest.mark.parametrize("valid", [(1,), (15,), (16,)])
def test_only_the_first_tokens_of_a_page_count(valid: tuple[int, ...]) -> None:
    entries, q = make_entries(rows=(2,), valid=valid), make_queries()
    assert_same(entries.attend(q), decode_then_attend(q, [entries]))


def test_a_single_token_is_returned_as_decoded() -> None:
    entries, q = make_entries(rows=(1,), valid=(1,)), make_queries()
    expected = decoded(entries.values, entries.row_of)[0, :1].expand(3, -1)
    assert_close(entries.attend(q).out[1], expected, max_error=1e-5, rms_error=2e-6)


def test_nothing_to_attend_to() -> None:
    q = make_queries()
    empty = empty_state(q)
    for entries in (make_entries(rows=(), valid=()), make_entries(rows=(0, 4), valid=(0, 0))):
        state = entries.attend(q)
        assert bool((state.lse == -torch.inf).all())
        assert bool(state.out.isfinite().all()), "weighted by zero in a merge"
        assert bool((state.merge(empty).lse == -torch.inf).all())
    some = make_entries().attend(q)
    for merged in (some.merge(empty), empty.merge(some), some.merge(state), state.merge(some)):
        assert torch.equal(merged.lse, some.lse)
        assert_close(
            merged.out[some.lse > -torch.inf],
            some.out[some.lse > -torch.inf],
            max_error=0,
            rms_error=0,
        )


def poison_tail(side: CodedSide, valid: torch.Tensor) -> CodedSide:
    """The same pages with all ones in the codes and radii of tokens that do not exist."""
    slices, layout = side.slices.clone(), side.layout
    tail = torch.arange(layout.page_size) >= valid.unsqueeze(1)  # [entries, page_size]
    codes = read_codes(layout, slices).to(torch.uint8)
    worst = torch.tensor([2**bits - 1 for bits in layout.pattern.bits], dtype=torch.uint8)
    codes = torch.where(tail[:, None, :, None], worst.view(1, -1, 1, 1), codes)
    write_codes(layout, slices, codes)
    start = layout.radii_offset_bytes
    radii = slices[:, start : start + layout.radii_bytes]
    token_bytes = radii.unflatten(1, (layout.page_size, -1))
    token_bytes[tail] = 0xFF  # float16 NaN on hot pages
    return CodedSide(layout, slices, side.dual, side.centre)


@pytest.mark.parametrize("pattern", [HOT, HOT4, WARM_KEYS], ids=pattern_id)
def test_bytes_of_unwritten_tokens_change_nothing(pattern: Pattern) -> None:
    entries, q = make_entries(pattern, pattern), make_queries()
    poisoned = Entries(
        poison_tail(entries.keys, entries.valid),
        poison_tail(entries.values, entries.valid),
        entries.row_of,
        entries.valid,
    )
    assert not torch.equal(poisoned.keys.slices, entries.keys.slices)
    clean, state = entries.attend(q), poisoned.attend(q)
    assert torch.equal(state.out, clean.out)
    assert torch.equal(state.lse, clean.lse)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("pattern", [HOT, HOT4, WARM_KEYS, WARM_VALUES], ids=pattern_id)
def test_a_token_that_is_nan_shows_in_its_row_only(pattern: Pattern, side: str) -> None:
    entries, q = make_entries(pattern, pattern), make_queries()
    clean = entries.attend(q)
    coded = getattr(entries, side)
    layout = coded.layout
    # What the encoder makes of it: the token's radius, or the unit of all radii of the page.
    place = layout.scales_offset_bytes + 2 * UNIT if layout.calibrated else 2 * 3
    coded.slices.view(torch.float16)[4, place // 2] = torch.nan  # of row 2, full
    state = entries.attend(q)
    assert int(entries.row_of[4]) == 2
    assert int(entries.valid[4]) == layout.page_size
    assert bool(state.out[2].isnan().all())
    others = torch.arange(ROWS) != 2
    assert torch.equal(state.out[others], clean.out[others])
    assert torch.equal(state.lse[others], clean.lse[others])


@pytest.mark.parametrize("pair", [(HOT, HOT), (WARM_KEYS, WARM_VALUES)], ids=str)
def test_chunks_merge_to_the_whole(
    pair: tuple[Pattern, Pattern], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, q = make_entries(*pair), make_queries()
    whole = entries.attend(q)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    parts = entries.attend(q)
    some = whole.lse > -torch.inf
    # The same logits; their exponentials are summed in another order.
    assert_close(parts.lse, whole.lse, max_error=1e-5, rms_error=1e-6)
    assert_close(parts.out[some], whole.out[some], max_error=1e-5, rms_error=2e-6)


def test_logits_far_beyond_the_exponent_range() -> None:
    """Keys with an outlier channel give logits of hundreds: no overflow, and the peak wins."""
    entries, q = make_entries(), make_queries()
    state, expected = entries.attend(200 * q), decode_then_attend(200 * q, [entries])
    some = expected.lse > -torch.inf
    assert float(expected.lse[some].abs().max()) > 200
    # Relative float32 error of logits this large.
    assert_close(
        state.lse[some] / expected.lse[some],
        torch.ones(1).expand(int(some.sum())),
        max_error=1e-5,
        rms_error=1e-5,
    )
    assert bool(state.out.isfinite().all())


# --- what attention must not do ------------------------------------------------------------------


def test_no_key_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("attention decoded a slice")

    entries, q = make_entries(WARM_KEYS, WARM_VALUES), make_queries()
    for module in (codec_pages, reference):
        monkeypatch.setattr(module, "decode_slices", refuse, raising=False)
    entries.attend(q)


class TokenNorms(TorchDispatchMode):
    """Lengths of the [entries, page_size, d] tokens that any operation has put out."""

    def __init__(self, entries: int, page_size: int, bands: int) -> None:
        super().__init__()
        self.shape = entries, bands, page_size, -1
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        entries, bands, page_size, _ = self.shape
        computed = "empty" not in str(func)  # memory not yet written may hold anything
        if computed and isinstance(out, torch.Tensor) and out.is_floating_point():
            for shape in ((entries, bands, page_size, -1), (entries, 1, page_size, -1)):
                if out.numel() % (shape[0] * shape[1] * page_size) == 0 and out.numel() > 0:
                    norms = out.detach().float().reshape(shape).norm(dim=-1)
                    self.seen.append(norms.square().sum(1).sqrt())
        return out


@pytest.mark.parametrize("pattern", [HOT, WARM_KEYS], ids=pattern_id)
def test_no_operation_puts_out_a_key(pattern: Pattern) -> None:
    """A rebuilt key would show by its length, in whatever rotation, centred or not."""
    entries, q = make_entries(pattern, pattern, valid=(16,) * 10), make_queries()
    head = entries.row_of % HEADS
    x = decoded(entries.keys, entries.row_of).float()
    centred = x - entries.keys.centre[head].unsqueeze(1)
    framed = centred @ torch.linalg.inv(entries.keys.dual[head])
    rebuilt = {"key": x, "centred key": centred, "key in its frame": framed}
    layout = entries.keys.layout
    with TokenNorms(10, 16, layout.bands) as norms:
        entries.attend(q)
    assert len(norms.seen) > 5
    for name, tensor in rebuilt.items():
        lengths = tensor.norm(dim=-1)
        for seen in norms.seen:
            assert not torch.allclose(seen, lengths, rtol=1e-2), name
    with TokenNorms(10, 16, layout.bands) as norms:  # and this test would see one
        decode_slices(
            layout, entries.keys.slices, entries.keys.dual[head], entries.keys.centre[head]
        )
    assert any(torch.allclose(seen, x.norm(dim=-1), rtol=1e-2) for seen in norms.seen)


# --- merging -------------------------------------------------------------------------------------


def test_merging_is_commutative_and_associative() -> None:
    a, b, c = (
        AttentionState(normal(4, 3, 8, seed=i), 20 * normal(4, 3, seed=i + 9)) for i in range(3)
    )
    pairs = [(a.merge(b), b.merge(a)), (a.merge(b).merge(c), a.merge(b.merge(c)))]
    for one, other in pairs:
        # Convex combinations of units, with lse up to 60: float32 keeps 4e-6 of the exponent.
        assert_close(one.out, other.out, max_error=5e-5, rms_error=1e-5)
        assert_close(one.lse, other.lse, max_error=2e-5, rms_error=5e-6)


# --- new tokens ----------------------------------------------------------------------------------


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense attention in float64; the queries are the last ones. q [heads, group, n, d]."""
    n, past = q.shape[2], k.shape[1]
    mask = torch.ones(n, past).tril(past - n).bool()
    return torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double().unsqueeze(1), v.double().unsqueeze(1), attn_mask=mask, scale=1.0
    )


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_new_tokens_attend_causally(
    tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extend_reference, "QUERY_ROWS", rows)
    q = 1.5 / 8 * normal(2, 3, tokens, 64, seed=1)
    k, v = normal(2, tokens, 64, seed=2), normal(2, tokens, 64, seed=3)
    state = attend_new_tokens(q, k, v)
    expected = causal(q, k, v).flatten(1, 2)
    assert_close(state.out, expected, max_error=1e-5, rms_error=1e-6)
    first = (q[:, :, 0] * k[:, None, 0]).sum(-1)  # the first token sees itself alone
    assert_close(state.lse.view(2, 3, -1)[..., 0], first, max_error=1e-5, rms_error=1e-6)


@pytest.mark.parametrize("prefix", [1, 16, 37])
@pytest.mark.parametrize("pair", [(HOT, HOT), (WARM_KEYS, WARM_VALUES)], ids=str)
def test_a_coded_prefix_and_new_tokens_merge_to_causal_attention(
    pair: tuple[Pattern, Pattern], prefix: int
) -> None:
    """One request; the dense side uses the decoded prefix, so only float32 lies between them."""
    tokens, group = 9, 3
    pages = math.ceil(prefix / 16)
    rows = tuple(head for _ in range(pages) for head in range(HEADS))
    valid = tuple(min(16, prefix - 16 * (i // HEADS)) for i in range(len(rows)))
    entries = make_entries(*pair, rows=rows, valid=valid)
    q = 1.5 / 8 * normal(HEADS, group, tokens, 64, seed=1)
    k, v = normal(HEADS, tokens, 64, seed=2), normal(HEADS, tokens, 64, seed=3)
    state = attend_new_tokens(q, k, v).merge(entries.attend(q.flatten(1, 2)))
    past = [
        torch.cat(
            [
                decoded(side, entries.row_of)[head::HEADS].flatten(0, 1)[:prefix].unsqueeze(0)
                for head in range(HEADS)
            ]
        )
        for side in (entries.keys, entries.values)
    ]
    expected = causal(q, *(torch.cat([old, new.double()], 1) for old, new in zip(past, (k, v))))
    assert_close(state.out, expected.flatten(1, 2), max_error=MAX_ERROR, rms_error=RMS_ERROR)
