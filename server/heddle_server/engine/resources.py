"""What of the machine the engine takes: memory for the page pool, threads for an operation."""

from __future__ import annotations

import os

import torch

from heddle_server.config import EngineConfig

CUDA_FRACTION = 0.85  # of the memory free after loading: the rest is for activations and workspaces
CPU_FRACTION = 0.25  # a server is rarely alone on a machine's main memory
CPU_DEFAULT_MAX_BYTES = 1 << 30  # more than that is taken of main memory only when asked for
HOST_FRACTION = 0.25  # of the memory that is free, for adapters kept ready beside the device
HOST_DEFAULT_MAX_BYTES = 8 << 30
# Below this an operation is over before a second thread has woken up, and where another process wants the core, the
# threads wait for each other: with the 2.5 MiB demo base on two busy cores a step took 7 ms with one thread and
# 530 ms with two.
SMALL_BASE_BYTES = 64 << 20


def pool_bytes(config: EngineConfig, device: torch.device) -> int:
    """Bytes for keys, values and adapter rows together."""
    if config.pool_bytes is not None:
        return config.pool_bytes
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * (config.memory_fraction or CUDA_FRACTION))
    if config.memory_fraction is not None:
        return int(_free_host_bytes() * config.memory_fraction)
    return min(int(_free_host_bytes() * CPU_FRACTION), CPU_DEFAULT_MAX_BYTES)


def host_cache_bytes(config: EngineConfig) -> int:
    """Bytes of host memory for adapters that are ready to be copied to the device."""
    if config.host_cache_bytes is not None:
        return config.host_cache_bytes
    return min(int(_free_host_bytes() * HOST_FRACTION), HOST_DEFAULT_MAX_BYTES)


def default_threads(weights_bytes: int) -> int:
    """CPU threads per operation for a base of this size."""
    return 1 if weights_bytes < SMALL_BASE_BYTES else os.cpu_count() or 1


def _free_host_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
