"""What the cache does between two forward passes, and while there are none."""

from __future__ import annotations

from typing import Any


def forward_launched(result: Any, self: Any, *_: Any, **__: Any) -> None:
    """After `Scheduler.run_batch`: the forward pass is on its way, nobody has waited for it."""
    launched = getattr(self.tree_cache, "forward_launched", None)
    if launched is not None:  # SGLang's own trees have no such method
        launched()


def idles(self: Any, *_: Any, **__: Any) -> None:
    """Before `Scheduler.on_idle`, which may sleep, and to which every rank comes as often as the
    others do: each round of the scheduler's loop begins with the requests that rank 0 hands out."""
    idle = getattr(self.tree_cache, "idle", None)
    if idle is not None:
        idle()
