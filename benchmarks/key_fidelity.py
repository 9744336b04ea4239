"""What each tier does to attention over the keys of a real model, exact keys against coded ones.

usage: python benchmarks/key_fidelity.py DUMP.npz [--page-size 64] [--json OUT.json]

DUMP.npz holds one window: queries `q` [layers, q_heads, tokens, d] and keys and values `k`, `v`
[layers, kv_heads, tokens, d], rotary positions applied. Frames are calibrated on the window's first
half and scored on every eighth query of its second half. All pages are coded at the tier, the
query's own included, but for the first, which holds the sinks and stays at the hot tier.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sglang_spherical.config import PAGE_SIZES, SphericalConfig
from sglang_spherical.evaluation.attention import SAMPLE_EVERY, causal_attention
from sglang_spherical.evaluation.coding import TierCoder, bits_per_value
from sglang_spherical.evaluation.scores import kl_divergence, rounded
from sglang_spherical.pool.arena import KEYS
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import PageLayout, default_levels

EXACT = "from exact keys"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dump", type=Path)
    parser.add_argument("--page-size", type=int, choices=PAGE_SIZES, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.dump.is_file():
        print(f"error: {args.dump}: no such file", file=sys.stderr)
        return 2
    with np.load(args.dump) as dump:
        q, k, v = (torch.from_numpy(dump[name]) for name in "qkv")
    frames = calibrate(q, k, v, args.page_size)
    levels = default_levels(SphericalConfig())
    layout = PageLayout.fit(args.page_size, k.shape[-1], k.shape[0], k.shape[1], levels)
    scores = measure(TierCoder(frames, levels), q, k)
    rows = [summary(name, kl, layout) for name, kl in scores.items()]
    print(f"{args.dump.name}: {k.shape[0]} layers, {k.shape[1]} KV heads of {k.shape[3]}")
    show(rows)
    if args.json is not None:
        report = {"dump": args.dump.name, "page_size": args.page_size, "runs": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def calibrate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page_size: int) -> Frames:
    """Frames that have seen the first half of the window as a prompt."""
    layers, kv_heads, tokens, d = k.shape
    frames = Frames(layers, kv_heads, d, page_size, "cpu")
    positions = torch.arange(tokens // 2)
    for layer in range(layers):
        half = [x[layer, :, : tokens // 2].float().transpose(0, 1) for x in (q, k, v)]
        centre = frames.new_centre(layer, half[1], half[2], positions)
        assert centre is not None
        frames.freeze_centre(layer, centre)
        frames.observe(layer, half[0], half[1], half[2], positions, None, d**-0.5)
    frames.calibrate()
    return frames


def measure(coder: TierCoder, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
    """Divergence of attention by run: float32 [layers, kv_heads, group, sampled queries]."""
    found: dict[str, list[torch.Tensor]] = {}
    for layer in tqdm(range(len(k)), unit="layer"):
        keys = k[layer].float()
        half = keys.shape[1] // 2
        queries = q[layer, :, half:].float().unflatten(0, (len(keys), -1)) * keys.shape[-1] ** -0.5
        exact = causal_attention(queries, keys, SAMPLE_EVERY)
        for name, coded in runs(coder, layer, keys):
            mine = causal_attention(queries, coded, SAMPLE_EVERY)
            found.setdefault(name, []).append(kl_divergence(exact, mine))
    return {name: torch.stack(layers) for name, layers in found.items()}


def runs(coder: TierCoder, layer: int, keys: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Keys [kv_heads, tokens, d] as every tier gives them back, and as it would from exact keys."""
    first = slice(0, coder.frames.page_size)
    for level, rung in enumerate(coder.levels):
        hot, coded = coder.reach(layer, KEYS, keys, level)
        coded[:, first] = hot[:, first]
        yield rung.name, coded
        if level:
            coded = coder.store(layer, KEYS, keys, level)
            coded[:, first] = hot[:, first]
            yield f"{rung.name} {EXACT}", coded


def summary(name: str, kl: torch.Tensor, layout: PageLayout) -> dict[str, Any]:
    """One run's figures; heads and layers are those of query heads."""
    level = [rung.name for rung in layout.levels].index(name.split()[0])
    heads = kl.mean(-1)
    return {
        "name": name,
        "pattern": layout.levels[level].keys.name,
        "bits_per_value": rounded(bits_per_value(layout, level)),
        "kl_mean": rounded(kl.mean()),
        "kl_median_of_heads": rounded(heads.median()),
        "kl_worst_head": rounded(heads.max()),
        "kl_layers": [rounded(x) for x in kl.mean((1, 2, 3))],
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'run':24}{'pattern':>10}{'KL mean':>12}{'median head':>13}{'worst head':>12}")
    for row in rows:
        figures = row["kl_mean"], row["kl_median_of_heads"], row["kl_worst_head"]
        cells = "".join(f"{x:>{w}.5f}" for x, w in zip(figures, (12, 13, 12)))
        print(f"{row['name']:24}{row['pattern']:>10}{cells}")


if __name__ == "__main__":
    sys.exit(main())
