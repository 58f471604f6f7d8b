"""One benchmark in a process of its own: `python -m heddle_demo.bench.part kernels '{"shape": …}' results.json`.

Needs no more packages than the benchmark itself; people use `heddle bench`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from heddle_demo.bench.failure import BenchFailed
from heddle_demo.bench.json_line import write_json


def run_part(bench: str, settings: dict[str, Any], json_path: Path) -> None:
    """Run the benchmark of this name with these fields of its plan; "quick" chooses the plan's small form.

    Tables go to standard output, the results to the file.
    """
    is_quick = settings.pop("quick", False)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    plan_of, run = _bench(bench)
    plan = plan_of(**settings)
    write_json(run(plan.quick() if is_quick else plan, _say), json_path)


def _say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def _bench(name: str) -> tuple[Any, Any]:
    """A benchmark's plan and how to run it."""
    if name == "kernels":
        from heddle_demo.bench.kernel_plan import KernelPlan
        from heddle_demo.bench.kernels_bench import run_kernels_bench

        return KernelPlan, run_kernels_bench
    if name == "step":
        from heddle_demo.bench.step_bench import run_step_bench
        from heddle_demo.bench.step_plan import StepPlan

        return StepPlan, run_step_bench
    from heddle_demo.bench.serving_bench import run_serving_bench
    from heddle_demo.bench.serving_plan import ServingPlan

    return ServingPlan, run_serving_bench


if __name__ == "__main__":
    try:
        run_part(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
    except BenchFailed as error:
        sys.exit(f"heddle: {error}")
