"""The results of `heddle bench step` as people read them. Computes nothing."""

from __future__ import annotations

from heddle_demo.bench.step_results import HOST_TARGET_SECONDS, StepCost, StepResults
from heddle_demo.bench.text_table import text_table


def print_steps(results: StepResults) -> None:
    """A column per mix, a row per part of a step."""
    plan, machine = results.plan, results.machine
    threads = f"{results.num_threads} thread{'s' if results.num_threads > 1 else ''}"
    print(
        f"\n{plan.shape}, random weights in NF4, on {results.device} ({machine['cpu']}, {threads}, "
        f"torch {machine['torch']}, revision {machine['revision']}), {results.kernels} kernels: a decode step of "
        f"{plan.batch} requests, adapters of rank {plan.rank} on all linears; means of {plan.num_steps} steps, ms.\n"
    )
    columns = [dict(_lines(results, cost)) for cost in results.costs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    headings = ["", *(f"{cost.mix} ({cost.num_distinct})" for cost in results.costs)]
    print(text_table(headings, [[name, *(column.get(name, "") for column in columns)] for name in names]))
    print(
        f"\nIn brackets: adapters in a step. Floor: the bytes that must move at the "
        f"{results.bandwidth_bytes_per_second / 1e9:.1f} GB/s measured in this run. Host: outside forward and "
        f"sampling; less than {_ms(HOST_TARGET_SECONDS)} ms is wanted of a step of 64."
    )


def _lines(results: StepResults, cost: StepCost) -> list[tuple[str, str]]:
    floor = results.floor(cost)
    return [
        ("step", _ms(cost.step_seconds)),
        ("  its median", _ms(cost.median_step_seconds)),
        *((f"  {name}", _ms(seconds)) for name, seconds in cost.parts.items()),
        ("  the GPU waits" if results.device_type == "cuda" else "  other operations", _ms(results.rest_seconds(cost))),
        ("  host", _ms(cost.host_seconds)),
        ("host with row plan", _ms(cost.host_and_plan_seconds)),
        ("floor", _ms(floor.floor_seconds)),
        ("floor / step", f"{floor.floor_seconds / cost.step_seconds:.1%}"),
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"
