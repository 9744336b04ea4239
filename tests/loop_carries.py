"""A fault of Triton's front end that compiles into something else than the source says.

Triton visits the body of a loop once to see which names it changes: those that it leaves with
another value than they had before the loop. A name that the body sets to the very value that it had
passes for unchanged, though from the second turn on it would be another:

    before = stage
    for i in range(n):
        use(before)  # in every turn the first stage
        before = stage
        stage = stage + 1

So it is in Triton 3.6 and 3.7 (CodeGenerator._find_carries); interpreting does not show it.
"""

from __future__ import annotations

from typing import Any

from triton.compiler.code_generator import CodeGenerator, flatten_values_to_ir


def refuse_lost_carries() -> None:
    """Compiling such a loop fails from now on in this process; what Triton's cache holds is not
    compiled again."""
    verify = CodeGenerator._verify_loop_carried_variable
    if verify.__name__ == "verify_and_refuse":
        return

    def verify_and_refuse(self: Any, name: str, loop_value: Any, live_value: Any) -> None:
        verify(self, name, loop_value, live_value)
        after, before = (list(flatten_values_to_ir([x])) for x in (loop_value, live_value))
        if name in self.local_defs and after == before:
            raise AssertionError(f"Triton takes {name}, which a loop sets, for unchanged")

    CodeGenerator._verify_loop_carried_variable = verify_and_refuse
