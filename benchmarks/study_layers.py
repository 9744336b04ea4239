"""One layer of a dumped window, and what a codec does to its attention, for `format_study.py`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from study_codecs import Codec, Head
from study_runs import COLD, EVEN_PATTERNS, ODD_PATTERNS, SPLITS, WARM, Run, name

from sglang_spherical.evaluation.attention import SAMPLE_EVERY, causal_attention
from sglang_spherical.evaluation.scores import kl_divergence, rounded
from spherical_kernels.codec.patterns import DIGITS

SINK_TOKENS = 4
EXACT_TOKENS = 64
"""First tokens that stay exact where nothing else is said: the sinks' page."""

FIRST, NEWEST = (0, SINK_TOKENS, EXACT_TOKENS), (0, 64, 256)
TIERS = {"warm": WARM, "cold": COLD}
PAIR = (4, 2, 1, 1), (2, 2, 2, 2)
"""Which a head may choose among at 2 bits: the fewest patterns that reach what is wanted."""


@dataclass(frozen=True)
class Layer:
    """One layer, and what its exact attention gives.

    q, early  [kv_heads, group, n, d], scaled: of the second half, and of the second quarter
    k, v      [kv_heads, tokens, d]
    p         [kv_heads, group, sampled queries of the second half, tokens]
    out       [kv_heads, group, sampled queries, d]
    """

    q: torch.Tensor
    early: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: Head
    values: Head
    p: torch.Tensor
    out: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Layer:
        """From the dump: q [q_heads, tokens, d], k and v [kv_heads, tokens, d]."""
        q, k, v = q.float(), k.float(), v.float()
        half = k.shape[1] // 2
        q = q.unflatten(0, (len(k), -1))
        gain = q[:, :, SINK_TOKENS:half].square().mean((1, 2)).sqrt()
        q = q * k.shape[-1] ** -0.5
        early, q = q[:, :, half // 2 : half], q[:, :, half:]
        p = causal_attention(q, k, SAMPLE_EVERY)
        sides = [statistics(k, gain), statistics(v, torch.ones_like(gain))]
        return cls(q, early, k, v, *sides, p, p @ v.unsqueeze(1))

    def keys_read(self, codec: Codec, after: Codec | None = None) -> torch.Tensor:
        """Probabilities with coded keys."""
        return causal_attention(self.q, coded(self.k, self.keys, codec, after), SAMPLE_EVERY)

    def values_read(self, codec: Codec, after: Codec | None = None) -> torch.Tensor:
        return coded(self.v, self.values, codec, after)

    def divergence(self, p: torch.Tensor) -> torch.Tensor:
        """KL of probabilities from the exact ones: [kv_heads, group, sampled queries]."""
        return kl_divergence(self.p, p)

    def output_error(self, p: torch.Tensor, v: torch.Tensor) -> float:
        """Relative error of attention's output."""
        return self.error_of(p @ v.unsqueeze(1))

    def error_of(self, out: torch.Tensor) -> float:
        return float((out - self.out).norm() / self.out.norm())


def statistics(x: torch.Tensor, gain: torch.Tensor) -> Head:
    """What the product's frames rest on, from the first half of x [kv_heads, tokens, d]."""
    seen = x[:, SINK_TOKENS : x.shape[1] // 2]
    pages = seen[:, : seen.shape[1] // 64 * 64].unflatten(1, (-1, 64))
    spread = (pages - pages.mean(2, keepdim=True)).square().mean((1, 2)).sqrt()
    return Head(seen.mean(1), gain, spread)


def coded(x: torch.Tensor, head: Head, codec: Codec, after: Codec | None = None) -> torch.Tensor:
    """x [kv_heads, tokens, d] as it is read back, but for the first tokens."""
    if after is not None:
        x = coded(x, head, after)
    read = codec.code(x, head)
    read[:, :EXACT_TOKENS] = x[:, :EXACT_TOKENS]
    return read


def compare(layer: Layer, study: list[Run]) -> dict[tuple[str, str, str], float]:
    """Distortion in one layer by (side, group, label)."""
    found: dict[tuple[str, str, str], float] = {}
    known: dict[tuple[Codec, Codec | None], tuple[float, float]] = {}
    for run in study:
        key = run.codec, run.after
        if key not in known:
            divergence = float(layer.divergence(layer.keys_read(*key)).mean())
            known[key] = divergence, layer.output_error(layer.p, layer.values_read(*key))
        for side, figure in zip(("keys", "values"), known[key]):
            found[side, run.group, run.label] = figure
    values = {bits: layer.values_read(Codec(bits)) for bits in SPLITS}
    for keys in SPLITS:
        p = layer.keys_read(Codec(keys))
        for bits, v in values.items():
            found["both", "split", f"{name(keys)} {name(bits)}"] = layer.output_error(p, v)
    return found


def per_head(layer: Layer) -> list[dict[str, Any]]:
    """Keys' divergence when every head has the pattern that suits it best, at 4 and 2 bits.

    Chosen among all patterns of so many bits, those of even widths, those of widths that the format
    has, or two of them, by the queries of the second quarter over the keys before them; scored, as
    everything else, on the second half. `oracle` is the choice that the second half itself would
    make.
    """
    rows, half = [], layer.k.shape[1] // 2
    exact = causal_attention(layer.early, layer.k[:, :half], SAMPLE_EVERY)
    for bits in (4, 2):
        even, odd = ([p for p in x if sum(p) == 4 * bits] for x in (EVEN_PATTERNS, ODD_PATTERNS))
        patterns, seen, scored = even + odd, [], []
        for pattern in patterns:
            keys = coded(layer.k, layer.keys, Codec(pattern))
            early = causal_attention(layer.early, keys[:, :half], SAMPLE_EVERY)
            seen.append(kl_divergence(exact, early).mean((1, 2)))
            later = causal_attention(layer.q, keys, SAMPLE_EVERY)
            scored.append(layer.divergence(later).mean((1, 2)))
        menus = {"even": even, "format": [p for p in patterns if set(p) <= DIGITS.keys()]}
        menus |= {", ".join(map(name, PAIR)): list(PAIR)} if bits == 2 else {}
        for among, menu in (menus | {"all": patterns}).items():
            places = [patterns.index(pattern) for pattern in menu]
            choices, scores = (torch.stack(every)[places] for every in (seen, scored))
            chosen = scores.gather(0, choices.argmin(0, keepdim=True)).mean()
            oracle = scores.min(0).values.mean()
            label = {"bits": bits, "among": among}
            rows.append(label | {"chosen": float(chosen), "oracle": float(oracle)})
    return rows


def exact_tokens(layer: Layer) -> list[dict[str, Any]]:
    """The tiers when the first tokens, and those newest to a query, are exact."""
    rows = []
    tokens, queries = layer.k.shape[1], layer.q.shape[2]
    position = torch.arange(tokens - queries, tokens, SAMPLE_EVERY).unsqueeze(1)
    age = position - torch.arange(tokens)
    q, exact = layer.q[:, :, ::SAMPLE_EVERY], layer.k.unsqueeze(1).transpose(-1, -2)
    for tier, (keys, values) in TIERS.items():
        k, v = Codec(keys).code(layer.k, layer.keys), Codec(values).code(layer.v, layer.values)
        logits = q @ exact, q @ k.unsqueeze(1).transpose(-1, -2)
        for first, newest in itertools.product(FIRST, NEWEST):
            kept = (torch.arange(tokens) < first) | (age < newest)
            p = torch.where(kept, *logits).masked_fill(age < 0, -torch.inf).softmax(-1)
            values_only, both = (
                (w * kept) @ layer.v.unsqueeze(1) + (w * ~kept) @ v.unsqueeze(1)
                for w in (layer.p, p)
            )
            figures = {
                "kl": float(layer.divergence(p).mean()),
                "output_error": layer.error_of(values_only),
                "both": layer.error_of(both),
            }
            rows.append({"tier": tier, "first": first, "newest": newest} | figures)
    return rows


def tiers_of(layer: Layer, number: int) -> dict[str, Any]:
    """One layer's keys, and what the tiers do to it."""
    tail = layer.k[:, SINK_TOKENS:]
    row: dict[str, Any] = {
        "layer": number,
        "largest_key": rounded(tail.norm(dim=-1).max()),
        "largest_centred_key": rounded((tail - layer.keys.centre.unsqueeze(1)).norm(dim=-1).max()),
    }
    for tier, (keys, values) in TIERS.items():
        p, v = layer.keys_read(Codec(keys)), layer.values_read(Codec(values))
        row[tier] = {
            "kl": rounded(layer.divergence(p).mean()),
            "output_error": rounded(layer.output_error(layer.p, v)),
            "both": rounded(layer.output_error(p, v)),
        }
    return row
