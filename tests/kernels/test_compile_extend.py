"""The extend kernels compile for a GPU that is not here, fit into its shared memory, and spill no
registers where they loop.
"""

from __future__ import annotations

import pytest
from compiling import run_apart
from fake_gpu import SHARED_BYTES

SCRIPT = """
import re
import sys
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

import triton
from loop_carries import refuse_lost_carries
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import slice_layout
from spherical_kernels.extend import ends, kernel
from spherical_kernels.extend.launch import (
    FRAME_WARPS, finish_constants, frame_constants, kernel_constants, tuning_for,
)
from spherical_kernels.extend.new_tokens import new_rows_constants

refuse_lost_carries()
name, dtype, keys, values, d, page = *sys.argv[1:3], *map(int, sys.argv[3:])
keys, values = (slice_layout(PATTERNS[i], page, d) for i in (keys, values))
tuning = tuning_for(d)
finish, finish_warps = finish_constants(d, few="few_" in name)
name = name.replace("few_", "")
constants = {
    "extend_pages": kernel_constants(keys, values, 4) | {
        "M": tuning.tile_rows, "KIND": 1, "LEVELS": 3, "STAGES": tuning.stages,
        "PTX": True, "PDL": True,
    },
    "frame_rows": frame_constants([slice_layout(PATTERNS[0], page, d), keys], 4) | {"PDL": True},
    "finish_rows": finish | {
        "G": 4, "M": tuning.tile_rows, "PLANES": (0, 1), "BANDS": (1, 4), "PDL": True
    },
    "attend_new_rows": {"G": 4}
    | new_rows_constants(d, 4 if dtype == "fp32" else 2, tuning.tile_rows),
}[name]
TYPES = {
    "Arena": "*i32", "Entries": "*i64", "Items": "*i32", "Tiles": "*i32", "Requests": "*i32",
    "Runs": "*i32", "Levels": "*i32", "Framed": "*fp16", "scale": "fp32",
    **{name: "*" + dtype for name in ("Q", "K", "V", "Out")},
}
DEFAULTS = {True: "*fp32", False: "i32"}
function = getattr(kernel if name == "extend_pages" else ends, name)
types = {}
for argument in function.arg_names:
    types[argument] = TYPES.get(argument, DEFAULTS[argument[0].isupper()])
    if argument in constants:
        types[argument] = "constexpr"
aligned = [
    i for i, (argument, kind) in enumerate(types.items())
    if kind.startswith("*") or argument.endswith("_token")
]
source = ASTSource(
    fn=function,
    signature=types,
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
)
warps = {
    "extend_pages": tuning.warps, "frame_rows": FRAME_WARPS, "finish_rows": finish_warps,
    "attend_new_rows": 4,
}[name]
options = {"num_warps": warps}
if name == "extend_pages" and tuning.registers:
    options["maxnreg"] = tuning.registers
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
with TemporaryDirectory() as folder:
    path = Path(folder, "kernel.cubin")
    path.write_bytes(compiled.asm["cubin"])
    usage = run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True)
    code = run([tools / "nvdisasm", "-c", path], capture_output=True, text=True).stdout
print(usage.stdout)
print("shared", compiled.metadata.shared)
lines = code.splitlines()
if name == "extend_pages":  # a few registers may wait in memory around the loop over pages
    labels = {line.strip(" :"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    branches = [(i, re.search(r"BRA.*`[(](.*)[)]", line)) for i, line in enumerate(lines)]
    loops = [lines[labels[found[1]] : i] for i, found in branches if found]
    lines = min((loop for loop in loops if "HGMMA" in "".join(loop)), key=len)
print("products", sum("HGMMA" in line for line in lines))
print("spills", sum("STL" in line or "LDL" in line for line in lines))
"""


@pytest.mark.parametrize(
    ("name", "keys", "values", "d", "page"),
    [
        ("extend_pages", 0, 0, 128, 64),
        ("extend_pages", 2, 3, 128, 64),
        ("extend_pages", 8, 9, 128, 64),
        ("extend_pages", 5, 6, 128, 64),
        ("extend_pages", 7, 6, 128, 64),
        ("extend_pages", 2, 3, 64, 64),
        ("extend_pages", 7, 6, 64, 64),
        ("extend_pages", 5, 6, 80, 64),  # here operands lie transposed (joined_columns)
        ("extend_pages", 5, 6, 64, 32),  # likewise
        ("extend_pages", 0, 0, 96, 64),
        ("extend_pages", 0, 0, 256, 64),
        ("frame_rows", 2, 3, 128, 64),
        ("frame_rows", 2, 3, 256, 64),
        ("finish_rows", 2, 3, 128, 64),
        ("finish_few_rows", 2, 3, 128, 64),
        ("finish_rows", 2, 3, 256, 64),
        ("attend_new_rows", 2, 3, 128, 64),
        ("attend_new_rows", 2, 3, 256, 64),
    ],
)
def test_compiles_without_spills(name: str, keys: int, values: int, d: int, page: int) -> None:
    found = compile_kernel(
        name, "fp16" if name == "extend_pages" else "bf16", keys, values, d, page
    )
    assert "spills 0\n" in found and "LOCAL:0" in found, found
    if name == "extend_pages":
        assert "products 0" not in found  # Hopper's tensor cores


@pytest.mark.parametrize("name", ["frame_rows", "finish_rows", "finish_few_rows"])
def test_three_products_for_one_fit_too(name: str) -> None:
    """As for everything but bfloat16."""
    assert "spills 0\n" in compile_kernel(name, "fp16", 2, 3, 128, 64)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("attend_new_rows", "fp32"), ("finish_rows", "fp32"), ("extend_pages", "fp16")],
)
def test_wide_heads_fit(name: str, dtype: str) -> None:
    """Registers do not hold these rows of 256 channels, shared memory does."""
    compile_kernel(name, dtype, 5, 6, 256, 64)


def compile_kernel(name: str, dtype: str, keys: int, values: int, d: int, page: int) -> str:
    """What SCRIPT prints of the kernel. Raises AssertionError where it does not fit."""
    found = run_apart(SCRIPT, name, dtype, keys, values, d, page)
    (shared,) = (line for line in found.splitlines() if line.startswith("shared "))
    assert int(shared.split()[1]) <= SHARED_BYTES
    return found
