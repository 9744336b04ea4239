"""The plan kernels against plain loops."""

from __future__ import annotations

import pytest
import torch

from spherical_kernels.plan.launch import PlanTables, plan_pages
from spherical_kernels.testing import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE, KINDS, FEWEST, START_PAGES = 16, 3, 4, 4


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
        self.tables = PlanTables.allocate(max_batch, max_pages, KINDS, max_items, DEVICE)
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
    for index, (word, first, end, valid) in enumerate(tables.items.tolist()):
        if first == end:
            assert index >= starts[len(lengths)]
            continue
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
            assert not sizes or max(sizes) - min(sizes) <= 1
            at += len(run)
    assert tables.hot_items.tolist()[len(lengths) :] == [0] * (max_batch - len(lengths))
    assert starts[len(lengths) :] == [starts[len(lengths)]] * (max_batch - len(lengths) + 1)


@pytest.mark.parametrize("wave", [2, 5, 7, 1000])
def test_waves_of_items_take_the_least_time(wave: int) -> None:
    for lengths, max_batch, max_pages, _ in CASES:
        most_items = max(3 * wave, max_batch * KINDS)
        batch = Batch(lengths, max_batch, max_pages, most_items, wave)
        tables = batch.plan()
        counts = [len(run) for of_request in batch.runs() for run in of_request if run]
        choices = []
        for waves in (1, 2, 3):
            most = min(max(waves * wave, len(counts)), most_items)
            pages = next(
                pages
                for pages in range(min(FEWEST, max(counts)), max(counts) + 1)
                if sum(-(-count // pages) for count in counts) <= most
            )
            items = sum(-(-count // pages) for count in counts)
            choices.append((-(-items // wave) * (pages + START_PAGES), items, pages))
        _, items, pages = min(choices, key=lambda choice: choice[0])
        assert int(tables.item_start[-1]) == items
        assert int((tables.items[:, 2] - tables.items[:, 1]).max()) <= pages


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
        assert tables.items[starts[request]].tolist() == [request, 0, 1, 1]


def test_too_few_items_are_refused() -> None:
    with pytest.raises(ValueError, match="max_items: expected at least 12"):
        PlanTables.allocate(4, 2, 3, 11, DEVICE)
