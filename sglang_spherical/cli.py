"""`python -m sglang_spherical`: the tools beside the server.

The server itself is SGLang's: `python -m sglang.launch_server --kv-format spherical`. Each tool is
a module with `add_arguments(parser)` and `run(args) -> exit code`, imported only when it is named,
since some need packages that a serving machine does not have.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from sglang_spherical.errors import EXIT_CODE, print_error

RAW = argparse.RawDescriptionHelpFormatter
TOOLS = {
    "demo": "start a server, hold a three-turn chat, show what the spherical cache did",
    "serve": "serve a model in the foreground, with what this machine needs filled in",
    "evaluate": "perplexity and divergence of a model through the codec, by tier",
    "calibrate": "make the frame file of a model",
    "top": "a live view of a server's cache, by tier",
    "models": "get a model to serve and test with",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one tool. A ValueError is the user's to correct: one line, exit code 2."""
    tools = "\n".join(f"  {name:<10} {what}" for name, what in TOOLS.items())
    prog = "python -m sglang_spherical"
    parser = argparse.ArgumentParser(prog=prog, epilog=f"tools:\n{tools}", formatter_class=RAW)
    parser.add_argument("tool", choices=TOOLS, metavar="tool", help="one of the tools below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `<tool> --help`")
    chosen = parser.parse_args(argv)
    return _run(chosen.tool, chosen.arguments)


def _run(tool: str, arguments: Sequence[str]) -> int:
    module = importlib.import_module(f"sglang_spherical.{tool}")
    prog = f"python -m sglang_spherical {tool}"
    parser = argparse.ArgumentParser(prog=prog, description=module.__doc__, formatter_class=RAW)
    module.add_arguments(parser)
    try:
        return int(module.run(parser.parse_args(arguments)))
    except ValueError as error:
        print_error(error)
        return EXIT_CODE
    except KeyboardInterrupt:
        return 130
