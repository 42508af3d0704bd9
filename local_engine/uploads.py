"""Owns how small numbers reach the device: from pinned memory and without waiting for it; refuses to read back.

A plain copy to a CUDA device waits until the device has done all that it was given before. Step inputs must not, or a
step would wait several times instead of once, for its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def uploaded(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or rows of numbers, as a tensor on the device. The host goes on before they are there."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # The allocator of pinned memory hands it out again only after the copy.
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def uploaded_array(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """An array on the device, as `uploaded` does it; on a CPU the same memory."""
    plain = torch.from_numpy(values)
    return (plain.pin_memory() if device.type == "cuda" else plain).to(device, non_blocking=True)


class StaticInts:
    """Whole numbers at an address on the device that stays, for what was recorded to read them there: [size] int64.

    Invariant: `write` does not overwrite what an earlier `write` has not yet brought to the device.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.tensor = torch.zeros(size, dtype=torch.long, device=device)
        self._host = torch.zeros(size, dtype=torch.long, pin_memory=pinned)
        self._array: np.ndarray[Any, np.dtype[np.int64]] = self._host.numpy()
        self._copied: Any = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def write(self, parts: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Put each part at its place, and bring all from the beginning to the end of the last one to the device."""
        if self._copied is not None:
            self._copied.synchronize()
        end = 0
        for begin, values in parts:
            end = begin + len(values)
            self._array[begin:end] = values
        self.tensor[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
