"""The backend of the GPU, its kernels interpreted, against the backend of the CPU."""

from __future__ import annotations

import pytest
import torch
from backend_tools import LAYERS, PAGE, Prompt, Runner

from sglang_spherical.attention.kernel_backend import KernelAttnBackend
from spherical_kernels.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# float16 operands in the kernels: 2**-12 of queries and weights, on logits of about 1. Hot codes
# may differ by one where a value lies between two.
MAX, RMS = 4e-2, 6e-3


class Pair:
    """The same requests on both backends; outputs must agree."""

    def __init__(self, unlike: bool = False) -> None:
        self.cpu = Runner(unlike=unlike)
        self.gpu = Runner(kernels=True, device=DEVICE, unlike=unlike)
        self.prompts: dict[int, tuple[Prompt, Prompt]] = {}

    def prompt(self, slot: int) -> tuple[Prompt, Prompt]:
        return self.prompts.setdefault(slot, (Prompt(slot, slot), Prompt(slot, slot)))

    def extend(self, *chunks: tuple[int, int]) -> None:
        pairs = [(self.prompt(slot), count) for slot, count in chunks]
        expected = self.cpu.extend(*((pair[0], count) for pair, count in pairs))
        self.compare(self.gpu.extend(*((pair[1], count) for pair, count in pairs)), expected)

    def decode(self, *slots: int, padding: int = 0) -> None:
        pairs = [self.prompt(slot) for slot in slots]
        expected = self.cpu.decode(*(pair[0] for pair in pairs), padding=padding)
        self.compare(self.gpu.decode(*(pair[1] for pair in pairs), padding=padding), expected)

    @staticmethod
    def compare(outs: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        for out, wanted in zip(outs, expected, strict=True):
            assert_close(out, wanted, max_error=MAX, rms_error=RMS)

    def lower(self, slot: int, level: int, pages: slice) -> None:
        """Re-encodes some full pages of a prompt on both sides.

        Then both have the same codes: of two that are as near, each may have taken another one.
        """
        for runner, prompt in zip((self.cpu, self.gpu), self.prompt(slot)):
            chosen = runner.pages(prompt)[: prompt.length // PAGE][pages]
            runner.allocator.lower(chosen, 0, level)
        arenas = self.cpu.pool.arena, self.gpu.pool.arena
        assert torch.equal(arenas[0].page_blocks, arenas[1].page_blocks.cpu())
        arenas[1].bytes.copy_(arenas[0].bytes)


@pytest.mark.parametrize("chunks", [[70], [66, 1, 31], [64, 5]], ids=str)
def test_a_prompt_in_chunks(chunks: list[int]) -> None:
    pair = Pair()
    for count in chunks:
        pair.extend((1, count))


@pytest.mark.parametrize("unlike", [False, True], ids=["heads-alike", "heads-unlike"])
def test_a_batch_of_extends_over_pages_of_every_level(unlike: bool) -> None:
    pair = Pair(unlike)
    pair.extend((1, 6 * PAGE + 4), (2, PAGE), (3, 2 * PAGE + 1))
    pair.lower(1, 1, slice(1, 4))
    pair.lower(1, 2, slice(4, 6))
    pair.lower(3, 2, slice(0, 2))
    pair.extend((1, 20), (4, 9), (3, 1), (2, 40))
    assert {int(level) for level in pair.gpu.pool.arena.page_level} == {0, 1, 2}
    assert LAYERS > 1


@pytest.mark.parametrize("unlike", [False, True], ids=["heads-alike", "heads-unlike"])
def test_decode_steps_over_pages_of_every_level(unlike: bool) -> None:
    """Steps that open a page, and one beside rows that only pad a graph's batch."""
    pair = Pair(unlike)
    pair.extend((1, 6 * PAGE + 4), (2, PAGE - 1), (3, 2 * PAGE + 8))
    pair.lower(1, 1, slice(1, 4))
    pair.lower(1, 2, slice(4, 6))
    pair.lower(3, 2, slice(0, 2))
    for _ in range(2):
        pair.decode(1, 2, 3)
    pair.decode(2, 3, padding=2)


def test_a_graph_s_tables_serve_smaller_batches_too() -> None:
    pair = Pair()
    assert isinstance(pair.gpu.backend, KernelAttnBackend)
    pair.gpu.backend.init_cuda_graph_state(4, 4)
    pair.gpu.plan = pair.gpu.plan_for_graph  # type: ignore[method-assign]
    pair.extend((1, 70), (2, 15))
    pair.decode(1, 2, padding=2)
    pair.decode(2)


@pytest.mark.parametrize("kernels", [False, True])
def test_what_is_read_hot_does_not_feel_pressure(kernels: bool) -> None:
    """Bit for bit the same, whatever happens to the pages of others between the steps."""
    outs = []
    for pressure in (False, True):
        runner = Runner(kernels=kernels, device=DEVICE if kernels else "cpu")
        allocator, mine, other = runner.allocator, Prompt(1, 1), Prompt(2, 2)
        runner.extend((mine, 4 * PAGE + 3))  # long enough to set the centres
        if pressure:
            runner.extend((other, 4 * PAGE))
        pages = runner.pages(other)
        for level in (1, 2, None):
            if pressure and level is not None:
                allocator.lower(pages[level:], level - 1, level)
            elif pressure:
                for last, some in enumerate(pages.tensor_split([1, 2])):
                    allocator.free_at_level(some, last)
                runner.extend((Prompt(3, 3), 4 * PAGE))  # on the blocks that were given back
            outs += runner.decode(mine)
    calm, pressed = outs[: len(outs) // 2], outs[len(outs) // 2 :]
    assert all(torch.equal(*pair) for pair in zip(calm, pressed, strict=True))
