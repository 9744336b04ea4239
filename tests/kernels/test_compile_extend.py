"""The extend kernels compile for a GPU that is not here, and spill no registers where they loop.

Compiling takes a process of its own: in this one Triton may be interpreting.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import slice_layout
from spherical_kernels.extend import kernel
from spherical_kernels.extend.launch import (
    TUNING as tuning, columns_of, kernel_constants, steps_of_bands,
)

name, keys, values, d = sys.argv[1], *map(int, sys.argv[2:])
keys, values = (slice_layout(PATTERNS[i], 64, d) for i in (keys, values))
shape = {"D": d, "DC": columns_of(d), "G": 4}
constants = {
    "extend_pages": kernel_constants(keys, values, 4) | {
        "M": tuning.tile_rows, "KIND": 1, "KINDS": 3, "FIRST": True, "STAGES": tuning.stages,
        "PTX": True,
    },
    "frame_rows": shape | {"STEPS": steps_of_bands(keys), "ROWS": 64},
    "finish_rows": shape | {
        "M": tuning.tile_rows, "ROWS": 32, "PLANES": 2, "BANDS": (1, 4), "BLOCK": 32
    },
    "attend_new_rows": {
        "D": d, "DP": columns_of(d), "G": 4, "M": tuning.tile_rows, "BLOCK": 64
    },
}[name]
TYPES = {
    "Arena": "*i32", "Entries": "*i64", "Items": "*i32", "Tiles": "*i32", "Requests": "*i32",
    "Runs": "*i32", "New": "*bf16", "Out": "*bf16", "K": "*bf16", "V": "*bf16",
    "Framed": "*fp16", "scale": "fp32",
}
DEFAULTS = {True: "*fp32", False: "i32"}
function = getattr(kernel, name)
types = {}
for argument in function.arg_names:
    types[argument] = TYPES.get(argument, DEFAULTS[argument[0].isupper()])
    if argument == "Q":
        types[argument] = "*fp16" if name == "extend_pages" else "*bf16"
    if argument in constants:
        types[argument] = "constexpr"
aligned = [i for i, kind in enumerate(types.values()) if kind.startswith("*")]
source = ASTSource(
    fn=function,
    signature=types,
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
)
warps = {"frame_rows": 8, "finish_rows": 8}.get(name, tuning.warps)
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
lines = code.splitlines()
products = [i for i, line in enumerate(lines) if "HGMMA" in line]
if name == "extend_pages":  # a few registers may wait in memory from before to behind the loops
    lines = lines[products[0] : products[-1]]
print("products", len(products))
print("spills", sum("STL" in line or "LDL" in line for line in lines))
"""


@pytest.mark.parametrize(
    ("name", "keys", "values", "d"),
    [
        ("extend_pages", 0, 0, 128),
        ("extend_pages", 2, 3, 128),
        ("extend_pages", 5, 6, 128),
        ("extend_pages", 2, 3, 64),
        ("frame_rows", 2, 3, 128),
        ("finish_rows", 2, 3, 128),
        ("attend_new_rows", 2, 3, 128),
    ],
)
def test_compiles_without_spills(name: str, keys: int, values: int, d: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    arguments = [name, *(str(value) for value in (keys, values, d))]
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "spills 0\n" in found.stdout and "LOCAL:0" in found.stdout, found.stdout
    if name == "extend_pages":
        assert "products 0" not in found.stdout  # Hopper's tensor cores
