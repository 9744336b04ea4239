"""What every comparator is: an encoder to parts whose bits are declared, and a decoder of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from sglang_spherical.pool.arena import KEYS, VALUES


@dataclass(frozen=True)
class Part:
    """A tensor of what a cache would hold: `data`, every element of it in `bits` bits."""

    data: torch.Tensor
    bits: int


class Comparator(ABC):
    """Another way to hold keys and values, without a look at the tokens that come later.

    What `learn` keeps per layer and head (scales, codebooks) is a constant of the model, as a frame
    is, and is not counted; everything that a token or a group of tokens needs is a `Part`.
    """

    name: str

    def learn(self, layer: int, side: int, x: torch.Tensor) -> None:  # noqa: B027
        """Takes what it needs of unscored x [kv_heads, tokens, d] float32: by default nothing."""

    @abstractmethod
    def encode(self, layer: int, side: int, x: torch.Tensor) -> tuple[Part, ...]:
        """x [kv_heads, tokens, d] float32, whole pages, as the parts that a cache would hold."""

    @abstractmethod
    def decode(self, layer: int, side: int, parts: tuple[Part, ...]) -> torch.Tensor:
        """Parts -> float32 [kv_heads, tokens, d]."""


class ComparatorRead:
    """A cache in a comparator's form, for `attention.attend_codes`.

    The queries' own page and the first one, which our tiers read at the hot level, are exact here:
    several of the methods keep their newest tokens so, and none is to lose by its sinks.
    """

    def __init__(self, comparator: Comparator, page_size: int) -> None:
        self.comparator = comparator
        self.page_size = page_size

    def reach(self, layer: int, side: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [kv_heads, tokens, d] as it is, and as the comparator gives it back."""
        x = x.float()
        return x, self.comparator.decode(layer, side, self.comparator.encode(layer, side, x))


def bits_per_value(comparator: Comparator, kv_heads: int, tokens: int, head_dim: int) -> float:
    """Bits that a key or value component takes, all parts counted, once `comparator` has learnt."""
    x = torch.zeros(kv_heads, tokens, head_dim)
    parts = [part for side in (KEYS, VALUES) for part in comparator.encode(0, side, x)]
    return sum(part.data.numel() * part.bits for part in parts) / (2 * x.numel())
