"""Centres and calibrated frames of every (layer, KV head) of this rank.

Without a calibration file both come from the first prompts: a layer's centre is frozen at the first
prefill of at least `CENTRE_TOKENS` tokens, and the calibrated frames before the first re-tier, from
statistics gathered while everything is hot. Both then hold until the cache is flushed, because
every page written since depends on them.
"""

from __future__ import annotations

from functools import cached_property

import torch

from sglang_spherical.pool.arena import KEYS, VALUES
from sglang_spherical.pool.head_statistics import HeadStatistics
from sglang_spherical.pool.layout import SIDES
from spherical_kernels.codec.frames import LayerFrames, Picks, calibrated_frame, signed_hadamard
from spherical_kernels.codec.patterns import FrameKind
from spherical_kernels.retier.launch import Turns

CENTRE_TOKENS = 64
"""Tokens of the first prefill whose mean may become a centre: fewer say little (a warm-up
prompt)."""

LARGEST = 65504.0
"""Beyond float16's range, as NaN and infinity, a number says nothing about other prompts' keys."""

SINK_TOKENS = 4
"""First positions, whose keys and values are unlike all others and are left out of statistics."""


def _credible(x: torch.Tensor) -> torch.Tensor:
    """x in float32, zero where no healthy model gets to: one request must not spoil all others."""
    x = x.float()
    return torch.where(x.abs() <= LARGEST, x, 0.0)


class Frames:
    """Frames of one rank, at fixed addresses.

    centre    float32 [2, layers, kv_heads, d]   of keys and of values; contiguous by layer
    matrix    float32 [2, layers, kv_heads, d, d]  A of the calibrated frames
    dual      float32 [2, layers, kv_heads, d, d]  B of the calibrated frames
    by_frame  float32 [2, layers, 2, kv_heads, d, d]  B of the hot, then of the calibrated frames
    picks     of `by_frame`
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, page_size: int, device: torch.device | str
    ) -> None:
        self.page_size = page_size
        self.rotation = signed_hadamard(head_dim).to(device)
        square = kv_heads, head_dim, head_dim
        self.centre = torch.zeros(layers, SIDES, kv_heads, head_dim, device=device).transpose(0, 1)
        self.matrix = torch.zeros(SIDES, layers, *square, device=device)
        self.by_frame = torch.zeros(SIDES, layers, 2, *square, device=device)
        self.by_frame[:, :, 0] = self.rotation
        self.dual = self.by_frame[:, :, 1]
        self.statistics = HeadStatistics(layers, kv_heads, head_dim, device)
        self.centred = [False] * layers
        self.calibrated = False
        self.from_file = False
        # decoding writes its output channel by channel of the picks, calibrated or not
        channel = torch.arange(head_dim, dtype=torch.int32, device=device)
        shape = self.by_frame.shape[:-1]
        self.picks = Picks(channel.expand(shape).contiguous(), torch.zeros(shape, device=device))
        self._pick()

    def duals(self, kind: FrameKind, layer: int, side: int) -> torch.Tensor:
        """B of a layer's heads: [kv_heads, d, d]."""
        if kind is FrameKind.HOT:
            return self.rotation.expand(self.centre.shape[2], -1, -1)
        return self.dual[side, layer]

    def of_layer(self, layer: int) -> LayerFrames:
        """What reading a layer's codes takes, as views."""
        keys, values = self.by_frame[:, layer]
        key_centre, value_centre = self.centre[:, layer]
        picks = (
            Picks(self.picks.channel[side, layer], self.picks.weight[side, layer])
            for side in (KEYS, VALUES)
        )
        return LayerFrames(keys, values, key_centre, value_centre, *picks)

    def matrices(self, kind: FrameKind, layer: int, side: int) -> torch.Tensor:
        """A of a layer's heads: [kv_heads, d, d]."""
        if kind is FrameKind.HOT:
            return self.rotation.expand(self.centre.shape[2], -1, -1)
        return self.matrix[side, layer]

    def observe(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        ids: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Statistics of a prefill's tokens; nothing once the frames are calibrated.

        q [n, q_heads, d], k and v [n, kv_heads, d] in the model's dtype, positions [n]; token ids
        [n], None where there are none; scale is that of logits.
        """
        if self.calibrated:
            return
        q, k, v = (_credible(x) for x in (q, k, v))
        q = q.unflatten(1, (k.shape[1], -1))
        self.statistics.add_attention(layer, q, k, positions, ids, self.page_size, scale)
        keep = positions >= SINK_TOKENS
        self.statistics.add(layer, q[keep], k[keep], v[keep], self.page_size)

    def new_centre(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor | None:
        """The centre [2, kv_heads, d] that these tokens call for; None when the layer's is frozen
        already."""
        if self.centred[layer] or len(k) < CENTRE_TOKENS:
            return None
        keep = positions >= SINK_TOKENS
        if int(keep.sum()) < CENTRE_TOKENS // 2:
            return None
        return torch.stack([_credible(x[keep]).mean(0) for x in (k, v)])

    def freeze_centre(self, layer: int, centre: torch.Tensor) -> None:
        """Sets a layer's centre [2, kv_heads, d] until the cache is flushed."""
        self.centre[:, layer] = centre
        self.centred[layer] = True

    def calibrate(self) -> None:
        """Freezes the calibrated frames from what has been observed. Does nothing the second time.

        Raises RuntimeError when a layer has seen less than one page of tokens.
        """
        if self.calibrated:
            return
        if min(self.statistics.spread_count) == 0:
            raise RuntimeError("frames: cannot calibrate before a prefill of one page")
        self._rebuild(self.statistics.gain(), self.statistics.spread())

    def load(self, centre: torch.Tensor, gain: torch.Tensor, spread: torch.Tensor) -> None:
        """Takes centres and frames from a calibration file, for good: nothing is gathered online.

        centre and spread [2, layers, kv_heads, d], gain [layers, kv_heads, d], of this rank.
        Raises ValueError when they are of another shape.
        """
        if spread.shape != self.centre.shape or gain.shape != self.centre.shape[1:]:
            raise ValueError(
                f"frames: expected statistics of shape {tuple(self.centre.shape)}, "
                f"got {tuple(spread.shape)}"
            )
        self.centre.copy_(centre)
        self.centred = [True] * len(self.centred)
        self._rebuild(gain.to(self.centre.device), spread.to(self.centre.device))
        self.from_file = True

    def _rebuild(self, gain: torch.Tensor, spread: torch.Tensor) -> None:
        """The calibrated frames that statistics (see `load`) call for."""
        # Errors of values are summed as they are: no channel counts more than another.
        for side, side_gain in ((KEYS, gain), (VALUES, torch.ones_like(gain))):
            frames = calibrated_frame(side_gain.flatten(0, 1), spread[side].flatten(0, 1))
            matrix, dual = (x.view_as(self.matrix[side]) for x in frames)
            self.matrix[side], self.dual[side] = matrix, dual
        self.calibrated = True
        self._pick()
        self.__dict__.pop("turns", None)

    def _pick(self) -> None:
        """Brings the picks up to date, a layer at a time: what that takes is nothing beside it."""
        frames = slice(0, 2 if self.calibrated else 1)
        for side in (KEYS, VALUES):
            for layer in range(self.by_frame.shape[1]):
                found = Picks.of(self.by_frame[side, layer])
                self.picks.channel[side, layer, frames] = found.channel[frames]
                self.picks.weight[side, layer, frames] = found.weight[frames]

    @cached_property
    def turns(self) -> Turns:
        """From hot codes into the calibrated frames."""
        return Turns.between(self.rotation, self.matrix)

    @property
    def ready(self) -> bool:
        """Whether pages may be re-tiered: calibrated, or centred with enough seen to be."""
        return self.calibrated or (all(self.centred) and min(self.statistics.spread_count) > 0)

    def reset(self) -> None:
        """Forgets what was gathered online; frames from a file stay."""
        if self.from_file:
            return
        self.centre.zero_()
        self.centred = [False] * len(self.centred)
        self.calibrated = False
        self.__dict__.pop("turns", None)
        self.statistics.reset()
