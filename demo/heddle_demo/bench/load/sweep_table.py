"""Offered load from a quarter of the capacity to four times as much, and how many requests keep a service level."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from heddle_demo.bench.child import running_child
from heddle_demo.bench.load.bases import make_base
from heddle_demo.bench.load.rounds import NUM_ROUNDS, Cell, Say, measure_in_turn
from heddle_demo.bench.load.servers import heddle_command
from heddle_loadtest.workload.adapter_files import write_adapter_files
from heddle_loadtest.workload.spec import Adapters, Closed, Output, Poisson, Slo, Words, Workload, Zipf

LOADS = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # of the capacity
NUM_ADAPTERS = 32
WINDOW_SECONDS = 10.0
TTFT_SECONDS = 1.0
EARLY_REFUSAL = ("--max-queue-seconds", str(TTFT_SECONDS))  # a first token that would come later is not waited for
TPOT_FACTOR = 5.0  # of the time per token that a single stream sees, as Chameleon chooses its service level

ALONE = Workload(
    name="alone",
    about="A single stream: what a request takes that has the server to itself.",
    requests=32,
    arrivals=Closed(streams=1),
    adapters=Adapters(count=NUM_ADAPTERS),
    popularity=Zipf(alpha=1.0),
    prompt=Words(tokens=16),
    output=Output(tokens=16),
)
CAPACITY = replace(
    ALONE,
    name="capacity",
    about="128 streams that never pause: the requests per second that they get are called the capacity.",
    requests=512,
    arrivals=Closed(streams=128),
)


async def measure_sweep(base_name: str, out: Path, scratch: Path, say: Say, *, quick: bool) -> None:
    """The capacity into out/capacity, each load into out/load-X, X times the capacity."""
    base = make_base(base_name, scratch)
    write_adapter_files(CAPACITY.adapters, base.path, scratch / "adapters")
    num_rounds = 1 if quick else NUM_ROUNDS
    command = heddle_command(base, scratch / "adapters", scratch / "store")
    async with running_child("heddle", command, scratch / "heddle.log") as address:
        closed_loops = [Cell(ALONE, address, out / "alone"), Cell(CAPACITY, address, out / "capacity")]
        alone, capacity = await measure_in_turn(closed_loops, num_rounds, say)
    assert alone.total.tpot_seconds is not None, "its requests have 16 tokens each"
    slo = Slo(ttft_seconds=TTFT_SECONDS, tpot_seconds=round(TPOT_FACTOR * alone.total.tpot_seconds.p50, 4))
    rate = capacity.total.requests_per_second
    async with running_child("heddle", [*command, *EARLY_REFUSAL], scratch / "heddle.log") as address:
        loads = LOADS[1::2] if quick else LOADS
        await measure_in_turn(
            [Cell(_at_load(load, rate, slo), address, out / f"load-{load}") for load in loads], num_rounds, say
        )


def _at_load(load: float, capacity: float, slo: Slo) -> Workload:
    return replace(
        CAPACITY,
        name=f"sweep-{load}",
        about=f"{load} times the capacity.",
        requests=None,
        seconds=WINDOW_SECONDS,
        arrivals=Poisson(rate=round(load * capacity, 3)),
        slo=slo,
    )
