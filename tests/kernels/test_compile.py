"""The decode kernel compiles for GPUs that are not here, without spilling registers.

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
from spherical_kernels.decode.kernel import decode_items
from spherical_kernels.decode.launch import kernel_constants, tuning_for

capability, keys, values, d = map(int, sys.argv[1:])
layouts = [slice_layout(PATTERNS[i], 64, d) for i in (keys, values)]
tuning = tuning_for(layouts[0])
constants = kernel_constants(*layouts, 4) | {"STAGES": tuning.stages, "PTX": True}
types = {
    "Arena": "*i16", "Entries": "*i64", "Items": "*i32", "Q": "*fp32", "Out": "*fp32",
    "Lse": "*fp32", "first_item": "i32",
}
source = ASTSource(
    fn=decode_items,
    signature=types | dict.fromkeys(constants, "constexpr"),
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},
)
target = GPUTarget("cuda", capability, 32)
compiled = triton.compile(source, target=target, options={"num_warps": tuning.warps})
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with TemporaryDirectory() as folder:
    path = Path(folder, "kernel.cubin")
    path.write_bytes(compiled.asm["cubin"])
    print(run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.parametrize(
    ("capability", "keys", "values", "d"),
    [(90, 0, 0, 128), (90, 2, 3, 128), (90, 5, 6, 128), (90, 2, 3, 64), (80, 2, 3, 128)],
)
def test_compiles_without_spills(capability: int, keys: int, values: int, d: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    arguments = [str(value) for value in (capability, keys, values, d)]
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "STACK:0" in found.stdout and "LOCAL:0" in found.stdout, found.stdout
