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

SAMPLED_QUERIES = 128
"""Of a prefill, at most, whose attention is looked at."""

SMALLEST_WEIGHT = 1e-6
"""Of a head that was never seen to read an earlier page; all alike where no prompt is longer than
two."""


def _credible(x: torch.Tensor) -> torch.Tensor:
    """x in float32, zero where no healthy model gets to: one request must not spoil all others."""
    x = x.float()
    return torch.where(x.abs() <= LARGEST, x, 0.0)


class HeadStatistics:
    """Sums over observed tokens, per layer and KV head: squared queries, keys and values, and
    squared probabilities with which sampled queries read earlier pages but
    the first, which stays hot.

    Keys and values are taken around the mean of each run of `page_size` tokens, as pages will be.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, device: torch.device | str
    ) -> None:
        shape = (layers, kv_heads, head_dim)
        self.query_square = torch.zeros(shape, device=device)
        self.spread_square = torch.zeros(SIDES, *shape, device=device)
        self.read_square = torch.zeros(SIDES, *shape[:-1], device=device)
        self.query_count = [0] * layers
        self.spread_count = [0] * layers
        self.read_count = [0] * layers

    def add(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page_size: int
    ) -> None:
        """q [n, kv_heads, group, d], k and v [n, kv_heads, d], float32, n consecutive tokens."""
        whole = len(k) // page_size * page_size
        self.query_square[layer] += q.square().sum((0, 2))
        self.query_count[layer] += q.shape[0] * q.shape[2]
        for side, x in ((KEYS, k), (VALUES, v)):
            runs = x[:whole].unflatten(0, (-1, page_size))
            self.spread_square[side, layer] += (
                (runs - runs.mean(1, keepdim=True)).square().sum((0, 1))
            )
        self.spread_count[layer] += whole

    def add_attention(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: torch.Tensor,
        page_size: int,
        scale: float,
    ) -> None:
        """q [n, kv_heads, group, d], unscaled, k [n, kv_heads, d], float32, sinks included,
        positions [n]: consecutive tokens of one request or of several, one after another."""
        pages = positions // page_size
        asking = (pages > 1).nonzero().squeeze(-1)
        asking = asking[:: -(-len(asking) // SAMPLED_QUERIES) or 1]
        if not len(asking):
            return
        row = torch.arange(len(positions), device=positions.device)
        start = positions - row  # the same for the tokens of a request
        seen = (start == start[asking, None]) & (row <= asking[:, None])
        coded = (pages < pages[asking, None]) & (pages > 0)  # the first stays hot
        for head in range(k.shape[1]):  # one by one: what all take together may be too much
            logits = q[asking, head].transpose(0, 1) * scale @ k[:, head].T
            p = logits.masked_fill_(~seen, -torch.inf).softmax(-1)
            read = p.masked_fill_(~coded, 0).square().sum()
            self.read_square[KEYS, layer, head] += scale**2 * read
            self.read_square[VALUES, layer, head] += read
        self.read_count[layer] += len(asking)

    def gain(self) -> torch.Tensor:
        """Root mean square of the queries: [layers, kv_heads, d]."""
        count = torch.tensor(self.query_count, device=self.query_square.device)
        return (self.query_square / count.view(-1, 1, 1)).sqrt()

    def spread(self) -> torch.Tensor:
        """Root mean square of keys and values around their page: [2, layers, kv_heads, d]."""
        count = torch.tensor(self.spread_count, device=self.spread_square.device)
        return (self.spread_square / count.view(-1, 1, 1)).sqrt()

    def weight(self) -> torch.Tensor:
        """What the squared error of a query's product with a key, and of a value, counts for in
        what is read of earlier pages: [2, layers, kv_heads]."""
        count = torch.tensor(self.read_count, device=self.read_square.device)
        return (self.read_square / count.clamp_min(1).unsqueeze(-1)).clamp_min(SMALLEST_WEIGHT)

    def reset(self) -> None:
        """Forgets everything observed."""
        for sums in (self.query_square, self.spread_square, self.read_square):
            sums.zero_()
        self.query_count = [0] * len(self.query_count)
        self.spread_count = [0] * len(self.spread_count)
        self.read_count = [0] * len(self.read_count)


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
        scale: float,
    ) -> None:
        """Statistics of a prefill's tokens; nothing once the frames are calibrated.

        q [n, q_heads, d], k and v [n, kv_heads, d] in the model's dtype, positions [n]; scale is
        that of logits.
        """
        if self.calibrated:
            return
        q, k, v = (_credible(x) for x in (q, k, v))
        q = q.unflatten(1, (k.shape[1], -1))
        self.statistics.add_attention(layer, q, k, positions, self.page_size, scale)
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
