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
SLO = Slo(ttft_seconds=2.0, tpot_seconds=0.2)  # what a reader puts up with: five tokens a second
EARLY_REFUSAL = ("--max-queue-seconds", "1")  # a first token that would come later is not waited for

CAPACITY = Workload(
    name="capacity",
    about="128 streams that never pause: the requests per second that they get are called the capacity.",
    requests=512,
    arrivals=Closed(streams=128),
    adapters=Adapters(count=NUM_ADAPTERS),
    popularity=Zipf(alpha=1.0),
    prompt=Words(tokens=16),
    output=Output(tokens=16),
)


async def measure_sweep(base_name: str, out: Path, scratch: Path, say: Say, *, quick: bool) -> None:
    """The capacity into out/capacity, each load into out/load-X, X times the capacity."""
    base = make_base(base_name, scratch)
    write_adapter_files(CAPACITY.adapters, base.path, scratch / "adapters")
    num_rounds = 1 if quick else NUM_ROUNDS
    command = heddle_command(base, scratch / "adapters", scratch / "store")
    async with running_child("heddle", command, scratch / "heddle.log") as address:
        (capacity,) = await measure_in_turn([Cell(CAPACITY, address, out / "capacity")], num_rounds, say)
    rate = capacity.total.requests_per_second
    async with running_child("heddle", [*command, *EARLY_REFUSAL], scratch / "heddle.log") as address:
        loads = LOADS[1::2] if quick else LOADS
        await measure_in_turn(
            [Cell(_at_load(load, rate), address, out / f"load-{load}") for load in loads], num_rounds, say
        )


def _at_load(load: float, capacity: float) -> Workload:
    return replace(
        CAPACITY,
        name=f"sweep-{load}",
        about=f"{load} times the capacity.",
        requests=None,
        seconds=WINDOW_SECONDS,
        arrivals=Poisson(rate=round(load * capacity, 3)),
        slo=SLO,
    )
