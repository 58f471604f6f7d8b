"""Which part of a step a GPU's time went to, by the names of the kernels that ran."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from heddle_demo.bench.timed_ops import ATTENTION, BASE, ROWS

OTHER_MATMULS = "other matmuls"
ELEMENTWISE = "elementwise and the rest"
# The first that matches; all of Triton's kernels are ours.
PART_OF_KERNEL = (
    (re.compile(r"shrink|expand|scale_input"), ROWS),
    (re.compile(r"write_kv|_prefill_kernel|_decode_kernel|_decode_reduce|attention|fmha", re.IGNORECASE), ATTENTION),
    (re.compile(r"nf4|_reduce_kernel|_dequantize_kernel|gemm_4bit|kDequantize"), BASE),
    (re.compile(r"gemm|cutlass|nvjet|gemv|splitK", re.IGNORECASE), OTHER_MATMULS),
)


def gpu_seconds_by_part(run: Callable[[], object]) -> dict[str, float]:
    """Seconds that kernels took while `run` ran, by part; copies count as the rest."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        run()
        torch.cuda.synchronize()
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        if event.device_type.name == "CUDA":
            seconds[part_of(event.key)] += event.self_device_time_total / 1e6
    return dict(seconds)


def part_of(kernel: str) -> str:
    """By the kernel's name."""
    return next((part for pattern, part in PART_OF_KERNEL if pattern.search(kernel)), ELEMENTWISE)
