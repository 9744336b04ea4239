"""Loops whose carried values Triton loses are refused, and only those (loop_carries.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import triton
import triton.language as tl
from loop_carries import refuse_lost_carries
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(Out, n):
    stage = tl.program_id(0)
    before = stage
    for i in range(n):
        tl.store(Out + i, before)
        {body}

refuse_lost_carries()
source = ASTSource(fn=kernel, signature={{"Out": "*i32", "n": "i32"}}, constexprs={{}})
triton.compile(source, target=GPUTarget("cuda", 90, 32))
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("before, stage = stage, stage + 1", "Triton takes before"),
        ("before, stage = before + 1, stage + 1", ""),
    ],
    ids=["lost", "kept"],
)
def test_lost_carries_are_refused(body: str, message: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(body=body))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) == (not message), done.stderr[-2000:]
    assert message in done.stderr
