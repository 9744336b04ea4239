"""A cached prefix whose tokens have patterns of their own, its next reader, and how much attention
each token may expect of it; `attention_mass.py` scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_spherical.config import PAGE_SIZES
from sglang_spherical.evaluation import inputs
from sglang_spherical.evaluation.attention import WindowAttention, causal_attention
from sglang_spherical.evaluation.gradients import Coder
from sglang_spherical.pool.arena import KEYS, VALUES
from spherical_kernels.codec.patterns import FrameKind, Pattern

PAGE = max(PAGE_SIZES)
PREFIX = inputs.WINDOW_TOKENS // 2

STRIDE = 64
"""Positions from one estimate of the reader's queries to the next."""

Grade = tuple[Pattern, Pattern] | None
"""Patterns of a token's key and value; None where it is dropped."""

PREDICTORS = (
    "random",
    "newest",
    "position",
    "measured64",
    "measured256",
    "estimate",
    "sum",
    "product",
    "oracle",
)


class Reader(WindowAttention):
    """Attention of a dense window, or of the second half of one whose first half is `prefix`.

    seen  by layer, of the last dense window: scaled queries [kv_heads, group, tokens, d], keys and
          values [kv_heads, tokens, d]
    """

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.prefix: CodedPrefix | None = None
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if self.prefix is None:
            self.seen[layer] = query[0].unflatten(0, (key.shape[1], -1)) * scale, key[0], value[0]
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )[0]
        own = (self.coder.store_hot(layer, side, x[0]) for side, x in ((0, key), (1, value)))
        read = (torch.cat(both, 1)[None] for both in zip(self.prefix.read(layer), own))
        k, v = read
        new = query.shape[2]
        mask = torch.ones(new, k.shape[2], dtype=torch.bool, device=k.device)
        mask = mask.tril(k.shape[2] - new)  # all of the prefix, and causally its own half
        return scaled_dot_product_attention(
            query, k, v, attn_mask=mask, scale=scale, enable_gqa=True
        )[0]


class Prefix:
    """Keys and values of a prefix, coded in any pattern.

    exact  by layer, keys and values [kv_heads, tokens, d]
    """

    def __init__(self, coder: Coder, exact: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.coder = coder
        self.hot = [
            [coder.store_hot(layer, side, x) for side, x in enumerate(sides)]
            for layer, sides in enumerate(exact)
        ]
        self._coded: dict[tuple[int, Pattern], list[torch.Tensor]] = {}

    def coded(self, side: int, pattern: Pattern) -> list[torch.Tensor]:
        """By layer, [kv_heads, tokens, d] as read back."""
        if pattern.frame is FrameKind.HOT:
            return [sides[side] for sides in self.hot]
        if (side, pattern) not in self._coded:
            self._coded[side, pattern] = [
                self.coder.lower(layer, side, sides[side], pattern)
                for layer, sides in enumerate(self.hot)
            ]
        return self._coded[side, pattern]


@dataclass(frozen=True)
class CodedPrefix:
    """A prefix whose tokens have grades of their own; as many are dropped for every head.

    of  int64 [layers, kv_heads, tokens], places in `grades`; the first page is hot whatever it says
    """

    prefix: Prefix
    grades: Sequence[Grade]
    of: torch.Tensor

    def same(self, other: CodedPrefix) -> bool:
        """Whether it is the same prefix, grade for grade and in the same order."""
        return self.grades == other.grades and torch.equal(self.of, other.of)

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, tokens kept, d], best grades first."""
        of = self.of[layer, :, PAGE:]
        order = of.argsort(dim=-1, stable=True)
        kept = len(order[0])
        if None in self.grades:
            dropped = (of == self.grades.index(None)).sum(-1).unique()
            kept -= int(dropped.item())
        sides = []
        for side in (KEYS, VALUES):
            hot = self.prefix.hot[layer][side]
            lowered = torch.empty_like(hot[:, PAGE:])
            for place, grade in enumerate(self.grades):
                if grade is not None:
                    coded = self.prefix.coded(side, grade[side])[layer][:, PAGE:]
                    lowered = torch.where((of == place).unsqueeze(-1), coded, lowered)
            index = order[:, :kept].unsqueeze(-1).expand(-1, -1, hot.shape[-1])
            sides.append(torch.cat([hot[:, :PAGE], lowered.gather(1, index)], 1))
        return sides[KEYS], sides[VALUES]


class Queries:
    """What is learnt of a model's queries, and where they look, from windows of other text.

    turns  cosines and sines [tokens, d] by which queries and keys are turned to their positions
    """

    def __init__(self, layers: int, turns: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.turns = turns
        self.windows = 0
        self.total: list[torch.Tensor] = [torch.zeros(())] * layers
        self.square: list[torch.Tensor] = [torch.zeros(())] * layers
        self.mass: list[torch.Tensor] = [torch.zeros(())] * layers

    def add(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """Of a window: scaled queries [kv_heads, group, tokens, d], keys [kv_heads, tokens, d]."""
        self.mass[layer] = self.mass[layer] + mass(q, k, PREFIX, q.shape[2])
        q = turned_back(q, *self.turns)[:, :, PAGE:]
        self.total[layer] = self.total[layer] + q.mean(2)
        self.square[layer] = self.square[layer] + q.mT @ q / q.shape[2]

    def estimate(self, layer: int, k: torch.Tensor) -> torch.Tensor:
        """The attention [kv_heads, tokens] that keys [kv_heads, tokens, d] are to expect."""
        mean = self.total[layer] / self.windows  # [kv_heads, group, d]
        spread = self.square[layer] / self.windows - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        expected, positions = torch.zeros_like(k[..., 0]), range(PREFIX, 2 * PREFIX, STRIDE)
        for position in positions:
            # A query turned forward meets a key as the query does a key turned back.
            back = turned_back(k, *(x[position] for x in self.turns)).unsqueeze(1)
            logits = (back @ mean.unsqueeze(-1)).squeeze(-1) + ((back @ spread) * back).sum(-1) / 2
            expected += logits.softmax(-1).mean(1) / len(positions)
        return expected

    def position(self, layer: int) -> torch.Tensor:
        """What tokens [kv_heads, tokens] got in these windows, by their page."""
        pages = self.mass[layer].unflatten(-1, (-1, PAGE))
        return pages.mean(-1, keepdim=True).expand_as(pages).flatten(1)


def turned_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., d] before rotary embedding had turned it by these angles."""
    first, second = x.chunk(2, -1)
    return x * cos - torch.cat([-second, first], -1) * sin


def mass(q: torch.Tensor, k: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Attention [kv_heads, PREFIX] that the prefix's tokens get from these queries, on average."""
    return causal_attention(q[:, :, first:end], k[:, :end]).mean((1, 2))[:, :PREFIX]


def utilities(reader: Reader, queries: Queries, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Every utility [layers, kv_heads, PREFIX] of the window that the reader has just seen."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in PREDICTORS}
    for layer, (q, k, _) in reader.seen.items():
        prefix = k[:, :PREFIX]
        its = {
            "newest": torch.arange(PREFIX, device=k.device).expand(len(k), -1).float(),
            "position": queries.position(layer),
            "measured64": mass(q, k, PREFIX - 64, PREFIX),
            "measured256": mass(q, k, PREFIX - 256, PREFIX),
            "estimate": queries.estimate(layer, prefix),
            "oracle": mass(q, k, PREFIX, q.shape[2]),
        }
        its["random"] = torch.rand(its["oracle"].shape, generator=draw, device="cpu").to(k.device)
        seen, thought = its["measured256"], its["estimate"]
        its |= {"sum": (seen + thought) / 2, "product": (seen * thought).sqrt()}
        for name, x in its.items():
            found[name].append(x)
    return {name: torch.stack(x) for name, x in found.items()}
