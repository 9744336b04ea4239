"""What a wrong frame costs: attention's divergence with keys coded in frames that are not theirs.

usage: python benchmarks/wrong_frame.py DUMP.npz [--every 5] [--json OUT.json]

DUMP.npz is that of key_fidelity.py. Of every fifth layer, statistics come from the window's first
half and every eighth query of its second half is scored; the first page is exact.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from client import save

from sglang_spherical.evaluation.attention import SAMPLE_EVERY, causal_attention
from sglang_spherical.evaluation.scores import kl_divergence, rounded
from spherical_kernels.codec.frames import calibrated_frame
from spherical_kernels.codec.pages import decode_slices, encode_slices
from spherical_kernels.codec.patterns import FrameKind, Pattern
from spherical_kernels.codec.slices import slice_layout

PAGE, SINKS = 64, 4
TIERS = {"warm": (6, 4, 4, 2), "cold": (4, 2, 2, 2)}
Statistics = tuple[torch.Tensor, torch.Tensor]  # gain and spread, [kv_heads, d]


def statistics(q: torch.Tensor, k: torch.Tensor) -> Statistics:
    """Of the first half of q [q_heads, tokens, d] and k [kv_heads, tokens, d]."""
    half = k.shape[1] // 2
    gain = q.unflatten(0, (len(k), -1))[:, :, SINKS:half].square().mean((1, 2)).sqrt()
    pages = k[:, PAGE:half].unflatten(1, (-1, PAGE))
    return gain, (pages - pages.mean(2, keepdim=True)).square().mean((1, 2)).sqrt()


def coded(k: torch.Tensor, frame: Statistics, bits: tuple[int, ...]) -> torch.Tensor:
    """k through slices of a calibrated frame, the first page exact."""
    tokens, d = k.shape[1:]
    layout = slice_layout(Pattern(FrameKind.CALIBRATED, bits), PAGE, d)
    pages = tokens // PAGE
    centre = k[:, SINKS : tokens // 2].mean(1)
    matrix, dual, centre = (
        x.repeat_interleave(pages, 0) for x in (*calibrated_frame(*frame), centre)
    )
    x = k.unflatten(1, (pages, PAGE)).flatten(0, 1)
    read = decode_slices(layout, encode_slices(layout, x, matrix, centre), dual, centre).view_as(k)
    read[:, :PAGE] = k[:, :PAGE]
    return read


def wrong_frames(own: Statistics, other: Statistics) -> dict[str, Statistics]:
    gain, spread = own
    order = torch.randperm(gain.shape[1], generator=torch.Generator().manual_seed(1))
    return {
        "its own": own,
        "of another layer": other,
        "channels shuffled": (gain[:, order], spread[:, order]),
        "all channels alike": (torch.ones_like(gain), spread.mean() * torch.ones_like(spread)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("--every", type=int, default=5, help="of how many layers one is measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with np.load(args.dump) as dump:
        q, k = (torch.from_numpy(dump[name])[:: args.every].float() for name in "qk")
    known = [statistics(*layer) for layer in zip(q, k)]
    found: dict[str, dict[str, list[float]]] = {}
    for i, (queries, keys) in enumerate(zip(q, k)):
        half, d = keys.shape[1] // 2, keys.shape[2]
        scored = queries.unflatten(0, (len(keys), -1))[:, :, half:] * d**-0.5
        exact = causal_attention(scored, keys, SAMPLE_EVERY)
        for name, frame in wrong_frames(known[i], known[(i + 1) % len(known)]).items():
            for tier, bits in TIERS.items():
                p = causal_attention(scored, coded(keys, frame, bits), SAMPLE_EVERY)
                divergence = float(kl_divergence(exact, p).mean())
                found.setdefault(name, {}).setdefault(tier, []).append(divergence)
    means: dict[str, Any] = {
        name: {tier: rounded(sum(x) / len(x)) for tier, x in tiers.items()}
        for name, tiers in found.items()
    }
    for name, tiers in means.items():
        print(f"{name:20}" + "".join(f"{tier} {kl:.4f}  " for tier, kl in tiers.items()))
    save(args.json, {"dump": args.dump.name, "every": args.every, "frames": means})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
