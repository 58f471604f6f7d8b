"""`heddle bench step`: where a decode step's time goes, by the engine's counters, stopwatches and, on a GPU, its
profiler."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from heddle_demo.bench.bandwidth import measure_bandwidth
from heddle_demo.bench.device import choose_device, device_name
from heddle_demo.bench.floor import BaseBytes
from heddle_demo.bench.gpu_parts import gpu_seconds_by_part
from heddle_demo.bench.heddle_arm import HeddleArm, HeddleSettings, start_heddle
from heddle_demo.bench.machine import describe_machine
from heddle_demo.bench.mixes import MIXES, num_distinct
from heddle_demo.bench.random_adapters import RandomAdapters
from heddle_demo.bench.shape_layout import layout_of
from heddle_demo.bench.shapes import SHAPES
from heddle_demo.bench.step_plan import STEP_MIXES, StepPlan
from heddle_demo.bench.step_report import print_steps
from heddle_demo.bench.step_results import StepCost, StepResults
from heddle_demo.bench.timed_ops import ROW_PLAN, Stopwatch, watched

SAMPLING = "sampling"


def run_step_bench(plan: StepPlan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures and prints a table; everything for scripts is returned.

    `say` is told what is going on. Raises BenchFailed."""
    with tempfile.TemporaryDirectory(prefix="heddle-bench-") as folder:
        results = measure_steps(plan, Path(folder), say)
    print_steps(results)
    return results.to_json()


def measure_steps(plan: StepPlan, folder: Path, say: Callable[[str], None]) -> StepResults:
    """One whole run, with `folder` for the base's config and heddle's store."""
    device, shape = choose_device(plan.device), SHAPES[plan.shape]
    adapters = RandomAdapters(layout_of(shape), ranks=(plan.rank,))
    base = folder / shape.name
    shape.write_config(base)
    base_bytes = BaseBytes.of(base, adapters.base)
    settings = HeddleSettings(
        base=base,
        store=folder / "store",
        device=plan.device,
        batch=plan.batch,
        num_tokens=plan.num_prompt_tokens + plan.num_new_tokens,
        num_adapters=plan.num_adapters,
        num_threads=plan.num_threads,
        load_format="dummy",
        kernels=plan.kernels,
    )
    say("starting heddle's engine")
    stopwatch = Stopwatch()
    with watched(stopwatch), closing(start_heddle(settings, adapters, base_bytes.kv_per_token)) as arm:
        return StepResults(
            plan=plan,
            machine=describe_machine(),
            device_type=device.type,
            device=device_name(device),
            num_threads=torch.get_num_threads(),
            kernels=arm.kernels,
            bandwidth_bytes_per_second=measure_bandwidth(device),
            base_bytes=base_bytes,
            row_bytes=adapters.row_bytes(0),
            costs=tuple(_costs(plan, arm, stopwatch, say)),
        )


def _costs(plan: StepPlan, arm: HeddleArm, stopwatch: Stopwatch, say: Callable[[str], None]) -> Iterator[StepCost]:
    for number, name in enumerate(STEP_MIXES):
        say(f"measuring {name}")
        mix = MIXES[name](plan.batch, plan.num_adapters)
        random = np.random.default_rng(number)
        vocabulary_size = SHAPES[plan.shape].vocabulary_size
        prompts = random.integers(3, vocabulary_size, size=(plan.batch, plan.num_prompt_tokens)).tolist()
        answers = arm.prefill(prompts, mix, plan.num_new_tokens)
        for _ in range(plan.num_warm_up_steps):
            arm.step()
        yield _measure(plan, arm, stopwatch, name, num_distinct(mix))
        arm.abort(answers)


def _measure(plan: StepPlan, arm: HeddleArm, stopwatch: Stopwatch, mix: str, num_adapters: int) -> StepCost:
    stopwatch.reset()
    before, sampled = arm.engine.stats(), arm.sample_seconds
    seconds = [_step_seconds(arm) for _ in range(plan.num_steps)]
    after = arm.engine.stats()
    watched_seconds = {**stopwatch.seconds, SAMPLING: arm.sample_seconds - sampled}
    row_plan_seconds = stopwatch.seconds[ROW_PLAN]
    if arm.engine.model.device == "cuda":  # calls return before their work is done, and a graph makes none
        watched_seconds = gpu_seconds_by_part(lambda: [arm.step() for _ in range(plan.num_steps)])
    return StepCost(
        mix=mix,
        num_distinct=num_adapters,
        num_steps=plan.num_steps,
        step_seconds=fmean(seconds),
        median_step_seconds=median(seconds),
        host_seconds=(after.host_seconds - before.host_seconds) / plan.num_steps,
        row_plan_seconds=row_plan_seconds / plan.num_steps,
        parts={part: total / plan.num_steps for part, total in watched_seconds.items()},
    )


def _step_seconds(arm: HeddleArm) -> float:
    started = time.perf_counter()
    arm.step()
    return time.perf_counter() - started
