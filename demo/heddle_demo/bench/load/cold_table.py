"""Every request cold beside all adapters resident: the comparison of Toppings, with the same requests to all."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from msgspec.structs import replace

from heddle_demo.bench.child import running_child
from heddle_demo.bench.load.bases import DEMO, LoadBase, make_base
from heddle_demo.bench.load.rounds import NUM_ROUNDS, Cell, Say, measure_in_turn
from heddle_demo.bench.load.servers import heddle_command
from heddle_demo.bench.load.slora_table import mean_adapter_bytes
from heddle_loadtest.workload.adapter_files import write_adapter_files
from heddle_loadtest.workload.scale import at_rate
from heddle_loadtest.workload.spec import Workload
from heddle_loadtest.workload.spec_file import load_workload

SPEC = "toppings-cold"
RATES = {DEMO: 8.0, "qwen2.5-0.5b": 2.0}  # requests per second: well below what saturates
NUM_TIGHT_ADAPTERS = 16  # of 64 that the tight pools hold: enough for all in flight, too few to be asked for again
NUM_KV_TOKENS = 1024  # for all requests in flight
NUM_ROOMY_ADAPTERS = 256  # far more than there are: cached prefixes take room as well
PLACES = ("device", "host", "disk")  # where a request finds its adapter


async def measure_cold(base_name: str, out: Path, scratch: Path, say: Say, *, quick: bool) -> None:
    """The same requests where all adapters are resident, where they come from host memory, and from disk."""
    base = make_base(base_name, scratch)
    workload = load_workload(SPEC, variant="cold")
    adapters = scratch / "adapters"
    write_adapter_files(workload.adapters, base.path, adapters)
    async with AsyncExitStack() as servers:
        cells = []
        for place in PLACES:
            say(f"starting a server with adapters on {place}")
            options = _memory(place, base, mean_adapter_bytes(adapters))
            command = heddle_command(base, adapters, scratch / f"store-{place}", **options)
            address = await servers.enter_async_context(running_child(place, command, scratch / f"{place}.log"))
            cells.append(Cell(_workload(workload, base_name, quick=quick), address, out / place))
        await measure_in_turn(cells, 1 if quick else NUM_ROUNDS, say)


def _memory(place: str, base: LoadBase, adapter_bytes: float) -> dict[str, object]:
    num_pool_adapters = NUM_ROOMY_ADAPTERS if place == "device" else NUM_TIGHT_ADAPTERS
    num_host_adapters = NUM_ROOMY_ADAPTERS if place == "host" else NUM_TIGHT_ADAPTERS
    return {
        "pool_bytes": int(num_pool_adapters * adapter_bytes + base.kv_bytes(NUM_KV_TOKENS)),
        "host_cache_bytes": int(num_host_adapters * adapter_bytes),
    }


def _workload(workload: Workload, base_name: str, *, quick: bool) -> Workload:
    warmed_up = replace(workload, warmup=1, requests=16 if quick else workload.requests)
    return at_rate(warmed_up, RATES.get(base_name, min(RATES.values())))
