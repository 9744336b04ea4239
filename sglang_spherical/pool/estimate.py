"""What errors of cached keys and values are expected to do, by what frames gather from prompts.

A server without a calibration file has no gradients (`evaluation.gradients`). What it can know of a
(layer, KV head) is how far errors move what attention returns, relative to what there is to return:

    keys    scale^2 E[(q . e)^2] A
    values  E|e|^2 A / E|v|^2         A = E[sum of the squared probabilities of tokens read coded]

with e the error of a key or value, v a value around its page's mean, and A from queries sampled
from the prompts. Errors of different tokens average out, all the more the more tokens a head reads:
that is A; what it reads of the first page and of a query's own is read hot. Every head's output
counts alike, in whatever units the model has it; what the layers above make of it is not known, but
for one thing: heads that read to copy, which answers hang on, have A times 1 + `COPYING` share^2.
The share is the sum of the squared probabilities of tokens that followed the query's own token
before, on average over queries for which there are any, over A (docs/retention.md).
"""

from __future__ import annotations

import torch

from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.arena import VALUES
from sglang_spherical.pool.frames import Frames

WIDTH_ERROR = {8: 0.00008, 6: 0.0006, 4: 0.0081, 2: 0.107, 1: 0.348}
"""Of a normal channel's variance, by bits of its code, after hot: measured through the encoder."""


def expected_distortion(frames: Frames) -> torch.Tensor:
    """Of frames that were calibrated online: float32 [2 (keys, values), layers, kv_heads, choices],
    shaped as a calibration file's distortions and of use for the same, but only against each
    other."""
    seen = frames.statistics
    gain = torch.stack((seen.gain(), torch.ones_like(seen.gain())))
    # What a unit of error in a channel of the frame adds: a channel's variance there is about one.
    added = (frames.dual.square() @ gain.square().unsqueeze(-1)).squeeze(-1)
    errors = torch.tensor(
        [[[WIDTH_ERROR[bits] for bits in its.bits] for its in side] for side in CHOICES],
        device=added.device,
    )
    bands = added.unflatten(-1, (errors.shape[-1], -1)).sum(-1)
    moved = torch.einsum("slhb,scb->slhc", bands, errors)
    moved[VALUES] /= seen.spread()[VALUES].square().sum(-1, keepdim=True)
    return moved * seen.weight().unsqueeze(-1)
