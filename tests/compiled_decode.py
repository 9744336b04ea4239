"""The decode kernel compiled for a GPU that is not here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compiling import run_apart

from spherical_kernels.codec.patterns import PATTERN_ID, Pattern
from spherical_kernels.decode.launch import Tuning

SCRIPT = """
import json, sys
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import slice_layout
from spherical_kernels.decode.kernel import decode_pages
from spherical_kernels.decode.launch import Tuning, kernel_constants, tuning_for

given = json.loads(sys.argv[1])
kinds = tuple(
    tuple(slice_layout(PATTERNS[i], given["page"], given["head_dim"]) for i in pair)
    for pair in given["kinds"]
)
tuning = Tuning(**given["tuning"]) if given["tuning"] else tuning_for(kinds, given["group"])
constants = kernel_constants(kinds, given["group"], tuning)
constants |= {"PTX": True, "PDL": given["capability"] >= 90}
types = {
    "signs": "i32", "Arena": "*i8", "Items": "*i32", "Pages": "*i32", "Blocks": "*i32",
    "Places": "*i32", "KindOf": "*i32",
    "Parts": "*i8", "Units": "*fp32", "Out": "*fp32", "Lse": "*fp32",
} | dict.fromkeys(
    ("max_pages", "blocks_per_page", "block_bytes", "level_stride", "kv_heads", "stride"), "i32"
)
aligned = [i for i, name in enumerate(types) if types[name] != "i32" and name != "KindOf"]
aligned.append(list(types).index("block_bytes"))
source = ASTSource(
    fn=decode_pages,
    signature=types | dict.fromkeys(constants, "constexpr"),
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
)
compiled = triton.compile(
    source,
    target=GPUTarget("cuda", given["capability"], 32),
    options={"num_warps": tuning.warps, "maxnreg": tuning.registers},
)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with TemporaryDirectory() as folder:
    path = Path(folder, "kernel.cubin")
    path.write_bytes(compiled.asm["cubin"])
    usage = run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
print(json.dumps(
    {"ptx": compiled.asm["ptx"], "usage": usage, "shared_bytes": compiled.metadata.shared}
))
"""


ENDS_SCRIPT = """
import json, sys
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import slice_layout
from spherical_kernels.decode.framing import encode_and_frame, frame_queries
from spherical_kernels.decode.launch import (
    FRAME_ROWS, FRAME_WARPS, MERGE_WARPS, _tile, first_constants, merge_constants, merge_of,
)
from spherical_kernels.decode.merge import merge_rows

head_dim, group, batch, kv_heads = *json.loads(sys.argv[1]), 8
merge = merge_of(batch * kv_heads)
tile = _tile(head_dim, group) | {"PTX": True}
framing = {
    "Q": "*bf16", "Channel": "*i32", "Weight": "*fp32", "Centre": "*fp32",
    "Parts": "*i8", "Units": "*fp32", "Near": "*fp32", "batch": "i32", "q_row": "i32",
    "kv_heads": "i32", "stride": "i32", "scale": "fp32",
}
encoding = {
    "Arena": "*u8", "PageBlocks": "*i32", "Loc": "*i64", "K": "*bf16", "V": "*bf16",
    "Places": "*i32", "HotCentre": "*fp32", "Signs": "*fp32", "num_tokens": "i32", "k_row": "i32",
    "k_head": "i32", "v_row": "i32", "v_head": "i32", "centre_side": "i32", "block_bytes": "i32",
}
kernels = (
    (frame_queries, FRAME_WARPS, framing, tile | {"ROWS": FRAME_ROWS}),
    (
        encode_and_frame, FRAME_WARPS, encoding | framing | {"encoding": "i32"},
        tile | first_constants(slice_layout(PATTERNS[0], 64, head_dim), 52, group),
    ),
    (merge_rows, MERGE_WARPS, {
        "Partial": "*fp32", "Lse": "*fp32", "ItemStart": "*i32",
        "HotItems": "*i32", "Channel": "*i32", "Weight": "*fp32", "Centre": "*fp32",
        "Near": "*fp32", "Out": "*bf16", "OutLse": "*fp32",
    }, merge_constants(merge, head_dim, kv_heads, group) | {"HOT": True, "CALIBRATED": True}),
)
tool, found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", []
for kernel, warps, types, constants in kernels:
    constants = constants | {"PDL": True}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if "*" in t},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    )
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found.append({
        "ptx": compiled.asm["ptx"], "usage": usage, "shared_bytes": compiled.metadata.shared
    })
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Compiled:
    """usage: what cuobjdump says of registers, stack and memory."""

    ptx: str
    usage: str
    shared_bytes: int


def compile_decode(
    kinds: Sequence[tuple[Pattern, Pattern]],
    head_dim: int,
    group: int,
    capability: int = 90,
    tuning: Tuning | None = None,
    page: int = 64,
) -> Compiled:
    """With the measured tuning where none is given."""
    given = {
        "kinds": [[PATTERN_ID[side] for side in kind] for kind in kinds],
        "head_dim": head_dim,
        "page": page,
        "group": group,
        "capability": capability,
        "tuning": asdict(tuning) if tuning else None,
    }
    return Compiled(**_found(SCRIPT, given))


def compile_ends(head_dim: int, group: int, batch: int) -> list[Compiled]:
    """The kernels before and after the pages, for sm_90."""
    return [Compiled(**one) for one in _found(ENDS_SCRIPT, [head_dim, group, batch])]


def _found(script: str, given: object) -> Any:
    return json.loads(run_apart(script, json.dumps(given)).splitlines()[-1])
