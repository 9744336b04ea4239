"""What the tests of the codec, the pool and the tree share: data, frames, tiny pools."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from sglang_spherical.config import SphericalConfig
from sglang_spherical.pool.choice import choose_kinds
from sglang_spherical.pool.kv_pool import SphericalKVPool
from sglang_spherical.pool.layout import SIDES, PageLayout, default_levels
from spherical_kernels.codec.frames import calibrated_frame, signed_hadamard
from spherical_kernels.codec.pages import decode_slices
from spherical_kernels.codec.patterns import PATTERNS, FrameKind, Pattern
from spherical_kernels.codec.slices import slice_layout


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Independent unit normals, float32, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class HeadFrames:
    """Frames of some heads: matrix A and dual B [heads, d, d], centre [heads, d]."""

    matrix: torch.Tensor
    dual: torch.Tensor
    centre: torch.Tensor


def head_frames(pattern: Pattern, heads: int, head_dim: int, seed: int = 0) -> HeadFrames:
    """Frames of the pattern's kind; channel scales of calibrated ones span a factor of 50."""
    centre = 2 * normal(heads, head_dim, seed=seed + 1)
    if pattern.frame is FrameKind.HOT:
        rotation = signed_hadamard(head_dim).expand(heads, -1, -1)
        return HeadFrames(rotation, rotation, centre)
    gain, spread = (normal(heads, head_dim, seed=seed + i).exp() for i in (2, 3))
    return HeadFrames(*calibrated_frame(gain, spread), centre)


TINY = {"page_size": 16, "head_dim": 32, "layers": 2, "kv_heads": 2}
"""Hot pages of 4 blocks, warm ones of 3, all others of 2."""


def tiny_layout(**changes: int) -> PageLayout:
    return PageLayout.fit(**(TINY | changes), levels=default_levels(SphericalConfig("spherical")))


def unlike_heads(layout: PageLayout) -> PageLayout:
    """The same pages, with patterns that differ between (layer, KV head)s."""
    weight = (4 * normal(layout.layers, layout.kv_heads, 1)).exp()
    return layout.with_kinds(
        choose_kinds(layout, weight * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0]).expand(2, 1, 1, -1))
    )


def tiny_pool(
    pages: int, device: str = "cpu", unlike: bool = False, **changes: int
) -> SphericalKVPool:
    """A pool of `pages` hot pages, its frames neither centred nor calibrated; whether `unlike`,
    with patterns that differ between heads."""
    layout = tiny_layout(**changes)
    layout = unlike_heads(layout) if unlike else layout
    size = pages * layout.page_size
    return SphericalKVPool(size, layout, device, False, 0, layout.layers)


class Layer:
    """What the pool and the backend read of SGLang's RadixAttention."""

    def __init__(
        self, layer_id: int, kv_heads: int = 2, group: int = 1, head_dim: int = 32
    ) -> None:
        self.layer_id = layer_id
        self.tp_k_head_num = self.tp_v_head_num = kv_heads
        self.tp_q_head_num = kv_heads * group
        self.head_dim = self.qk_head_dim = self.v_head_dim = head_dim
        self.scaling = head_dim**-0.5


def random_tokens(pool: SphericalKVPool, tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Keys and values [layers, tokens, kv_heads, d] around means of twice their spread."""
    layout = pool.layout
    shape = layout.layers, layout.kv_heads, layout.head_dim
    return tuple(
        2 * normal(shape[0], 1, *shape[1:], seed=side)  # the model's: the same for all tokens
        + normal(shape[0], tokens, *shape[1:], seed=seed + 10 + side)
        for side in (1, 2)
    )


def ready_frames(pool: SphericalKVPool, tokens: int = 128) -> None:
    """Lets the frames see a prefill, as the backend does, so that pages may be re-tiered."""
    k, v = random_tokens(pool, tokens, seed=1000)
    positions = torch.arange(tokens)
    empty = torch.zeros(0, dtype=torch.int64)
    for index in range(pool.layout.layers):
        layer = Layer(index + pool.start_layer)
        q = normal(tokens, pool.layout.kv_heads, pool.layout.head_dim, seed=index)
        pool.observe(layer, q, k[index], v[index], positions, None, lambda: empty)


def write(pool: SphericalKVPool, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Codes k and v [layers, n, kv_heads, d] into token locations [n] of every layer."""
    for index in range(pool.layout.layers):
        pool.set_kv_buffer(Layer(index + pool.start_layer), loc, k[index], v[index])


def read_pages(pool: SphericalKVPool, pages: torch.Tensor) -> torch.Tensor:
    """What pages [n] of any levels decode to: [2, layers, n, page_size, kv_heads, d]."""
    layout, frames = pool.layout, pool.frames
    patterns, addresses = pool.arena.locate(pages)
    shape = SIDES, layout.layers, len(pages), layout.page_size, layout.kv_heads, layout.head_dim
    out = torch.empty(shape)
    for place in itertools.product(*map(range, patterns.shape)):
        layer, page, head, side = place
        pattern = PATTERNS[int(patterns[place])]
        slices = slice_layout(pattern, layout.page_size, layout.head_dim)
        out[side, layer, page, :, head] = decode_slices(
            slices,
            pool.arena.read_slices(slices, addresses[place].view(1)),
            frames.duals(pattern.frame, layer, side)[head].unsqueeze(0),
            frames.centre[side, layer, head].unsqueeze(0),
        )
    return out
