"""The Hopper kernel of extending, emulated (gluon_emulator.py): pages, blocks, rings and joins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extend_case import COLD, FROZEN, HOT, HOT4, THREE, UNCODED, WARM, Case, Request
from gluon_emulator import emulate

from spherical_kernels.extend import hopper, hopper_operands, hopper_rows, launch

if torch.cuda.is_available():
    pytest.skip("emulated where there is no GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are read by the emulated kernel."""

    def page_launch(
        kinds: Any, kind: int, levels: int, group: int, rows: int, tuning: Any, ptx: bool, pdl: bool
    ) -> Any:
        constants = launch.kernel_constants(*kinds[kind], group) | {
            "M": rows, "KIND": kind, "LEVELS": levels, "STAGES": 2, "PDL": False,
        }  # fmt: skip

        def run(grid: tuple[int, ...], *args: Any) -> None:
            modules = [hopper, hopper_operands, hopper_rows]
            emulate(modules, hopper.extend_pages_hopper, grid, list(args), constants)

        return run

    monkeypatch.setattr(launch, "_page_launch", page_launch)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("level", ["0", "1", "2"], ids=["hot", "warm", "cold"])
def test_one_level(level: str, d: int) -> None:
    Case([Request(level * 3, 9)], d).check(tile_rows=128)


@pytest.mark.parametrize("tiers", [(HOT4, THREE), (HOT, FROZEN), (HOT, UNCODED)], ids=str)
def test_other_patterns_and_a_ragged_page(tiers: Any) -> None:
    Case([Request("0110", 9, partial=20)], tiers=tiers).check(tile_rows=128)


def test_both_halves_of_a_tile() -> None:
    Case([Request("0110", 33, partial=33)], kv_heads=2).check(tile_rows=128, most_items=2)


def test_one_page() -> None:
    Case([Request("1", 1), Request("0", 1, partial=1)]).check(tile_rows=128)


def test_more_pages_than_the_ring_and_a_block_of_centroids_have() -> None:
    Case([Request("0" * 5 + "1" * 33, 20)]).check(tile_rows=128, most_items=1)


def test_a_block_of_centroids_and_no_page_more() -> None:
    Case([Request("1" * 16, 3)]).check(tile_rows=128, most_items=1)


def test_several_requests_and_patterns_that_differ_between_heads() -> None:
    requests = [
        Request("0112201", 3),
        Request("", 19),
        Request("3210", 17, partial=63),
        Request("2332", 16),
    ]
    kind_of = (0, 0), (1, 1), (1, 2), (2, 3)
    tiers = HOT, WARM, THREE, COLD
    case = Case(requests, kv_heads=2, group=3, tiers=tiers, kind_of=kind_of)
    case.check(slack=2, tile_rows=128, most_items=9)  # few tokens: no averaging


def test_hopper_serves_what_it_is_written_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(launch, "has_wgmma", lambda device: device == gpu)
    monkeypatch.setattr(launch.triton, "__version__", "3.6.0")
    serves = launch.hopper_serves
    serves.cache_clear()
    assert launch.tuning_for(128, 64, gpu) == launch.tuning_for(64, 64, gpu) == launch.HOPPER_TUNING
    for d, page_size, device in (
        (128, 64, None), (128, None, gpu), (128, 64, torch.device("cpu")), (128, 32, gpu),
        (96, 64, gpu),
    ):  # fmt: skip
        assert launch.tuning_for(d, page_size, device) == launch.TUNING
    serves.cache_clear()
    monkeypatch.setattr(launch.triton, "__version__", "3.7.1")
    for _ in range(2):
        assert launch.tuning_for(128, 64, gpu) == launch.TUNING
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    serves.cache_clear()
