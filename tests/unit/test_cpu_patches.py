"""What lets SGLang run without a GPU, in processes of their own: patches cannot be undone."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spherical_patches import cpu
from spherical_patches.torchvision_cpu import PTH_LINE

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")

APPLY = """
import sglang.srt.model_executor.forward_batch_info as importer
from sglang.srt.plugins.hook_registry import HookRegistry
from spherical_patches import cpu
cpu.apply()
HookRegistry.apply_hooks()
"""


def run_python(code: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@NO_GPU
def test_helpers_and_rotary_embeddings(repo_root: Path) -> None:
    check = """
import torch
from sglang.srt.layers.rotary_embedding import base
from sglang.srt.mem_cache.allocation import get_last_loc
from sglang.srt.utils import support_triton
for name in ("spherical", "torch_native", "triton"):
    assert not support_triton(name) and not importer.support_triton(name)
table = torch.arange(12, dtype=torch.int32).view(3, 4) * 10
last = get_last_loc(table, torch.tensor([2, 0]), torch.tensor([3, 0]))
assert last.tolist() == [100, -1], last
assert base._is_cpu is True
"""
    run_python(APPLY + check, repo_root)


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        (cpu.SUPPORT_TRITON, ["backend"]),
        (cpu.GET_LAST_LOC, ["req_to_token", "req_pool_indices_tensor", "prefix_lens_tensor"]),
    ],
)
def test_targets_are_what_we_replace(target: str, parameters: list[str]) -> None:
    assert list(inspect.signature(pkgutil.resolve_name(target)).parameters) == parameters
    assert isinstance(pkgutil.resolve_name(cpu.ROTARY_MODULE)._is_cpu, bool)


@NO_GPU
def test_torchvision_imports_beside_a_cpu_build_of_torch(repo_root: Path) -> None:
    """As the `.pth` file does at the start of every interpreter, and only when it is imported."""
    check = """
import importlib.util, sys
assert importlib.util.find_spec("torchvision") and "torch" not in sys.modules
from torchvision.io import decode_jpeg
import torch; assert hasattr(torch.ops.torchvision, "nms")
"""
    run_python(PTH_LINE + check, repo_root)


def test_an_uninstalled_package_is_no_error_at_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PTH_LINE], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_real_package_named_kernels_is_not_hidden(repo_root: Path) -> None:
    """transformers imports it, and the root has a folder of that name."""
    run_python("import kernels; assert 'site-packages' in kernels.__file__", repo_root)
