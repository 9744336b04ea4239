"""What attention adds to a layer of a decode step: between the layer's matrix products, on one GPU.

usage: PYTHONPATH=kernels python benchmarks/step.py [--points 8192,1 ...] [--layers N]
       [--page-layers N] [--kinds hot,warm,cool,cold,frozen] [--peers NAME ...] [--json OUT]

`run.py` times a layer's attention alone. In a server every layer comes after matrix products that
push hundreds of megabytes through the L2 cache and their own code through the multiprocessors, and
its pages lie one whole page of all layers apart. So this captures a graph of several layers of
Llama-3.1-8B's products, with and without attention (ours with the encoding of the new tokens), and
reports the difference per layer. A request has one hot page first, four last, the others warm.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from decode_cases import PAGE, Batch, Shape
from decode_peers import PEERS
from timing import kernel_us, replay_us

from spherical_kernels.codec.frames import LayerFrames
from spherical_kernels.decode.launch import run_decode
from spherical_kernels.encode.launch import NewTokens, rotation_signs

HIDDEN, WIDE, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
MODEL_LAYERS = 32  # of Llama-3.1-8B: how many layers a page holds
KINDS = {"hot": (0, 0), "warm": (2, 3), "cool": (4, 4), "cold": (5, 6), "frozen": (7, 6)}
Attend = Callable[[int], object]


class Products:
    """The matrix products of some layers: random weights, bf16."""

    def __init__(self, layers: int, batch: int) -> None:
        qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        shapes = ((HIDDEN, qkv), (HEADS * HEAD_DIM, HIDDEN), (HIDDEN, 2 * WIDE), (WIDE, HIDDEN))
        new = {"device": "cuda", "dtype": torch.bfloat16}
        self.weights = [
            [torch.empty(b, a, **new).normal_(std=a**-0.5).T for a, b in shapes]
            for _ in range(layers)
        ]
        self.x = torch.randn(batch, HIDDEN, **new)

    def run(self, attend: Attend | None) -> None:
        for layer, (qkv, out, up, down) in enumerate(self.weights):
            qkv = self.x @ qkv
            if attend:
                attend(layer)
            hidden = qkv[:, : HEADS * HEAD_DIM] @ out @ up
            hidden[:, :WIDE] @ down


def ours(shape: Shape, layers: int, page_layers: int, kinds: list[str]) -> Attend:
    """Encoding and attention of one layer, as the server launches them."""
    batch = Batch(shape, "mixed", page_layers, {name: KINDS[name] for name in kinds})
    decode = batch.plan()
    given = batch.frames
    tensors = given.key_duals, given.value_duals, given.key_centre, given.value_centre
    frames = [LayerFrames.over(*(tensor.clone() for tensor in tensors)) for _ in range(layers)]
    last = batch.page_ids.view(shape.batch, shape.pages)[:, -1]
    loc = last * PAGE + (shape.context - 1) % PAGE
    k, v = torch.randn(2, shape.batch, KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
    centre = torch.stack([batch.frames.key_centre, batch.frames.value_centre])
    signs = rotation_signs(batch.frames.key_duals[0, 0])

    def attend(layer: int) -> None:
        pages = batch.layers[layer % page_layers]
        new = NewTokens(
            pages.arena, pages.page_blocks, loc, k, v, pages.places[0], centre, signs,
            pages.block_bytes, batch.kinds[0][0],
        )  # fmt: skip
        run_decode(
            decode.tables, batch.kinds, batch.q, pages, frames[layer], batch.scale,
            decode.workspace, decode.out, decode.lse, new=new,
        )  # fmt: skip

    return attend


def peer(name: str, shape: Shape, layers: int) -> Attend | None:
    """A dense decode kernel, a cache for every layer."""
    found = [PEERS[name](shape) for _ in range(layers)]
    return None if found[0] is None else lambda layer: found[layer]()  # type: ignore[misc]


def measure(context: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One point."""
    shape = Shape(batch, context, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    products = Products(args.layers, batch)
    row: dict[str, Any] = {"context": context, "batch": batch}

    def added(attend: Attend) -> float:
        whole, base = replay_us(lambda: products.run(attend), lambda: products.run(None))
        row["products_us"] = base / args.layers
        return (whole - base) / args.layers

    attend = ours(shape, args.layers, args.page_layers, args.kinds.split(","))
    row["ours_us"] = added(attend)
    times = kernel_us(partial(products.run, attend))
    names = ("encode_and_frame", "decode_pages", "merge_rows")
    row["kernels_us"] = {name: times.get(name, 0.0) / args.layers for name in names}
    del attend
    for name in args.peers:
        its = peer(name, shape, args.layers)
        if its is not None:
            row[name] = added(its)
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--points", nargs="+", default=["8192,1", "32768,1", "8192,64"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--page-layers", type=int, default=MODEL_LAYERS)
    parser.add_argument("--kinds", default="hot,warm,cool,cold")
    parser.add_argument("--peers", nargs="*", default=["flashinfer_bf16_us"], choices=list(PEERS))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rows = []
    for point in args.points:
        context, batch = map(int, point.split(","))
        rows.append(measure(context, batch, args))
        print(
            {k: v if isinstance(v, (int, dict)) else round(v, 1) for k, v in rows[-1].items()},
            flush=True,
        )
        torch.cuda.empty_cache()
    if args.json:
        found = {
            "device": torch.cuda.get_device_name(), "command": shlex.join(sys.argv),
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "triton": triton.__version__,
            },
            "page_layers": args.page_layers, "kinds": args.kinds, "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
