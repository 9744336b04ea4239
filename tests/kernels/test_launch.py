"""Launches: what Triton would launch, without asking it again.

In a process of its own, since Triton may be interpreting here; the GPU is made up, and tells what
it was given.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import fake_gpu
import torch
import triton
import triton.language as tl

from spherical_kernels.device import Launch

launched = fake_gpu.use().launched


@triton.jit
def shift(X, Y, n, by, stride, BLOCK: tl.constexpr, UNUSED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at * stride, tl.load(X + at, mask=at < n) + by, mask=at < n)


memory = torch.zeros(64)
same = memory, memory[16:], 40, 0.5, 3
unlike = {
    "an address": (memory[1:], memory, 40, 0.5, 3),
    "a type": (memory.int(), memory, 40, 0.5, 3),
    "one": (memory, memory, 40, 0.5, 1),
    "a multiple": (memory, memory, 48, 0.5, 3),
    "a large number": (memory, memory, 40, 0.5, 3 << 40),
}
for arguments in (same, (memory[32:], memory, 41, 0.75, 5), *unlike.values()):
    direct = Launch(shift, UNUSED=7, BLOCK=16, num_warps=1)
    direct((2, 1, 1), *same)
    shift[(2, 1, 1)](*arguments, UNUSED=7, BLOCK=16, num_warps=1)
    for _ in range(2):
        direct((2, 1, 1), *arguments)
        assert launched[-1] == launched[-2], launched[-2:]
print(len(set(function for _, function, _ in launched)), "binaries")
"""


def test_the_binary_that_triton_would_take(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # Triton reads kernels from files
    script.write_text(SCRIPT)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "6 binaries"
