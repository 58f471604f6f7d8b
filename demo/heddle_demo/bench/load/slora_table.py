"""S-LoRA's table 3: the same load over ever more registered adapters, in the same memory."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from msgspec.structs import replace

from heddle_demo.bench.child import running_child
from heddle_demo.bench.load.bases import make_base
from heddle_demo.bench.load.rounds import NUM_ROUNDS, Cell, Say, measure_in_turn
from heddle_demo.bench.load.servers import heddle_command
from heddle_loadtest.workload.adapter_files import write_adapter_files
from heddle_loadtest.workload.scale import at_rate
from heddle_loadtest.workload.spec import Workload
from heddle_loadtest.workload.spec_file import load_workload

SPEC = "slora-table3"
SIZES = (5, 100, 1000, 2000)
POPULARITIES = ("", "-power03")  # as in the paper, which is uniform; and truly skewed
RATE = 150.0  # requests per second: above what this serves, as in the paper
NUM_REQUESTS = 600
NUM_POOL_ADAPTERS = 128  # that fit into the pool, of mean size
NUM_HOST_ADAPTERS = 512  # and into host memory; the others lie on disk


async def measure_slora(base_name: str, out: Path, scratch: Path, say: Say, *, quick: bool) -> None:
    """Every number of adapters by both popularities, into out/nN and out/nN-power03."""
    base = make_base(base_name, scratch)
    sizes = SIZES[:2] if quick else SIZES
    async with AsyncExitStack() as servers:
        cells = []
        for size in sizes:
            say(f"making {size} adapters, and a server")
            adapters = scratch / f"adapters-{size}"
            write_adapter_files(load_workload(SPEC, variant=f"n{size}").adapters, base.path, adapters)
            adapter_bytes = mean_adapter_bytes(adapters)
            command = heddle_command(
                base,
                adapters,
                scratch / f"store-{size}",
                pool_bytes=int(NUM_POOL_ADAPTERS * adapter_bytes),
                host_cache_bytes=int(NUM_HOST_ADAPTERS * adapter_bytes),
            )
            address = await servers.enter_async_context(
                running_child(f"{size} adapters", command, scratch / f"n{size}.log")
            )
            cells += [
                Cell(_workload(f"n{size}{popularity}", quick=quick), address, out / f"n{size}{popularity}")
                for popularity in POPULARITIES
            ]
        await measure_in_turn(cells, 1 if quick else NUM_ROUNDS, say)


def mean_adapter_bytes(folder: Path) -> float:
    """Of the weights of all adapters in a folder; their rows are as large."""
    sizes = [file.stat().st_size for file in folder.glob("*/adapter_model.safetensors")]
    return sum(sizes) / len(sizes)


def _workload(variant: str, *, quick: bool) -> Workload:
    workload = load_workload(SPEC, variant=variant)
    # Every adapter's rows are made by the warm-up: what is measured is where they lie, not making them.
    return at_rate(replace(workload, requests=64 if quick else NUM_REQUESTS, warmup=1), RATE)
