"""SGLang's KVCache, holding codes: new tokens go into hot pages, nothing dense is kept.

Subclasses `KVCache` and not `MHATokenToKVPool`, and calls itself uint8: either would invite
SGLang's
fused kernels to write dense keys into the arena.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import KVCache

from sglang_spherical.pool.arena import Arena
from sglang_spherical.pool.choice import choose_kinds
from sglang_spherical.pool.estimate import expected_distortion
from sglang_spherical.pool.frames import Frames
from sglang_spherical.pool.layout import PageLayout
from sglang_spherical.pool.order import DeviceOrder
from sglang_spherical.pool.retier import lower_pages, recentre_pages
from spherical_kernels.codec.pages import code_directions
from spherical_kernels.codec.slices import pack_digits
from spherical_kernels.encode.launch import NewTokens, encode_tokens, rotation_signs

ENOUGH_TOKENS = 1 << 14
"""Observed tokens of a layer that say all there is to learn: more only cost time, as on a server
that lowers nothing while it has memory."""


class SphericalKVPool(KVCache):
    """The memory of one rank.

    size      capacity in hot-token equivalents, a multiple of the page size
    order     the stream on which pages change
    learning  whether the frames learn from prefills: not from those that only warm up or capture
    kernels   whether GPU kernels do the work; on a CPU their references do
    levels_seen  levels that a page may have been given since the last flush
    layer_frames  what reading takes, by layer
    """

    def __init__(
        self,
        size: int,
        layout: PageLayout,
        device: str,
        enable_memory_saver: bool,
        start_layer: int,
        end_layer: int,
    ) -> None:
        super().__init__(
            size,
            layout.page_size,
            torch.uint8,
            layout.layers,
            device,
            enable_memory_saver,
            start_layer,
            end_layer,
        )
        self._built = layout
        self.head_num = layout.kv_heads
        self.head_dim = self.v_head_dim = layout.head_dim
        hot_pages = size // layout.page_size
        self.arena = Arena(
            layout,
            hot_pages * layout.hot_blocks,
            1 + hot_pages * layout.hot_blocks // min(layout.blocks),
            device,
            lambda: self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE),
        )
        self.frames = Frames(
            layout.layers, layout.kv_heads, layout.head_dim, layout.page_size, device
        )
        self.kernels = self.arena.device.type == "cuda"
        # by layer, made once: a forward pass asks for them in every layer
        self.layer_frames = [self.frames.of_layer(i) for i in range(layout.layers)]
        self._hot_places = self.arena.places[0].unbind()
        self._centres = self.frames.centre.unbind(1)
        self._hot_slices = layout.side_layouts(0)[0]
        self.signs = rotation_signs(self.frames.rotation)
        self.levels_seen = {0}
        self.order = DeviceOrder(self.arena.device)
        self.learning = True
        self._finalize_allocation_log(size)

    def start(self, forward_stream: torch.cuda.Stream | None) -> None:
        """Everything is built, warmed up and captured: requests come from now on.

        forward_stream  the forward passes' own; None where they run on the scheduler's
        """
        self.order.stream = forward_stream
        self.learning = True

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        k_scale: object = None,
        v_scale: object = None,
    ) -> None:
        """Codes new keys and values [n, kv_heads, d] into the hot pages of token locations [n]."""
        if k_scale is not None or v_scale is not None:
            raise ValueError(
                "k_scale, v_scale: spherical pages carry radii; quantised keys are not accepted"
            )
        loc = getattr(loc_info, "loc", loc_info)
        index = layer.layer_id - self.start_layer
        if self.kernels:
            encode_tokens(self.new_tokens(index, loc, cache_k, cache_v))
            return
        pages, tokens = loc // self.page_size, loc % self.page_size
        _, addresses = self.arena.locate(pages, index)
        for side, x in enumerate((cache_k, cache_v)):
            slices = self.layout.side_layouts(0)[side]
            y = (x.float() - self.frames.centre[side, index]) @ self.frames.rotation.T
            codes, radii = code_directions(y, slices.pattern.bits[0])
            rows = pack_digits(codes, slices.pattern.bits[0])
            self.arena.write_tokens(
                slices, addresses[..., side], tokens, rows, radii.squeeze(-1).half()
            )

    def new_tokens(
        self, index: int, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> NewTokens:
        """Keys and values [n, kv_heads, d] for token locations [n] of the pool's layer `index`, as
        its encoder takes them."""
        return NewTokens(
            self.arena.bytes, self.arena.page_blocks, loc, k, v, self._hot_places[index],
            self._centres[index], self.signs, self.layout.block_bytes, self._hot_slices,
        )  # fmt: skip

    def learns(self, layer: Any) -> bool:
        """Whether a prefill has anything to tell of a layer."""
        index = layer.layer_id - self.start_layer
        seen = self.frames.statistics.spread_count[index]
        known = self.frames.centred[index] and (self.frames.calibrated or seen >= ENOUGH_TOKENS)
        return self.learning and not known

    def observe(
        self,
        layer: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        ids: torch.Tensor | None,
        pages_in_use: Callable[[], torch.Tensor],
    ) -> None:
        """Lets the frames learn from a prefill, before its tokens are written: see
        `Frames.observe`.

        pages_in_use  ids int64 [n] of pages that hold anything, asked once per layer
        """
        if not self.learns(layer):
            return
        index = layer.layer_id - self.start_layer
        centre = self.frames.new_centre(index, k, v, positions)
        if centre is not None:
            recentre_pages(self.arena, self.frames, index, pages_in_use(), centre)
            self.frames.freeze_centre(index, centre)
        self.frames.observe(index, q, k, v, positions, ids, layer.scaling)

    def lower(self, pages: torch.Tensor, old: int, new: int) -> torch.Tensor:
        """Re-encodes full pages [n] from level `old` to `new`; returns the blocks given back."""
        self._calibrate()
        self.levels_seen.add(new)
        return lower_pages(self.arena, self.frames, pages, old, new, self.kernels)

    def _calibrate(self) -> None:
        """Before the first page is lowered: freezes the frames, and the patterns of heads unless
        the pool was built with some. After a flush both may be others."""
        if self.frames.calibrated:
            return
        self.frames.calibrate()
        if self._built.chosen is None:
            distortion = expected_distortion(self.frames)
            kinds = choose_kinds(self._built, distortion, finer=False)
            self.arena.assign(self._built.with_kinds(kinds))

    def forget(self) -> None:
        """The cache was flushed: frames gathered online start again."""
        self.levels_seen = {0}
        self.frames.reset()

    @property
    def layout(self) -> PageLayout:
        """Of pages, with the patterns that heads have now."""
        return self.arena.layout

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena, the padding page's included; tables come on top."""
        return self.arena.bytes.numel()

    def bytes_per_token(self) -> dict[str, float]:
        """Resident bytes of a token by level's name, tables and padding included, and `bf16` for
        scale."""
        sizes = {
            level.name: self.layout.bytes_per_token(i) for i, level in enumerate(self.layout.levels)
        }
        return sizes | {"bf16": float(self.layout.dense_bytes_per_token())}

    def get_kv_size_bytes(self) -> int:
        return self.arena.bytes.numel() + self.arena.table_bytes

    def get_key_buffer(self, layer_id: int) -> NoReturn:
        raise NotImplementedError(
            "a spherical pool holds no dense keys: attend to its codes instead"
        )

    def get_value_buffer(self, layer_id: int) -> NoReturn:
        raise NotImplementedError(
            "a spherical pool holds no dense values: attend to its codes instead"
        )

    def get_kv_buffer(self, layer_id: int) -> NoReturn:
        raise NotImplementedError("a spherical pool holds no dense keys or values")

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> NoReturn:
        raise NotImplementedError("spherical pages are not moved token by token")

    def get_contiguous_buf_infos(self) -> NoReturn:
        raise NotImplementedError("PD disaggregation cannot transfer spherical pages yet")
