"""The results of `heddle bench adapters` as people read them. Computes nothing."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from heddle_adapters.tier import TIERS
from heddle_demo.bench.random_adapters import RANKS
from heddle_demo.bench.results import Comparison, Results
from heddle_demo.bench.summary import Summary

MIN_COLUMNS = 120  # what the widest table takes; a narrower terminal folds its lines


def print_report(results: Results) -> None:
    """Tables on standard output, each under a line that says how it came about."""
    console = Console(highlight=False)
    console.width = max(console.width, MIN_COLUMNS)
    _print_setting(results, console)
    _print_table(results, console)
    _print_floor(results, console)
    few, many = results.plan.flat_sizes
    _print_comparison(
        results.flatness(),
        f"From {few:,} to {many:,} registered adapters, all resident, {results.plan.num_streams} different ones in "
        f"every step, equally many of each rank",
        console,
    )
    _print_comparison(results.base_only(), f"The base alone, with {many:,} adapters registered and with none", console)
    _print_small_pool(results, console)


def _print_setting(results: Results, console: Console) -> None:
    machine, plan = results.machine, results.plan
    console.print(
        f"\nFigures of this machine on {machine['date']}, and of no other: {machine['cpu']}, {machine['cores']} cores, "
        f"{_bytes(machine['memory_bytes'])} of memory, Python {machine['python']}, torch {machine['torch']}. The "
        "client runs on the same cores as the servers and takes its part of them, so the streams are few.\n"
        f"Load: the demo's base in NF4; LoRAs of ranks {', '.join(map(str, RANKS))} on all linears, equally many of "
        f"each; {plan.num_streams} streams in a closed loop; {plan.num_prompt_tokens} random prompt tokens, "
        f"{plan.num_output_tokens} output tokens. Windows of {plan.window_seconds:g} s in turn, after "
        f"{plan.settle_seconds:g} s of the same load; medians of windows."
    )
    if plan.form == "quick":
        console.print("[yellow]The quick form: it shows that everything works; its figures say little.[/]")


def _print_table(results: Results, console: Console) -> None:
    plan = results.plan
    console.print(
        f"\nEver more registered adapters in the same memory: a pool with room for {plan.table_pool_adapters} of them, "
        f"host memory for {plan.table_host_adapters}, the rest on disk (read: from disk; loaded: to the device)",
        style="bold",
    )
    table = Table("n", "popularity", box=SIMPLE_HEAD)
    _add_columns(table, "requests/s", "tokens/s", "TTFT ms\np50/p99", f"found on, %\n{'/'.join(TIERS)}")
    _add_columns(table, "loads", "read per\nrequest", "loaded per\nrequest", "segments\nper step")
    for summary in results.table():
        table.add_row(
            f"{summary.label.num_registered:,}",
            summary.label.arm,
            f"{summary.requests_per_second:.2f}",
            f"{summary.output_tokens_per_second:.0f}",
            f"{_milliseconds(summary.ttft_p50_seconds)}/{_milliseconds(summary.ttft_p99_seconds)}",
            "/".join(f"{100 * summary.share_by_tier.get(tier, 0.0):.0f}" for tier in TIERS),
            str(summary.num_loads),
            _bytes(summary.read_bytes_per_request),
            _bytes(summary.loaded_bytes_per_request),
            f"{summary.segments_per_step:.2f}",
        )
    console.print(table)


def _print_floor(results: Results, console: Console) -> None:
    floor = results.floor()
    first = results.table()[0].label
    console.print(
        f"The floor of n = {first.num_registered}, {first.arm}: a step must read {_bytes(floor.weight_bytes)} of "
        f"weights, {_bytes(floor.adapter_bytes)} of adapter rows and {_bytes(floor.kv_bytes)} of KV cache; at the "
        f"{floor.bandwidth_bytes_per_second / 1e9:.1f} GB/s that one thread reads here that takes "
        f"{_milliseconds(floor.floor_seconds)} ms. A step took {_milliseconds(floor.measured_step_seconds)} ms on "
        f"average, prefills included: {floor.measured_step_seconds / floor.floor_seconds:.1f}x the floor."
    )


def _print_comparison(comparison: Comparison, heading: str, console: Console) -> None:
    console.print(f"\n{heading}", style="bold")
    table = Table("registered", box=SIMPLE_HEAD)
    _add_columns(table, "requests/s", "tokens/s", "TTFT p50\nms", "segments\nper step", "loads", "windows")
    for summary in (comparison.baseline, comparison.candidate):
        table.add_row(*_comparison_cells(summary))
    console.print(table)
    verdict = "met" if comparison.ratio.value >= comparison.target else "[red]missed[/]"
    console.print(
        f"{comparison.ratio} of the throughput (95 % bootstrap interval over {comparison.ratio.num_pairs} pairs); at "
        f"least {comparison.target:.2f}x is wanted: {verdict}."
    )


def _comparison_cells(summary: Summary) -> tuple[str, ...]:
    return (
        f"{summary.label.num_registered:,}",
        f"{summary.requests_per_second:.2f}",
        f"{summary.output_tokens_per_second:.0f}",
        _milliseconds(summary.ttft_p50_seconds),
        f"{summary.segments_per_step:.2f}",
        str(summary.num_loads),
        str(summary.num_windows),
    )


def _print_small_pool(results: Results, console: Console) -> None:
    plan = results.plan
    console.print(
        f"\n{plan.num_adapters:,} registered adapters, a pool with room for {plan.small_pool_adapters}", style="bold"
    )
    table = Table("adapters", box=SIMPLE_HEAD)
    _add_columns(table, "requests/s", "on device\n%", "loaded per\nrequest", "wait for it\nms")
    _add_columns(table, "request\nms", "predicted\nby waits ms", "predicted\nby bytes ms")
    for row in results.small_pool():
        summary = row.summary
        table.add_row(
            summary.label.arm,
            f"{summary.requests_per_second:.2f}",
            f"{100 * summary.share_by_tier.get('device', 0.0):.1f}",
            _bytes(summary.loaded_bytes_per_request),
            _milliseconds(summary.load_seconds_per_request),
            _milliseconds(row.measured_seconds),
            _milliseconds(row.predicted_by_wait_seconds),
            "-" if row.predicted_by_bytes_seconds is None else _milliseconds(row.predicted_by_bytes_seconds),
        )
    console.print(table)
    console.print(
        f"A request's time is one of {plan.num_streams} streams', whose waits overlap. By waits: what a request takes "
        "with all resident, plus its own wait for its adapter. By bytes: the same, plus the bytes loaded for it at "
        f"the price that they had with {plan.small_pool_uses[1]} adapters in use."
    )


def _add_columns(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="right")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f}" if seconds < 0.01 else f"{seconds * 1000:.1f}"


def _bytes(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
