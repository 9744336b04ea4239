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
from spherical_kernels.decode.kernel import decode_pages
from spherical_kernels.decode.launch import kernel_constants, tuning_for

capability, head_dim, group = map(int, sys.argv[1:4])
pairs = [tuple(map(int, pair.split("-"))) for pair in sys.argv[4:]]
kinds = tuple(tuple(slice_layout(PATTERNS[i], 64, head_dim) for i in pair) for pair in pairs)
tuning = tuning_for(kinds, group)
constants = kernel_constants(kinds, group, tuning) | {"PTX": True, "PDL": capability >= 90}
types = {
    "Arena": "*i8", "Items": "*i32", "Pages": "*i32", "Blocks": "*i32", "Places": "*i32",
    "Parts": "*i8", "Sums": "*i32", "Units": "*fp32", "Out": "*fp32", "Lse": "*fp32",
} | dict.fromkeys(
    ("max_pages", "blocks_per_page", "block_bytes", "kind_stride", "kv_heads", "stride"), "i32"
)
aligned = [i for i, name in enumerate(types) if types[name] != "i32"]
aligned.append(list(types).index("block_bytes"))
source = ASTSource(
    fn=decode_pages,
    signature=types | dict.fromkeys(constants, "constexpr"),
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
)
target = GPUTarget("cuda", capability, 32)
options = {"num_warps": tuning.warps, "maxnreg": tuning.registers}
compiled = triton.compile(source, target=target, options=options)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with TemporaryDirectory() as folder:
    path = Path(folder, "kernel.cubin")
    path.write_bytes(compiled.asm["cubin"])
    print(run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout)
"""


HOT, WARM, COLD = "0-0", "2-3", "5-6"


@pytest.mark.parametrize(
    ("capability", "head_dim", "group", "kinds"),
    [
        (90, 128, 4, (HOT, WARM, COLD)),
        (90, 128, 8, (HOT, WARM)),
        (90, 64, 3, (HOT, WARM)),
        (80, 128, 4, (WARM,)),
    ],
)
def test_compiles_without_spills(
    capability: int, head_dim: int, group: int, kinds: tuple[str, ...]
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    arguments = [str(value) for value in (capability, head_dim, group)]
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments, *kinds],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "STACK:0" in found.stdout and "LOCAL:0" in found.stdout, found.stdout
