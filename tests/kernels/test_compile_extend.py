"""The extend kernels compile for a GPU that is not here, without spilling registers.

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
    columns_of, kernel_constants, steps_of_bands, tuning_for,
)

name, keys, values, d, rows = sys.argv[1], *map(int, sys.argv[2:])
keys, values = (slice_layout(PATTERNS[i], 64, d) for i in (keys, values))
tuning = tuning_for(rows)
shape = {"D": d, "DC": columns_of(d), "G": 4}
constants = {
    "extend_pages": kernel_constants(keys, values, 4) | {
        "M": tuning.tile_rows, "KIND": 1, "KINDS": 3, "FIRST": True, "STAGES": tuning.stages,
        "PTX": True,
    },
    "frame_rows": shape | {"STEPS": steps_of_bands(keys), "ROWS": 64},
    "finish_rows": shape | {
        "M": tuning.tile_rows, "ROWS": 64, "PLANES": 2, "BANDS": (1, 4), "BLOCK": 32
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
warps = {"frame_rows": 8, "finish_rows": 4}.get(name, tuning.warps)
options = {"num_warps": warps}
if name == "extend_pages" and tuning.registers:
    options["maxnreg"] = tuning.registers
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with TemporaryDirectory() as folder:
    path = Path(folder, "kernel.cubin")
    path.write_bytes(compiled.asm["cubin"])
    print(run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout)
print("wgmma" in compiled.asm["ptx"])
"""


@pytest.mark.parametrize(
    ("name", "keys", "values", "d", "rows"),
    [
        ("extend_pages", 0, 0, 128, 1024),
        ("extend_pages", 2, 3, 128, 1024),
        ("extend_pages", 2, 3, 128, 64),
        ("extend_pages", 5, 6, 128, 1024),
        ("extend_pages", 2, 3, 64, 1024),
        ("frame_rows", 2, 3, 128, 1024),
        ("finish_rows", 2, 3, 128, 1024),
        ("attend_new_rows", 2, 3, 128, 1024),
    ],
)
def test_compiles_without_spills(name: str, keys: int, values: int, d: int, rows: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    arguments = [name, *(str(value) for value in (keys, values, d, rows))]
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "STACK:0" in found.stdout and "LOCAL:0" in found.stdout, found.stdout
    if name == "extend_pages":
        assert "True" in found.stdout  # tensor cores of Hopper
