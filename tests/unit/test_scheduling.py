"""The hook behind every forward pass."""

from __future__ import annotations

from types import SimpleNamespace

from spherical_patches.scheduling import forward_launched


def test_the_spherical_tree_is_told_and_others_are_left_alone() -> None:
    told: list[str] = []
    tree = SimpleNamespace(forward_launched=lambda: told.append("launched"))
    assert forward_launched("result", SimpleNamespace(tree_cache=tree), "batch") is None
    assert told == ["launched"]
    forward_launched("result", SimpleNamespace(tree_cache=object()), "batch", None)
