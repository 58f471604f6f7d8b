"""Times an operation on memory that no cache holds: on other weights in every call, as a decode step does.

On a GPU all calls of a rotation are recorded into a CUDA graph, so that only the device's time counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]

MOST_BYTES = 1 << 30  # of one rotation
CACHE_MULTIPLE = 2  # of a GPU's cache that a rotation fills at least
LEAST_CALLS = 16  # recorded into one graph, so that launching it does not count
NUM_REPLAYS = 5
LEAST_ROUNDS = 3


def num_copies(num_bytes: int, num_layers: int, device: torch.device) -> int:
    """How many operands of this size to go round: a model's layers, or more where a GPU's cache would hold them."""
    copies = num_layers
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        copies = max(copies, math.ceil(CACHE_MULTIPLE * cache_bytes / num_bytes))
    return max(1, min(copies, MOST_BYTES // num_bytes))


@torch.inference_mode()
def seconds_per_call(calls: Sequence[Call], device: torch.device, cpu_seconds: float) -> float:
    """`calls` do the same to different operands; the median time of one. On the CPU measured for `cpu_seconds`."""
    for call in calls:  # compiles, allocates, and lets bitsandbytes repack
        call()
    return _on_gpu(calls) if device.type == "cuda" else _on_cpu(calls, cpu_seconds)


def _on_cpu(calls: Sequence[Call], seconds: float) -> float:
    rounds, deadline = list[float](), time.perf_counter() + seconds
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() < deadline:
        started = time.perf_counter()
        for call in calls:
            call()
        rounds.append((time.perf_counter() - started) / len(calls))
    return median(rounds)


def _on_gpu(calls: Sequence[Call]) -> float:
    recorded = [*calls] * math.ceil(LEAST_CALLS / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in recorded:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return median(_replay_seconds(graph) for _ in range(NUM_REPLAYS)) / len(recorded)


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = cuda_event(), cuda_event()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def cuda_event() -> torch.cuda.Event:
    """One that knows its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
