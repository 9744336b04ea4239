"""Scripts that compile kernels for a GPU that is not here, in a process beside the tests': in
theirs Triton may be interpreting.

The process is kept, because importing PyTorch and Triton takes as long as most compilations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from tempfile import TemporaryFile
from typing import IO

LOOP = """
import json, os, sys, traceback
from contextlib import redirect_stdout
from io import StringIO

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a compiler prints itself is not an answer
for line in sys.stdin:
    script, *arguments = json.loads(line)
    sys.argv, said, error = ["script", *arguments], StringIO(), None
    try:
        with redirect_stdout(said):
            exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([said.getvalue(), error]), file=answers, flush=True)
"""


@cache
def _process() -> tuple[subprocess.Popen[str], IO[str]]:
    """The process, and the file of what it says beside its answers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    beside = TemporaryFile("w+")  # noqa: SIM115, as long as the process
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=beside,
        text=True,
    )
    return process, beside


def run_apart(script: str, *arguments: object) -> str:
    """What a script prints, given `arguments` as those of a command line. Raises AssertionError
    with its traceback where it fails."""
    process, beside = _process()
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps([script, *map(str, arguments)]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            beside.seek(0)
            raise AssertionError(f"ended with {process.wait()}: {beside.read()[-2000:]}")
    except BaseException:  # also a timeout: no later script may read this one's answer
        process.kill()
        _process.cache_clear()
        raise
    said, error = json.loads(answer)
    assert error is None, error[-2000:]
    return str(said)
