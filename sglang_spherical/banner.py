"""The one log line that proves the spherical path is live, written and read in one place.

Workers print it once every part has been checked; the demo, the tests and the benchmarks look for
it and take their bytes per token from it.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "spherical KV engaged:"


@dataclass(frozen=True)
class Banner:
    """What a worker engaged. Bytes count every layer and KV head of that worker's rank."""

    pool: str  # class names
    allocator: str
    tree: str
    backend: str
    page_size: int  # tokens
    hot: float  # resident bytes per token at each tier: codes, radii, centroids, tables, padding
    warm: float
    cool: float
    cold: float
    frozen: float
    bf16: float  # what the same token takes in SGLang's bf16 cache
    capacity_tokens: int  # if all of them were hot
    arena_bytes: int

    def format(self) -> str:
        """One line, starting with `PREFIX`, that `parse` turns back into an equal `Banner`."""
        return (
            f"{PREFIX} pool={self.pool} allocator={self.allocator} tree={self.tree} "
            f"backend={self.backend} page_size={self.page_size} kv_bytes_per_token "
            f"hot={self.hot!r} warm={self.warm!r} cool={self.cool!r} cold={self.cold!r} "
            f"frozen={self.frozen!r} bf16={self.bf16!r} "
            f"capacity_tokens={self.capacity_tokens} arena_bytes={self.arena_bytes}"
        )


def parse(log: str) -> Banner | None:
    """The first banner in `log`, which may be one line or a whole server log; None without one.

    Raises ValueError when the line lacks a field: writer and reader come from different versions.
    """
    _, found, rest = log.partition(PREFIX)
    if not found:
        return None
    line = rest.partition("\n")[0]
    fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
    try:
        return Banner(
            pool=fields["pool"],
            allocator=fields["allocator"],
            tree=fields["tree"],
            backend=fields["backend"],
            page_size=int(fields["page_size"]),
            hot=float(fields["hot"]),
            warm=float(fields["warm"]),
            cool=float(fields["cool"]),
            cold=float(fields["cold"]),
            frozen=float(fields["frozen"]),
            bf16=float(fields["bf16"]),
            capacity_tokens=int(fields["capacity_tokens"]),
            arena_bytes=int(fields["arena_bytes"]),
        )
    except KeyError as missing:
        raise ValueError(f"banner line without {missing}: {PREFIX}{line}") from None
