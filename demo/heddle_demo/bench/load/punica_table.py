"""Punica's figure 11: four popularities of adapters, on heddle and on what people have without it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from msgspec.structs import replace

from heddle_demo.bench.child import running_child
from heddle_demo.bench.load.bases import DEMO, make_base
from heddle_demo.bench.load.rounds import NUM_ROUNDS, Cell, Say, measure_in_turn
from heddle_demo.bench.load.servers import BASELINES, HEDDLE, baseline_command, heddle_command
from heddle_loadtest.workload.adapter_files import write_adapter_files
from heddle_loadtest.workload.spec import Workload
from heddle_loadtest.workload.spec_file import load_workload

SPEC = "punica-fig11"
VARIANTS = ("base", "identical", "skewed", "uniform", "distinct")
NUM_OTHERS_REQUESTS = 32  # of 64, where each mix would take them minutes: one batch


async def measure_punica(base_name: str, out: Path, scratch: Path, say: Say, *, quick: bool) -> None:
    """Every popularity on every server, into out/SERVER/POPULARITY."""
    base = make_base(base_name, scratch)
    adapters = scratch / "adapters"
    say("making adapters")
    write_adapter_files(load_workload(SPEC).adapters, base.path, adapters)
    commands = {
        HEDDLE: heddle_command(base, adapters, scratch / "store"),
        **{kind: baseline_command(kind, base, adapters) for kind in BASELINES},
    }
    async with AsyncExitStack() as servers:
        cells = []
        for name, command in commands.items():
            say(f"starting {name}")
            address = await servers.enter_async_context(running_child(name, command, scratch / f"{name}.log"))
            cells += [
                Cell(_workload(variant, name, base_name, quick=quick), address, out / name / variant)
                for variant in VARIANTS
            ]
        await measure_in_turn(cells, 1 if quick else NUM_ROUNDS, say)


def _workload(variant: str, server: str, base_name: str, *, quick: bool) -> Workload:
    """heddle's warm-up compiles each adapter's rows; the others have all of it in memory when they are ready."""
    workload = replace(load_workload(SPEC, variant=variant), warmup=1 if server == HEDDLE else 0)
    if quick or (base_name != DEMO and server != HEDDLE):
        return replace(workload, requests=NUM_OTHERS_REQUESTS)
    return workload
