"""The Hopper kernel of extending compiles for a GPU that is not here: it fits, spills nothing, its
loops carry what they should, and ptxas lets its products run side by side.
"""

from __future__ import annotations

import pytest
import triton
from compiling import run_apart
from fake_gpu import SHARED_BYTES

from spherical_kernels.extend.launch import HOPPER_TRITON

if not triton.__version__.startswith(HOPPER_TRITON):
    pytest.skip("the kernel is for another Triton", allow_module_level=True)

SCRIPT = """
import sys
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

import triton
from loop_carries import refuse_lost_carries
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from spherical_kernels.codec.patterns import PATTERNS
from spherical_kernels.codec.slices import slice_layout
from spherical_kernels.extend.hopper import extend_pages_hopper
from spherical_kernels.extend.launch import HOPPER_TUNING, kernel_constants

refuse_lost_carries()
keys, values, d = map(int, sys.argv[1:])
keys, values = (slice_layout(PATTERNS[i], 64, d) for i in (keys, values))
tuning = HOPPER_TUNING
constants = kernel_constants(keys, values, 4) | {
    "M": tuning.tile_rows, "KIND": 1, "LEVELS": 3, "STAGES": tuning.stages, "PDL": True,
}
TYPES = {
    "Arena": "*i32", "Entries": "*i64", "Items": "*i32", "Requests": "*i32", "Runs": "*i32",
    "Levels": "*i32", "Q": "*fp16",
}
types = {
    name: TYPES.get(name, "*fp32" if name[0].isupper() else "i32")
    for name in extend_pages_hopper.arg_names
} | dict.fromkeys(constants, "constexpr")
aligned = [i for i, kind in enumerate(types.values()) if kind.startswith("*")]
source = GluonASTSource(
    fn=extend_pages_hopper, signature=types, constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
)
options = {"num_warps": tuning.warps}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
with TemporaryDirectory() as folder:
    ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
    ptx.write_text(compiled.asm["ptx"])
    command = [tools / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", cubin]
    found = run(command, capture_output=True, text=True)
    code = run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
print(found.stdout + found.stderr)
print("products", code.count("HGMMA"), "waits", code.count("WARPGROUP.DEPBAR"))
print("shared", compiled.metadata.shared)
"""


@pytest.mark.parametrize(
    ("keys", "values", "d"),
    [(0, 0, 128), (2, 3, 128), (8, 9, 128), (5, 6, 128), (7, 6, 64), (8, 9, 64)],
)
def test_compiles_without_spills_or_waits(keys: int, values: int, d: int) -> None:
    out = run_apart(SCRIPT, keys, values, d)
    assert "0 bytes spill stores, 0 bytes spill loads" in out, out
    assert "C75" not in out, out  # ptxas waits for every product
    (line,) = (line for line in out.splitlines() if line.startswith("products "))
    products, waits = int(line.split()[1]), int(line.split()[3])
    assert products > 2 * waits > 0, out
    assert int(out.split("shared ")[1].split()[0]) <= SHARED_BYTES
