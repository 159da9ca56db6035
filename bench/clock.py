"""Time, on the processor and on a GPU, and what else a GPU tells of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]


def _of_processor(step: Step, calls: int) -> float:
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _of_gpu(step: Step, calls: int) -> float:
    # Around all calls at once: the GPU works through one while the processor prepares the next.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / calls


def seconds(step: Step, calls: int = 1, device: str = "cpu") -> float:
    """Seconds per call, in a block of calls."""
    return (_of_gpu if device == "cuda" else _of_processor)(step, calls)


def launches(step: Step) -> int:
    """What one call starts on the GPU: kernels, copies and fills."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profile.events())


def replay(step: Step, calls: int = 50) -> float:
    """Seconds of one call replayed as a CUDA graph: the work without the starting of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return statistics.median(_of_gpu(graph.replay, calls) for _ in range(7))
