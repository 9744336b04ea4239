"""The encoder and the re-tiering kernels compile for a GPU that is not here, and spill nothing."""

from __future__ import annotations

import pytest
from compiling import run_apart

COMMON = """
import sys
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import slice_layout


def usage(kernel, types, constants, unaligned, warps, capability=90):
    names = list(types)
    aligned = [i for i, name in enumerate(names) if name not in unaligned]
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        print(run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout)
"""

ENCODE = """
from spherical_kernels.encode.kernel import encode_tokens_kernel
from spherical_kernels.encode.launch import SMALL_TUNING, TUNING, kernel_constants

d, pattern = map(int, sys.argv[1:])
types = {
    "Arena": "*u8", "PageBlocks": "*i32", "Loc": "*i64", "K": "*bf16", "V": "*bf16",
    "Places": "*i32", "Centre": "*fp32", "Signs": "*fp32", "num_tokens": "i32", "k_row": "i32",
    "k_head": "i32", "v_row": "i32", "v_head": "i32", "centre_side": "i32", "block_bytes": "i32",
}
for tuning in (SMALL_TUNING, TUNING):
    constants = kernel_constants(slice_layout(PATTERNS[pattern], 64, d))
    constants = constants | {"H": 52, "ROWS": tuning.rows}
    usage(encode_tokens_kernel, types, constants, {"num_tokens"}, tuning.warps)
"""

RETIER = """
from spherical_kernels.retier.kernel import reencode_slices
from spherical_kernels.retier.launch import kernel_constants, tuning_for

d, old, new = map(int, sys.argv[1:])
types = {
    "Arena": "*u8", "PageBlocks": "*i32", "Pages": "*i64", "Slices": "*i32", "Places": "*i32",
    "Offsets": "*i32", "Turns": "*fp16", "TurnScales": "*fp32", "Scratch": "*u8",
    "first_page": "i32", "num_pages": "i32", "slices": "i32", "block_bytes": "i32",
    "page_bytes": "i32",
}
tuning = tuning_for(d)
layouts = [slice_layout(PATTERNS[i], 64, d) for i in (old, new)]
constants = kernel_constants(*layouts)
constants = constants | {"SIDE": 0, "H": 52, "STAGES": tuning.stages, "PTX": True}
usage(reencode_slices, types, constants, {"first_page", "num_pages"}, tuning.warps)
"""


def assert_no_spills(usage: str, kernels: int) -> None:
    assert usage.count("STACK:0") == usage.count("LOCAL:0") == kernels, usage


@pytest.mark.parametrize(("d", "pattern"), [(128, 0), (64, 0), (96, 0), (256, 0), (128, 1)])
def test_encoder_compiles_without_spills(d: int, pattern: int) -> None:
    assert_no_spills(run_apart(COMMON + ENCODE, d, pattern), 2)


@pytest.mark.parametrize(
    ("d", "old", "new"),
    [
        (128, 0, 2),
        (128, 0, 8),
        (128, 9, 6),
        (128, 2, 5),
        (128, 3, 6),
        (64, 0, 3),
        (96, 0, 2),
        (256, 0, 2),
        (128, 1, 5),
        (128, 5, 7),
        (64, 0, 7),
    ],
)
def test_retiering_compiles_without_spills(d: int, old: int, new: int) -> None:
    assert_no_spills(run_apart(COMMON + RETIER, d, old, new), 1)
