"""What the cache does between two forward passes."""

from __future__ import annotations

from typing import Any


def forward_launched(result: Any, self: Any, *_: Any, **__: Any) -> None:
    """After `Scheduler.run_batch`: the forward pass is on its way, nobody has waited for it."""
    launched = getattr(self.tree_cache, "forward_launched", None)
    if launched is not None:  # SGLang's own trees have no such method
        launched()
