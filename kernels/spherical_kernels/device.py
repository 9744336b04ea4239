"""What a device lets a kernel use."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def has_ptx(device: torch.device) -> bool:
    """Whether kernels may contain PTX: not in the interpreter, nor on GPUs of another maker."""
    return device.type == "cuda" and torch.version.cuda is not None


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it ends (Hopper and later)."""
    return has_ptx(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(dependent: bool) -> dict[str, Any]:
    """Arguments of a launch that may start early."""
    return {"launch_pdl": True} if dependent else {}
