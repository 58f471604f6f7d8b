"""The results of `heddle bench kernels` as people read them. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from heddle_demo.bench.kernel_results import KernelResults, Timing
from heddle_demo.bench.text_table import text_table

HEADINGS = {
    "linears": "The linears of a layer: microseconds, GB/s of the bytes that the arm moves, share of the 4-bit floor",
    "rows": "The adapters' rows, shrink and expand together: microseconds, GB/s, share of the floor",
}


def print_kernels(results: KernelResults) -> None:
    """A table per part, a row per case, three figures per arm."""
    machine, plan = results.machine, results.plan
    print(
        f"\n{plan.shape} on {results.device} ({machine['cpu']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"bitsandbytes {machine['bitsandbytes']}, revision {machine['revision']}), {results.kernels} kernels, "
        f"{results.bandwidth_bytes_per_second / 1e9:.1f} GB/s measured in this run."
    )
    for part, heading in HEADINGS.items():
        if timings := [timing for timing in results.timings if timing.part == part]:
            print(f"\n{heading}\n\n{_table(timings, results.bandwidth_bytes_per_second)}")
    for line in results.skipped:
        print(f"\nSkipped: {line}")


def _table(timings: Sequence[Timing], bandwidth: float) -> str:
    arms = list(dict.fromkeys(timing.arm for timing in timings))
    cases: dict[tuple[str, ...], dict[str, Timing]] = {}
    for timing in timings:
        cases.setdefault((timing.layer, *map(str, timing.size.values())), {})[timing.arm] = timing
    names = ["layer", *timings[0].size]
    rows = [[*case, *(_cell(by_arm.get(arm), bandwidth) for arm in arms)] for case, by_arm in cases.items()]
    return text_table([*names, *arms], rows, num_left=len(names))


def _cell(timing: Timing | None, bandwidth: float) -> str:
    if timing is None:
        return ""
    rate = timing.num_bytes / timing.seconds / 1e9
    return f"{1e6 * timing.seconds:.1f} {rate:6.1f} {timing.floor_share(bandwidth):5.0%}"
