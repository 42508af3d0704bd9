"""Owns what is CUDA's alone: which attention and which fused operations there are for it, and how steps are recorded as
CUDA graphs; refuses to decide whether they are used (`accelerate` does)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from local_engine.fused import Fusions
from local_engine.graphs import Replay
from local_engine.paged import Attend

try:
    from local_engine.fused_triton import TritonFusions
    from local_engine.paged_triton import TritonAttend
except ImportError:  # torch for CUDA brings triton; another torch, or another system, does not
    TritonAttend = TritonFusions = None  # type: ignore[assignment, misc]

__all__ = ["GraphRecorder", "TritonAttend", "TritonFusions", "attention", "fusions"]

WARM_UPS = 2
"""Runs before recording: libraries make their handles and workspaces, and Triton its kernels, in the first."""


def attention(device: torch.device) -> Attend | None:
    """Attention in place for this device, yet to be checked; None where there is none."""
    if device.type != "cuda" or TritonAttend is None:
        return None
    return TritonAttend(torch.cuda.get_device_properties(device).multi_processor_count)


def fusions(device: torch.device) -> Fusions | None:
    """Fused operations for this device, yet to be checked; None where there are none."""
    return None if device.type != "cuda" or TritonFusions is None else TritonFusions()


class GraphRecorder:
    """`graphs.Recorder` by CUDA graphs, which all share one pool of memory: they run one at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        """Raises RuntimeError where the step waits for the device or copies from plain memory."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others may ask the device for its free memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
