"""A worker's StartupError becomes one line for the user, and nothing is left running.

SGLang's own way with an exception in `Scheduler.__init__` is a traceback, SIGQUIT to the launching
process and SIGKILL to everything: no message for `sglang.Engine`, pages of text on a terminal.
Here the worker that fails first writes its message to a file that the launching process named,
prints it, and exits; the launching process sees it die, reads the file, stops the other children
and raises.

`run_scheduler_process`, the seam that suggests itself, cannot be hooked: workers are spawned by its
pickled name, before any plugin runs in them.

What a start leaves behind is then kept out of Python's garbage collections.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sglang_spherical.errors import EXIT_CODE, StartupError, one_line, print_error
from spherical_patches.hooks import require_applied
from spherical_patches.server_args import FROM_COMMAND_LINE, spherical_config

REPORT = "_spherical_report"  # attribute of ServerArgs: path of the file, pickled to the workers
GRACE_SECONDS = 1.0  # for the other ranks to reach the same error before a peer is missing


def launch(
    original: Callable[..., Any], cls: Any, server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around `Engine._launch_subprocesses`, in the launching process.

    Raises StartupError with the worker's message; SystemExit if the server came from a command
    line, where the worker has printed it already.
    """
    if spherical_config(server_args) is None:
        return original(cls, server_args, *args, **kwargs)
    folder = Path(tempfile.mkdtemp(prefix="spherical-start-"))
    report = folder / "error"
    setattr(server_args, REPORT, str(report))
    before = set(multiprocessing.active_children())
    try:
        launched = original(cls, server_args, *args, **kwargs)
    except Exception as error:
        if not report.exists():
            raise
        message = report.read_text()
        _stop_children(before)
        if getattr(server_args, FROM_COMMAND_LINE, False):
            raise SystemExit(EXIT_CODE) from error
        raise StartupError(message) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if getattr(server_args, FROM_COMMAND_LINE, False):  # else the process is somebody's own
        from sglang.srt.utils import freeze_gc

        freeze_garbage(lambda: freeze_gc("Tokenizer Manager"))
    return launched


def _stop_children(before: set[Any]) -> None:
    from sglang.srt.utils import kill_process_tree

    for process in multiprocessing.active_children():
        if process not in before:
            kill_process_tree(process.pid)
            process.join(timeout=10)


def build_scheduler(
    original: Callable[..., None], self: Any, server_args: Any, *args: Any, **kwargs: Any
) -> None:
    """Around `Scheduler.__init__`, in every worker: builds, then proves that the cache is live."""
    if spherical_config(server_args) is None:
        return original(self, server_args, *args, **kwargs)
    from sglang_spherical import engagement

    try:
        require_applied()  # before any weight is loaded
        original(self, server_args, *args, **kwargs)
        engagement.verify(self)
    except StartupError as error:
        leave(server_args, error)
    from sglang.srt.managers.io_struct import FreezeGCReq

    freeze_garbage(lambda: self.handle_freeze_gc(FreezeGCReq()))  # tells the detokenizer, too


def freeze_garbage(freeze: Callable[[], object]) -> None:
    """Keeps all objects that live now out of later collections: those of imports, kernels and
    graphs, through which a full collection walked for 0.4 to 0.9 s, between two tokens.

    It is what SGLang does on POST /freeze_gc, without waiting for somebody to ask. Graphs that are
    captured anew while it serves undo it, as they do there.
    """
    gc.collect()  # what is garbage by now would stay for good
    freeze()


def leave(server_args: Any, error: StartupError) -> NoReturn:
    """End a worker: report `error`, print it unless a sibling has, exit with `EXIT_CODE`."""
    if _first_to_report(server_args, error):
        print_error(error)
    sys.stdout.flush()
    if server_args.tp_size > 1:
        time.sleep(GRACE_SECONDS)
    if server_args.dp_size > 1:
        # between us and the launching process stands the data parallel controller, which waits for
        # its workers without looking whether they live
        os.kill(os.getppid(), signal.SIGQUIT)
    # not sys.exit: threads that SGLang started may not end
    os._exit(EXIT_CODE)


def _first_to_report(server_args: Any, error: StartupError) -> bool:
    path = getattr(server_args, REPORT, None)
    if path is None:
        return True
    try:
        with open(path, "x") as file:
            file.write(one_line(error))
    except FileExistsError:
        return False
    except OSError:  # the launching process is gone, or on another machine
        return True
    return True
