"""`heddle bench kernels`: the linears and the adapters' rows of a model's layer, operation by operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from heddle_demo.bench.bandwidth import measure_bandwidth
from heddle_demo.bench.device import choose_device, device_name
from heddle_demo.bench.kernel_plan import KernelPlan
from heddle_demo.bench.kernel_report import print_kernels
from heddle_demo.bench.kernel_results import KernelResults, Timing
from heddle_demo.bench.layers import JOINED, SINGLE, widths
from heddle_demo.bench.machine import describe_machine
from heddle_demo.bench.row_kernels import DTYPE, time_rows
from heddle_demo.bench.shapes import SHAPES
from heddle_kernels.dispatch import select_kernels

Say = Callable[[str], None]


def run_kernels_bench(plan: KernelPlan, say: Say) -> dict[str, Any]:
    """Measures and prints tables; everything for scripts is returned.

    `say` is told what is going on. Raises BenchFailed."""
    results = measure_kernels(plan, say)
    print_kernels(results)
    return results.to_json()


def measure_kernels(plan: KernelPlan, say: Say) -> KernelResults:
    """One whole run; what is not begun within `plan.max_seconds` is named instead of measured."""
    device = choose_device(plan.device)
    torch.set_num_threads(plan.num_threads)
    deadline = float("inf") if plan.max_seconds is None else time.monotonic() + plan.max_seconds
    timings, skipped = list[Timing](), list[str]()
    if find_spec("bitsandbytes") is None:
        skipped.append("the linears: bitsandbytes is not installed")
    bandwidth = measure_bandwidth(device)
    for name, measured in _measurements(plan, device):
        if time.monotonic() > deadline:
            skipped.append(f"{name}: out of time")
            continue
        say(f"measuring {name}")
        timings += measured
    return KernelResults(
        plan=plan,
        machine=describe_machine(),
        device=device_name(device),
        kernels=select_kernels(device, DTYPE, plan.kernels).name,
        # Whoever else uses the memory makes it slower, never faster.
        bandwidth_bytes_per_second=max(bandwidth, measure_bandwidth(device)),
        timings=tuple(timings),
        skipped=tuple(skipped),
    )


def _measurements(plan: KernelPlan, device: torch.device) -> Iterator[tuple[str, Iterator[Timing]]]:
    """What is to be measured, by name: the layer's linears, then the rows by rank."""
    if find_spec("bitsandbytes") is not None:
        yield from _linears(plan, device)
    shape = SHAPES[plan.shape]
    for rank in plan.ranks:
        for layer, linears in JOINED.items():
            yield (
                f"rows of rank {rank} at {layer}",
                time_rows(layer, *widths(shape, linears), rank, plan, shape.num_layers, device),
            )


def _linears(plan: KernelPlan, device: torch.device) -> Iterator[tuple[str, Iterator[Timing]]]:
    from heddle_demo.bench.linear_kernels import linear_arms, time_linears

    shape = SHAPES[plan.shape]
    arms = linear_arms(device, select_kernels(device, DTYPE, plan.kernels).ops)
    for layer, linears in {**JOINED, **(SINGLE if plan.has_single_linears else {})}.items():
        in_features, out_features = widths(shape, linears)
        yield (
            f"the linear {layer}",
            time_linears(layer, in_features, sum(out_features), plan, shape.num_layers, arms, device),
        )
