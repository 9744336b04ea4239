"""On which stream pages change.

With SGLang's overlap scheduler the host prepares a batch on one stream while the forward pass
before it still reads pages on another. So whatever changes pages, their tables or their blocks runs
on the forward passes' own stream, behind everything the host has asked for so far: the device then
sees the changes in the order in which the host made them, and the host waits for none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(numbers: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy of the numbers that the host does not wait for."""
    tensor = torch.from_numpy(np.array(numbers))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class DeviceOrder:
    """The stream of the forward passes on a device; None where they run on the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def after_forwards(self, *inputs: torch.Tensor) -> Iterator[None]:
        """Device work inside runs behind the forward passes launched so far.

        inputs  tensors of the current stream that the work reads
        """
        stream = self.stream
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        for tensor in inputs:
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def wait(self) -> None:
        """The host waits for all that has been launched so far."""
        if self.device.type == "cuda":
            (self.stream or torch.cuda.current_stream(self.device)).synchronize()
