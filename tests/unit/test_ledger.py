"""The ledger against the installed SGLang: names, signatures, hooks."""

from __future__ import annotations

import inspect
import pkgutil
from importlib.metadata import entry_points, version

import pytest
from seam_tools import load_plugin

from sglang_spherical.errors import StartupError
from spherical_patches import hooks
from spherical_patches.ledger import CPU_PATCHES, PATCHES, SGLANG_VERSIONS, Patch, signature_of

ALL = PATCHES + CPU_PATCHES


def test_the_installed_sglang_is_one_the_ledger_names():
    assert version("sglang") in SGLANG_VERSIONS


def test_the_entry_point_is_installed():
    (point,) = entry_points(group="sglang.srt.plugins", name="spherical")
    assert point.value == "spherical_patches.plugin:register"


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.target)
def test_signature_has_not_drifted(patch: Patch):
    """Hooks are called with the target's arguments: read the change before adapting the ledger."""
    assert signature_of(patch.target) == patch.signature


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.target)
def test_hook_exists_and_says_why(patch: Patch):
    hook = pkgutil.resolve_name(patch.hook)
    assert inspect.isfunction(hook)
    assert hook.__doc__
    assert patch.reason
    assert patch.removable_when


def test_every_hook_is_applied_after_sglang_s_loader_ran():
    load_plugin()
    assert hooks.unapplied() == []
    hooks.require_applied()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_a_hook_that_was_overwritten_is_noticed(patch: Patch, monkeypatch):
    """As another plugin might: the target is back to SGLang's own function."""
    load_plugin()
    path, name = patch.target.rsplit(".", 1)
    owner = pkgutil.resolve_name(path)
    original = inspect.unwrap(getattr(owner, name))
    if isinstance(inspect.getattr_static(owner, name), staticmethod):
        original = staticmethod(original)
    monkeypatch.setattr(owner, name, original)
    assert hooks.unapplied() == [patch.target]
    with pytest.raises(StartupError, match=name):
        hooks.require_applied()


def test_registries_know_our_backends():
    load_plugin()
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import get_radix_cache_factory
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    from spherical_patches.kv_pool import build_backend, build_tree

    assert ATTENTION_BACKENDS["spherical"] is build_backend
    assert get_radix_cache_factory("spherical") is build_tree
    assert ATTENTION_BACKEND_CHOICES.count("spherical") == 1
