"""`heddle bench`: measurements that anyone can repeat. What measures is imported when a command runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from heddle_server.config import ConfigError, DeviceName, KernelsName

app = typer.Typer(name="bench", help="Measure, on this machine.", no_args_is_help=True)

Json = Annotated[Path, typer.Option("--json", help="File for everything that was measured.")]
JsonIfWanted = Annotated[Path | None, typer.Option("--json", help="File for what the last line says.")]
Shape = Annotated[
    str, typer.Option(help="Whose sizes the random weights have: llama-3.1-8b, qwen2.5-7b, …-0.5b, tiny.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Batch = Annotated[int, typer.Option(help="Requests at a time.")]
Adapters = Annotated[int, typer.Option(help="Adapters, on all linears.")]
Rank = Annotated[int, typer.Option(help="Of every adapter.")]
Kernels = Annotated[str, typer.Option(help="auto, reference, compiled or triton: heddle's own operations.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small form: does it work at all?")]


@app.callback()
def before_any_command() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it regrets the absence of a hub client


@app.command("adapters")
def adapters_command(
    json: Json = Path("results/bench_adapters.json"),
    quick: Annotated[bool, typer.Option("--quick", help="A small form of a minute: does it work at all?")] = False,
) -> None:
    """What the number of registered adapters costs.

    Throughput, first tokens, hits and loads, up to 2,000 adapters.

    Takes about a quarter of an hour, 10 GiB of disk for temporary files (TMPDIR says where) and 8 GiB of memory.
    """
    from heddle_demo.bench.adapters_bench import run_adapters_bench

    with _failure_as_one_line():
        run_adapters_bench(json, quick=quick)


@app.command("eviction")
def eviction_command(
    json: Json = Path("results/bench_eviction.json"),
    served: Annotated[
        bool, typer.Option("--served", help="Confirm it on servers over the embedded base: 4 minutes, 1 GiB of disk.")
    ] = False,
) -> None:
    """Compare the eviction policies by simulation: bytes loaded again per request."""
    from heddle_demo.bench.eviction_bench import run_eviction_bench
    from heddle_demo.bench.served_eviction import confirm_on_servers
    from heddle_demo.bench.server import end_in_order

    end_in_order()
    with _failure_as_one_line():
        run_eviction_bench(json, confirm=confirm_on_servers if served else None)


@app.command("serving")
def serving_command(
    shape: Shape = "qwen2.5-0.5b",
    device: Device = "auto",
    batch: Batch = 8,
    adapters: Adapters = 8,
    rank: Rank = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Of each request.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="Each mix by each arm in turn, that many times.")] = 5,
    mixes: Annotated[str, typer.Option(help="Of base, identical, uniform, skewed, distinct.")] = (
        "base,identical,distinct"
    ),
    against: Annotated[str | None, typer.Option(help="peft: its mixed batches take turns with heddle.")] = None,
    kernels: Kernels = "auto",
    threads: Annotated[int | None, typer.Option(help="Of an operation on the CPU, for all arms.")] = None,
    json: JsonIfWanted = None,
    quick: Quick = False,
) -> None:
    """Whole answers by the engine, by which adapters a batch uses, in turn with PEFT if wanted.

    With --against peft the weights are written to a temporary folder first (TMPDIR says where; 1 GB of a 0.5B shape).
    """
    from heddle_demo.bench.failure import BenchFailed
    from heddle_demo.bench.json_line import print_json_line
    from heddle_demo.bench.server import end_in_order
    from heddle_demo.bench.serving_bench import run_serving_bench
    from heddle_demo.bench.serving_plan import ServingPlan

    end_in_order()
    with _failure_as_one_line():
        if against not in (None, "peft"):
            raise BenchFailed(f"--against knows peft, and not {against}.")
        plan = ServingPlan(
            shape=shape,
            device=_one_of("--device", device, DeviceName),
            batch=batch,
            num_adapters=adapters,
            rank=rank,
            num_prompt_tokens=prompt_tokens,
            num_new_tokens=new_tokens,
            num_rounds=rounds,
            mixes=tuple(mixes.split(",")),
            has_peft=against == "peft",
            kernels=_one_of("--kernels", kernels, KernelsName),
            num_threads=threads,
        )
        print_json_line(run_serving_bench(plan.quick() if quick else plan, _say), json)


@app.command("load")
def load_command(
    table: Annotated[str, typer.Argument(help="punica, slora, cold or sweep.")],
    base: Annotated[str, typer.Option(help="demo, or whose sizes random weights have: qwen2.5-0.5b, …")] = "demo",
    out: Annotated[Path, typer.Option(help="Folder for the result folders.")] = Path("results/load"),
    quick: Quick = False,
) -> None:
    """Load on whole servers by heddle-loadtest: the published tables, with what people have instead.

    punica: four popularities on heddle, PEFT and transformers. slora: up to 2,000 adapters. cold: every request cold.
    sweep: a quarter of the capacity to four times as much. Each result folder has its raw requests.
    """
    from heddle_demo.bench.load.load_bench import run_load_bench
    from heddle_demo.bench.server import end_in_order

    end_in_order()
    with _failure_as_one_line():
        run_load_bench(table, base, out, _say, quick=quick)


@app.command("page")
def page_command(
    page: Annotated[Path, typer.Argument(help="Markdown page with marks of tables.")] = Path("docs/performance.md"),
    results: Annotated[
        Path | None, typer.Option(help="Result folders whose summaries are taken into docs first.")
    ] = None,
) -> None:
    """Write the tables of docs/performance.md again, from the result folders they name."""
    from heddle_demo.bench.load.page import keep_results, rewrite_page

    with _failure_as_one_line():
        if results is not None:
            number = keep_results(results, page.parent / "measurements" / "load")
            typer.echo(f"took {number} summaries from {results}")
        page.write_text(rewrite_page(page))


@app.command("methods")
def methods_command(
    page: Annotated[Path, typer.Option(help="Markdown page with the mark of the table.")] = Path("docs/methods.md"),
    json: Json = Path("docs/measurements/methods.json"),
) -> None:
    """Every adapter method against PEFT, alone and in one batch of all: the table of docs/methods.md.

    Needs the dev extra (PEFT), and some minutes.
    """
    from heddle_demo.parity.run import run_methods_bench

    with _failure_as_one_line():
        run_methods_bench(page, json, _say)


@app.command("kernels")
def kernels_command(
    shape: Shape = "qwen2.5-0.5b",
    device: Device = "auto",
    batch: Annotated[int, typer.Option(help="Of the adapters' rows, at most: 1, 2, 4, … up to this.")] = 64,
    rank: Annotated[str, typer.Option(help="Of the adapters: 8, 16, 64, mixed, or several with commas.")] = (
        "8,16,64,mixed"
    ),
    kernels: Kernels = "auto",
    threads: Annotated[int, typer.Option(help="Of an operation on the CPU.")] = 1,
    json: JsonIfWanted = None,
    quick: Quick = False,
) -> None:
    """A layer's linears and adapter rows, operation by operation, beside other ways and the memory's floor."""
    from heddle_demo.bench.json_line import print_json_line
    from heddle_demo.bench.kernel_plan import KernelPlan
    from heddle_demo.bench.kernels_bench import run_kernels_bench

    with _failure_as_one_line():
        plan = KernelPlan(
            shape=shape,
            device=_one_of("--device", device, DeviceName),
            kernels=_one_of("--kernels", kernels, KernelsName),
            num_threads=threads,
            ranks=tuple(rank.split(",")),
        )
        print_json_line(run_kernels_bench((plan.quick() if quick else plan).up_to(batch), _say), json)


@app.command("step")
def step_command(
    shape: Shape = "qwen2.5-0.5b",
    device: Device = "auto",
    batch: Batch = 8,
    adapters: Adapters = 8,
    rank: Rank = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Of each request.")] = 32,
    steps: Annotated[int, typer.Option(help="Measured, of each mix.")] = 64,
    kernels: Kernels = "auto",
    threads: Annotated[int | None, typer.Option(help="Of an operation on the CPU.")] = None,
    json: JsonIfWanted = None,
    quick: Quick = False,
) -> None:
    """Where a decode step's time goes: attention, base, adapter rows, host."""
    from heddle_demo.bench.json_line import print_json_line
    from heddle_demo.bench.server import end_in_order
    from heddle_demo.bench.step_bench import run_step_bench
    from heddle_demo.bench.step_plan import StepPlan

    end_in_order()
    with _failure_as_one_line():
        plan = StepPlan(
            shape=shape,
            device=_one_of("--device", device, DeviceName),
            batch=batch,
            num_adapters=adapters,
            rank=rank,
            num_prompt_tokens=prompt_tokens,
            num_steps=steps,
            kernels=_one_of("--kernels", kernels, KernelsName),
            num_threads=threads,
        )
        print_json_line(run_step_bench(plan.quick() if quick else plan, _say), json)


@contextmanager
def _failure_as_one_line() -> Iterator[None]:
    """What ends a measurement is told without a traceback."""
    from heddle_demo.bench.failure import BenchFailed
    from heddle_demo.bench.machine import TooLittleRoom
    from heddle_kernels.dispatch import BackendUnavailable

    try:
        yield
    except (BackendUnavailable, BenchFailed, TooLittleRoom, ConfigError) as error:
        typer.secho(f"heddle: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


def _one_of(option: str, value: str, names: Any) -> Any:
    """The value itself if it is one of the Literal `names`."""
    if value not in get_args(names):
        raise ConfigError(f"{option} knows {', '.join(get_args(names))}, and not {value}.")
    return value


def _say(what: str) -> None:
    typer.secho(f"{what} ...", dim=True, err=True)
