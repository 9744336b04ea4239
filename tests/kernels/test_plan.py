"""The plan kernels against plain loops."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from spherical_kernels.plan.launch import PlanTables, most_items, page_costs, plan_pages
from spherical_kernels.testing import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE, KINDS, FEWEST = 16, 3, 4
COSTS = [1.2, 1.0, 0.8]
START = 3  # what an item costs beside its pages


class Batch:
    """Requests of random pages and levels; `lengths` tokens each."""

    def __init__(
        self,
        lengths: list[int],
        max_batch: int,
        max_pages: int,
        max_items: int,
        wave: int | None = None,
    ) -> None:
        self.wave = wave or max_items
        rng = torch.Generator().manual_seed(sum(lengths) + len(lengths))
        self.lengths = lengths
        pages = [-(-length // PAGE) for length in lengths]
        total = sum(pages)
        self.level = torch.randint(0, KINDS, (total + 1,), generator=rng).to(torch.uint8)
        ids = torch.randperm(total, generator=rng) + 1
        self.slots = torch.randperm(len(lengths) + 2, generator=rng)[: len(lengths)]
        self.table = torch.full((len(lengths) + 2, max_pages * PAGE + 5), 0, dtype=torch.int32)
        self.pages = list(ids.split(pages))
        for slot, mine, length in zip(self.slots, self.pages, lengths):
            loc = (mine.unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()[:length]
            self.table[slot, :length] = loc.int()
        self.tables = PlanTables.allocate(max_batch, max_pages, COSTS, max_items, DEVICE)
        for name in ("items", "item_start", "hot_items", "pages", "runs"):
            poison(getattr(self.tables, name))

    def plan(self) -> PlanTables:
        plan_pages(
            self.tables, self.table.to(DEVICE), self.slots.to(DEVICE),
            torch.tensor(self.lengths, device=DEVICE), self.level.to(DEVICE), PAGE, FEWEST,
            self.wave,
        )  # fmt: skip
        return self.tables

    def runs(self) -> list[list[list[int]]]:
        """Pages of each request and kind, in order."""
        return [
            [[int(p) for p in mine if self.level[p] == kind] for kind in range(KINDS)]
            for mine in self.pages
        ]


CASES = [
    ([1], 1, 4, 4),
    ([PAGE], 2, 1, 8),
    ([PAGE * 300 + 3], 1, 301, 16),
    ([1, 1, 1, 1], 4, 2, 12),
    ([70, 16, 1, 33, 640], 8, 40, 24),
    ([640, 640, 639], 3, 40, 120),
    ([640, 640, 639], 3, 40, 9),
]


@pytest.mark.parametrize(("lengths", "max_batch", "max_pages", "max_items"), CASES, ids=str)
def test_the_items_cover_every_page_once(
    lengths: list[int], max_batch: int, max_pages: int, max_items: int
) -> None:
    batch = Batch(lengths, max_batch, max_pages, max_items)
    tables = batch.plan()
    runs = batch.runs()
    for row, of_request in zip(tables.pages.tolist(), runs):
        flat = [page for run in of_request for page in run]
        assert row[: len(flat)] == flat
    found: list[list[list[tuple[int, int]]]] = [[[] for _ in range(KINDS)] for _ in lengths]
    starts = tables.item_start.tolist()
    used = tables.items[: starts[len(lengths)]].tolist()
    assert not tables.items[len(used) :].any()
    assert sorted(item[4] for item in used) == list(range(len(used)))
    costs = [(end - first) * COSTS[word >> 16] for word, first, end, _, _ in used]
    for dearer, cheaper in pairwise(costs):  # but for the pages that make no whole item
        assert dearer > cheaper - 2 * max(COSTS)
    for word, first, end, valid, index in sorted(used, key=lambda item: item[4]):
        assert first < end
        kind, request = divmod(word, 1 << 16)
        assert starts[request] <= index < starts[request + 1]
        place = index - starts[request]
        assert (kind == 0) == (place < tables.hot_items[request])
        found[request][kind].append((first, end))
        last = batch.pages[request][-1]
        expected = (lengths[request] - 1) % PAGE + 1
        ends_request = tables.pages[request, end - 1] == last
        assert valid == (expected if ends_request else PAGE)
    for request, of_request in enumerate(runs):
        at = 0
        for kind, run in enumerate(of_request):
            parts = found[request][kind]
            edges = [at, *(end for _, end in parts)]
            assert [first for first, _ in parts] == edges[:-1]
            assert edges[-1] == at + len(run)
            sizes = [end - first for first, end in parts]
            assert sizes == sorted(sizes, reverse=True) or max(sizes) - min(sizes) <= 1
            at += len(run)
    assert tables.hot_items.tolist()[len(lengths) :] == [0] * (max_batch - len(lengths))
    assert starts[len(lengths) :] == [starts[len(lengths)]] * (max_batch - len(lengths) + 1)


def cut(counts: Sequence[Sequence[int]], wave: int) -> list[tuple[int, int, int, int]]:
    """The items of requests with so many pages of each level, as (level, request, first, end) in
    the order in which they start."""
    lengths = [PAGE * sum(of_request) for of_request in counts]
    most = most_items(wave, len(lengths), KINDS)
    batch = Batch(lengths, len(lengths), max(map(sum, counts)), most, wave)
    for mine, of_request in zip(batch.pages, counts):
        batch.level[mine] = torch.arange(KINDS).repeat_interleave(torch.tensor(of_request)).byte()
    tables = batch.plan()
    used = tables.items[: int(tables.item_start[len(lengths)])].tolist()
    assert sum(end - first for _, first, end, _, _ in used) == sum(map(sum, counts))
    return [(word >> 16, word & 0xFFFF, first, end) for word, first, end, _, _ in used]


def makespan(costs: Sequence[float], wave: int) -> float:
    """When the last of these items ends, where each starts as soon as one of `wave` places is
    free."""
    free = [0.0] * wave
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost + START)
    return max(free)


def ragged(seed: int) -> list[list[int]]:
    """Pages of each level of a batch whose requests and levels are of very different sizes."""
    rng = random.Random(seed)
    spread = rng.choice((0.0, 0.7, 1.5))
    middle = rng.uniform(0, 4.5)
    batch = rng.choice((1, 3, 12))
    counts = [
        [int(rng.lognormvariate(middle, spread)) * rng.choice((0, 1, 1)) for _ in range(KINDS)]
        for _ in range(batch)
    ]
    return [of_request if sum(of_request) else [1, 0, 0] for of_request in counts]


@pytest.mark.parametrize("seed", range(8))
def test_there_is_room_for_every_item(seed: int) -> None:
    counts, wave = ragged(seed), random.Random(seed).choice((1, 4, 33, 132))
    items = cut(counts, wave)
    assert len(items) <= most_items(wave, len(counts), KINDS)
    longest = max(end - first for _, _, first, end in items)
    share = sum(COSTS[level] * (end - first) for level, _, first, end in items) / wave
    assert longest <= max(share, FEWEST) / min(COSTS) * 1.6 + 2


@pytest.mark.parametrize(
    ("max_items", "sizes"), [(12, [61] * 8 + [6] * 4), (11, [61] * 8 + [24]), (8, [512])]
)
def test_a_plan_that_wants_too_many_items_has_larger_ones(max_items: int, sizes: list[int]) -> None:
    """Eight shares of 64 pages."""
    batch = Batch([512 * PAGE], 1, 512, max_items, 8)
    batch.level[:] = 1
    tables = batch.plan()
    used = tables.items[: int(tables.item_start[1])].tolist()
    assert [end - first for _, first, end, _, _ in used] == sizes


@pytest.mark.parametrize("seed", range(6))
def test_items_end_together(seed: int) -> None:
    counts, wave = ragged(100 + seed), 33
    items = cut(counts, wave)
    costs = [COSTS[level] * (end - first) for level, _, first, end in items]
    at_least = max(sum(costs) / wave, FEWEST) + START
    # the last item to start is a small one; each place starts a few
    assert makespan(costs, wave) <= 1.08 * at_least + 2 * START + 8


@pytest.mark.parametrize(
    ("pages", "batch", "sizes"),
    [
        (512, 16, {(59, 59, 59, 59, 59, 59, 59, 59)}),  # 8.25 shares each
        (2048, 1, {(16,) * 68 + (15,) * 64}),
        (128, 1, {(4,) * 32}),
    ],
)
def test_large_items_of_equal_requests(pages: int, batch: int, sizes: set[tuple[int, ...]]) -> None:
    items = cut([[0, pages, 0]] * batch, 132)
    found = set()
    for request in range(batch):
        mine = sorted((end - first for _, at, first, end in items if at == request), reverse=True)
        found.add(tuple(size for size in mine if 2 * size > mine[0]))
    assert sizes <= found


def test_pages_of_more_bytes_cost_more() -> None:
    hot, warm, cold = page_costs([16.9, 9.1, 5.4], 16)
    assert hot + warm + cold == pytest.approx(3)
    assert hot / warm == pytest.approx(1.19, abs=0.01)
    assert cold / warm == pytest.approx(0.91, abs=0.01)


def test_a_batch_padded_with_rows_of_one_token() -> None:
    """Rows that only pad a graph's batch: slot 0, which is page 0."""
    batch = Batch([33, 20], 4, 4, 12)
    batch.table[3] = 0
    batch.slots = torch.tensor([*batch.slots.tolist(), 3, 3])
    batch.lengths += [1, 1]
    batch.level[0] = 0
    tables = batch.plan()
    assert tables.pages[2:, 0].tolist() == [0, 0]
    starts = tables.item_start.tolist()
    for request in (2, 3):
        assert [request, 0, 1, 1, starts[request]] in tables.items.tolist()


def test_too_few_items_are_refused() -> None:
    with pytest.raises(ValueError, match="max_items: expected at least 12"):
        PlanTables.allocate(4, 2, COSTS, 11, DEVICE)
