"""What a server compiles at its start is what serving then launches: no request waits for more.

In a process of its own, since Triton may be interpreting here; for a GPU that is not there, so that
everything but running is as on one.
"""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import torch
import triton

import spherical_kernels.device as device

device.has_ptx = device.has_dependent_launch = device.has_wgmma = lambda _: True


import backend_tools
import fake_gpu
import loop_carries
from backend_tools import GROUP, HEADS, Prompt, Runner
from sglang_spherical.attention.compile_ahead import compile_kernels
from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.choice import choose_kinds
from spherical_kernels.decode import framing, kernel, merge
from spherical_kernels.encode.kernel import encode_tokens_kernel
from spherical_kernels.extend import ends as extend_ends
from spherical_kernels.extend.hopper import extend_pages_hopper
from spherical_kernels.extend.kernel import extend_pages
from spherical_kernels.extend.prefixes import locate_slices, sort_prefixes
from spherical_kernels.retier import kernel as retier

KERNELS = (
    framing.encode_and_frame, kernel.decode_pages, merge.merge_rows, encode_tokens_kernel,
    extend_ends.frame_rows, extend_ends.attend_new_rows, extend_ends.finish_rows,
    sort_prefixes, locate_slices, extend_pages, extend_pages_hopper,
    retier.reencode_slices, retier.copy_slices,
)


gpu = fake_gpu.use()
loop_carries.refuse_lost_carries()


def compiled():
    return {(k.fn.__name__, key) for k in KERNELS for key in k.device_caches[0][0]}


# the smallest head dimension that a GPU serves, and pages that Hopper's kernel reads
backend_tools.DIM, backend_tools.PAGE = 64, 64
runner = Runner(dtype=torch.bfloat16, kernels=True)
pool = runner.pool
ones = torch.ones_like(pool.frames.centre)
pool.frames.load(ones, ones[0], ones)
compile_kernels(pool, runner.req_to_token, HEADS * GROUP, torch.bfloat16)
before = compiled()
# as on a server that learns from its first prompts, heads pick their patterns later
distortion = torch.rand(2, *pool.frames.centre.shape[1:3], 1) * 4.0 ** torch.arange(len(CHOICES[0]))
kinds = choose_kinds(pool.layout, distortion, finer=False)
pool.arena.assign(pool.layout.with_kinds(kinds))
assert any(len(pool.arena.moves(old, old + 1).kept) for old in range(1, 4))
print(sorted({name for name, _ in before}))
binaries = [binary for k in KERNELS for binary in k.device_caches[0][0].values()]
assert len(binaries) == gpu.loaded and all(binary.module for binary in binaries)
first, second = Prompt(1, 0), Prompt(2, 1)
with device.compiling(2):
    runner.extend((first, 40))
    for level in range(len(pool.layout.levels)):
        pool.levels_seen.add(level)
        runner.extend((first, 5), (second, 30 + level))
    runner.decode(first)
    runner.decode(first, second)
    pages = torch.arange(4)
    for level in range(1, len(pool.layout.levels)):
        pool.lower(pages[1:], level - 1, level)
    pool.lower(pages[2:], 0, 3)
print(sorted({name for name, _ in compiled() - before}))
"""


def test_serving_asks_for_nothing_else() -> None:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    at_start, later = done.stdout.splitlines()[-2:]
    assert at_start.count("'") == 2 * 12, at_start  # one kernel that reads pages to extend
    assert later == "[]"
