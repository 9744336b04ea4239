"""What errors of cached keys and values are expected to do to a model's predictions.

    D(slice, pattern) = 1/2 E[(e_t . g_t)^2]    summed over the tokens t of a window

with e_t the error that coding leaves in a key or value and g_t the gradient of the log probability
of tokens drawn from the model's own predictions, through queries of later pages only: a page's own
queries read it hot. This is the second order of KL(dense || coded), with errors of different tokens
and slices taken as independent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sglang_spherical.config import SphericalConfig
from sglang_spherical.evaluation import inputs
from sglang_spherical.evaluation.attention import WindowAttention
from sglang_spherical.evaluation.coding import TierCoder
from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import Level, default_levels
from spherical_kernels.codec.patterns import Pattern

SEED = 0
"""Of the tokens drawn: the same model and text give the same distortions."""


class Coder:
    """Hot pages, and from them any pattern, in the frames of a model."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.hot = default_levels(SphericalConfig())[0]
        self._coders: dict[Pattern, TierCoder] = {}

    def lower(self, layer: int, side: int, x: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """x [kv_heads, tokens, d] as read from hot pages, coded in a pattern and read back:
        float32 of x's shape. Tokens are whole pages."""
        if pattern not in self._coders:
            levels = self.hot, Level("lowered", pattern, pattern)
            self._coders[pattern] = TierCoder(self.frames, levels)
        return self._coders[pattern].store(layer, side, x, 1)

    def store_hot(self, layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
        """x [kv_heads, tokens, d] in hot pages, read back: float32 of x's shape."""
        return TierCoder(self.frames, (self.hot,)).store(layer, side, x, 0)


class Gradients(WindowAttention):
    """Attention that keeps keys and values, whose gradients come from later pages alone.

    page_size  tokens of a page
    seen       by layer, keys and values [1, kv_heads, tokens, d]; with `grad` after `pull`
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if layer not in self.seen:  # else it is done again, for the way back
            key.retain_grad()
            value.retain_grad()
            self.seen[layer] = key, value
        q, k, v = query[0].float() * scale, key[0].float(), value[0].float()
        return attend_later(q, k, v, self.page_size)

    def pull(self, model: Any, ids: torch.Tensor, generator: torch.Generator) -> None:
        """Fills `seen` from a window int64 [tokens]: the gradients of a token drawn for each."""
        self.seen.clear()
        # Weights take no gradient: the way back has to start from what they are applied to.
        rows = model.get_input_embeddings()(ids.unsqueeze(0)).detach().requires_grad_()
        logits = model(inputs_embeds=rows, use_cache=False).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, True, generator=generator)
        logits.log_softmax(-1).gather(-1, drawn).sum().backward()


def attend_later(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page_size: int) -> torch.Tensor:
    """Causal attention of a window; keys and values of a query's own page take no gradient.

    q [q_heads, tokens, d], scaled; k and v [kv_heads, tokens, d]. Returns the output, of q's shape.
    """
    q = q.unflatten(0, (len(k), -1))
    # Page by page: attention of a whole window at once costs most of its time in memory.
    pages = [_attend_page(q, k, v, start, page_size) for start in range(0, q.shape[2], page_size)]
    return torch.cat(pages, 2).flatten(0, 1)


def _attend_page(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, page_size: int
) -> torch.Tensor:
    """That of the page's queries at `start`, q [kv_heads, group, tokens, d] being all of them."""
    end = start + page_size
    keys, values = (torch.cat([x[:, :start], x[:, start:end].detach()], 1) for x in (k, v))
    logits = q[:, :, start:end] @ keys.unsqueeze(1).mT
    future = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(start + 1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ values.unsqueeze(1)


def distortion(
    model: Any,
    coder: Coder,
    windows: Iterable[torch.Tensor],
    gradients: Gradients | None = None,
) -> torch.Tensor:
    """D of every slice for every pattern of `CHOICES`, per token, in nats.

    windows int64 [tokens] of whole pages; a window's first page, which stays hot, is left out.
    gradients  of what; None: as the module says
    Returns float64 [2 (keys, values), layers, kv_heads, choices]. Afterwards the model's weights
    take no gradients, and its attention is `Gradients`: install what comes next.
    """
    gradients = gradients or Gradients(coder.frames.page_size)
    gradients.install(model)
    model.requires_grad_(False).train()  # no model served here drops anything
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers, heads, _ = inputs.cache_shape(model)
    shape = len(CHOICES), layers, heads, len(CHOICES[0])
    device, tokens = coder.frames.centre.device, 0
    found = torch.zeros(shape, dtype=torch.float64, device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    for ids in windows:
        gradients.pull(model, ids, generator)
        for layer, sides in gradients.seen.items():
            for side, x in enumerate(sides):
                found[side, layer] += _of_slices(coder, layer, side, x)
        tokens += len(ids)
    gradients.seen.clear()
    model.gradient_checkpointing_disable()
    model.eval()
    return found / tokens


def _of_slices(coder: Coder, layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
    """D of one window's keys or values [1, kv_heads, tokens, d] with their gradients, summed over
    tokens: float64 [kv_heads, choices]."""
    assert x.grad is not None, "the way back is done"
    exact, pull = x.detach()[0], x.grad[0]
    hot = coder.store_hot(layer, side, exact)
    found = []
    for pattern in CHOICES[side]:
        error = coder.lower(layer, side, hot, pattern) - exact
        moved = (error * pull).sum(-1)[:, coder.frames.page_size :]
        found.append(moved.double().square().sum(-1) / 2)
    return torch.stack(found, -1)
