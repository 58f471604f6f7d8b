"""How fast a device reads its memory, measured in the same run as what is compared with it."""

from __future__ import annotations

import time

import torch

from heddle_demo.bench.machine import memory_bandwidth
from heddle_demo.bench.rotation import cuda_event

COPY_BYTES = 1 << 30  # on a GPU: far beyond its caches
SUM_BYTES = 256 << 20
NUM_PROBES = 5


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second: of a copy on a GPU, read and written together; on the CPU of sums, by as many threads as torch
    has now."""
    return _copy_bandwidth(device) if device.type == "cuda" else max(memory_bandwidth(), _sum_bandwidth())


def _copy_bandwidth(device: torch.device) -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest_ms = float("inf")
    for _ in range(NUM_PROBES):
        start, end = cuda_event(), cuda_event()
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        fastest_ms = min(fastest_ms, start.elapsed_time(end))
    return 2 * COPY_BYTES / (fastest_ms / 1000)


def _sum_bandwidth() -> float:
    values = torch.ones(SUM_BYTES // 4)
    fastest = float("inf")
    for _ in range(NUM_PROBES):
        started = time.perf_counter()
        values.sum()
        fastest = min(fastest, time.perf_counter() - started)
    return SUM_BYTES / fastest
