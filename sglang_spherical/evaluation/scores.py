"""What is measured of each run, summed over windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

ROWS_AT_ONCE = 256
"""Positions whose next-token distributions are compared at once; bounds temporary memory."""

_TINY = torch.finfo(torch.float32).tiny


class LayerErrors:
    """Per layer: divergence of attention, relative errors of values and of attention's output."""

    def __init__(self, layers: int) -> None:
        self.sums = torch.zeros(6, layers, dtype=torch.float64)
        self.kl, self.kl_count = self.sums[0], self.sums[1]
        self.value_error, self.value_square = self.sums[2], self.sums[3]
        self.output_error, self.output_square = self.sums[4], self.sums[5]

    def add(self, other: LayerErrors) -> None:
        """What was measured of other windows."""
        self.sums += other.sums

    def add_values(self, layer: int, exact: torch.Tensor, coded: torch.Tensor) -> None:
        """Values of one layer, of any one shape."""
        self.value_error[layer] += (exact - coded).square().sum()
        self.value_square[layer] += exact.square().sum()

    def add_attention(
        self,
        layer: int,
        exact: torch.Tensor,
        coded: torch.Tensor,
        exact_out: torch.Tensor,
        coded_out: torch.Tensor,
    ) -> None:
        """Probabilities [..., tokens] and outputs [..., d] of the same queries."""
        divergence = kl_divergence(exact, coded)
        self.kl[layer] += divergence.sum()
        self.kl_count[layer] += divergence.numel()
        self.output_error[layer] += (exact_out - coded_out).square().sum()
        self.output_square[layer] += exact_out.square().sum()

    def summary(self) -> dict[str, Any]:
        """Means over layers, and the layers themselves, for the report."""
        layers = {
            "attention_kl": self.kl / self.kl_count,
            "value_error": (self.value_error / self.value_square).sqrt(),
            "output_error": (self.output_error / self.output_square).sqrt(),
        }
        means = {name: rounded(x.mean()) for name, x in layers.items()}
        return means | {f"{name}_layers": [rounded(y) for y in x] for name, x in layers.items()}


def kl_divergence(p: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(p || other) of probabilities [..., n] -> [...]."""
    return (p * (p.clamp_min(_TINY).log() - other.clamp_min(_TINY).log())).sum(-1)


@dataclass(frozen=True)
class Predictions:
    """Next-token predictions beside the dense model's, one entry per predicted token.

    nll   of the token that came, in nat
    kl    KL(dense || this) of the distributions, in nat
    same  1.0 where the likeliest token is the same
    """

    nll: torch.Tensor
    kl: torch.Tensor
    same: torch.Tensor


def compare(ids: torch.Tensor, dense: torch.Tensor, logits: torch.Tensor) -> Predictions:
    """Predictions of ids int64 [tokens] from logits [tokens, vocabulary], beside dense ones."""
    parts = []
    for rows in torch.arange(len(ids) - 1).split(ROWS_AT_ONCE):
        exact, mine = dense[rows].float().log_softmax(-1), logits[rows].float().log_softmax(-1)
        nll = -mine.gather(1, ids[rows + 1].unsqueeze(1)).squeeze(1)
        kl = (exact.exp() * (exact - mine)).sum(-1)
        parts.append((nll, kl, (exact.argmax(-1) == mine.argmax(-1)).float()))
    return Predictions(*(torch.cat(column) for column in zip(*parts)))


@dataclass
class RunScores:
    """Predictions of one run, window by window.

    bits_per_value  what a key or value component takes in the cache, all counted
    errors          of its layers; None for the dense run
    """

    name: str
    bits_per_value: float
    errors: LayerErrors | None = None
    windows: list[Predictions] = field(default_factory=list)

    def add(self, predictions: Predictions, errors: LayerErrors | None) -> None:
        """One finished window."""
        self.windows.append(predictions)
        if self.errors is not None and errors is not None:
            self.errors.add(errors)

    @property
    def perplexity(self) -> float:
        """Over all windows added."""
        return float(self._all("nll").mean().exp())

    def _all(self, measure: str) -> torch.Tensor:
        return torch.cat([getattr(window, measure) for window in self.windows]).double()

    def summary(self, dense_perplexity: float) -> dict[str, Any]:
        """One entry of the report's `runs`."""
        kl, same = self._all("kl"), self._all("same")
        entry = {
            "name": self.name,
            "ppl": rounded(self.perplexity),
            "ppl_change": rounded(self.perplexity / dense_perplexity - 1),
            "kl_mean": rounded(kl.mean()),
            "kl_median": rounded(kl.median()),
            "kl_p99": rounded(kl.quantile(0.99)),
            "same_top1": rounded(same.mean()),
            "bits_per_value": rounded(self.bits_per_value),
        }
        return entry | (self.errors.summary() if self.errors is not None else {})


def rounded(x: torch.Tensor | float) -> float:
    """Six significant digits: more would be noise."""
    return float(f"{float(x):.6g}")
