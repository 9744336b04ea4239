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
def _process() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", LOOP],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def run_apart(script: str, *arguments: object) -> str:
    """What a script prints, given `arguments` as those of a command line. Raises AssertionError
    with its traceback where it fails."""
    process = _process()
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps([script, *map(str, arguments)]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, f"the process that compiles ended with {process.wait()}"
    said, error = json.loads(answer)
    assert error is None, error[-2000:]
    return str(said)
