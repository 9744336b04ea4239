"""The hooks behind every forward pass, and while there is none."""

from __future__ import annotations

from types import SimpleNamespace

from spherical_patches.scheduling import forward_launched, idles


def test_the_spherical_tree_is_told_and_others_are_left_alone() -> None:
    told: list[str] = []
    tree = SimpleNamespace(forward_launched=lambda: told.append("launched"))
    assert forward_launched("result", SimpleNamespace(tree_cache=tree), "batch") is None
    assert told == ["launched"]
    forward_launched("result", SimpleNamespace(tree_cache=object()), "batch", None)


def test_it_is_told_of_idle_rounds_too() -> None:
    told: list[str] = []
    tree = SimpleNamespace(idle=lambda: told.append("idle"))
    assert idles(SimpleNamespace(tree_cache=tree)) is None, "arguments stay as they are"
    assert told == ["idle"]
    idles(SimpleNamespace(tree_cache=object()))
