"""Installing the ledger's hooks through SGLang's `HookRegistry`, and proving that they sit.

SGLang's plugin loader fails open: an exception while a plugin registers, or while a hook is
applied, is only logged. `unapplied()` looks at the patched functions themselves, so that whoever is
about to rely on the hooks can refuse instead.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

from sglang_spherical.errors import StartupError
from spherical_patches.ledger import PATCHES, Patch

Hook = Callable[..., Any]

_installed: dict[Patch, Hook] = {}  # what this process handed to HookRegistry


def late(reference: str) -> Hook:
    """The function named 'module:function', imported at its first call.

    So registering costs nothing, and a module that fails to import raises in the call that needed
    it, where the exception is not swallowed.
    """
    resolve = cache(lambda: pkgutil.resolve_name(reference))

    def hook(*args: Any, **kwargs: Any) -> Any:
        return resolve()(*args, **kwargs)

    hook.__qualname__ = reference
    return hook


def install() -> None:
    """Register every patch of the ledger; the loader applies them right after."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for patch in PATCHES:
        hook = late(patch.hook)
        HookRegistry.register(patch.target, hook, HookType[patch.hook_type])
        _installed[patch] = hook


def unapplied() -> list[str]:
    """Targets of the ledger that, in this process, do not run our hook."""
    return [patch.target for patch in PATCHES if not _applied(patch)]


def _applied(patch: Patch) -> bool:
    hook = _installed.get(patch)
    if hook is None:
        return False
    try:
        function = pkgutil.resolve_name(patch.target)
    except (ImportError, AttributeError):
        return False
    # HookRegistry's wrappers hold the hook in a closure and what they wrap in __wrapped__.
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def require_applied() -> None:
    """Raise StartupError, naming the targets, unless every hook of the ledger is in place."""
    missing = unapplied()
    if missing:
        raise StartupError(
            f"--kv-format spherical: SGLang did not take the hook on {', '.join(missing)}: install "
            "the SGLang release this package names (README), remove other plugins that patch it, "
            "and look for 'Failed to apply hooks' in the log"
        )
