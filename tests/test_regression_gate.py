"""Has heddle become slower? The smoke workload on the demo server, as a ratio to PEFT's on the same machine meanwhile.

Absolute figures of a test machine say nothing; this ratio held from hour to hour.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

from heddle_demo.bench.child import running_child
from heddle_demo.bench.load.bases import DEMO, make_base
from heddle_demo.bench.load.rounds import Cell, measure_in_turn
from heddle_demo.bench.load.servers import baseline_command, heddle_command
from heddle_demo.data import ADAPTERS, ADAPTERS_DIR
from heddle_loadtest.measure.summary import Summary
from heddle_loadtest.workload.spec_file import load_workload

NUM_ROUNDS = 3
USUAL_RATIO = (
    4.6  # heddle's output tokens per second over PEFT's mixed batches'; 4.3 to 5.1 on two cores of an Intel Xeon
)
LEAST_SHARE = 0.5  # of it: what a regression leaves, and noise does not take


def test_heddle_keeps_its_distance_from_peft(tmp_path: Path) -> None:
    ours, theirs = asyncio.run(measure(tmp_path))
    for summary in (ours, theirs):
        assert summary.errors == {}
        assert summary.total.num_ok == NUM_ROUNDS * 48
    ratios = [
        mine.output_tokens_per_second / other.output_tokens_per_second
        for mine, other in zip(ours.repeats, theirs.repeats, strict=True)
    ]
    assert median(ratios) >= LEAST_SHARE * USUAL_RATIO, f"heddle over PEFT, round by round: {ratios}"
    assert ours.server is not None
    assert all(check.is_within_tolerance for check in ours.server.checks), ours.server.checks


async def measure(folder: Path) -> list[Summary]:
    smoke = load_workload("smoke")
    async with both_servers(folder) as addresses:
        cells = [Cell(smoke, address, folder / name) for name, address in addresses.items()]
        return await measure_in_turn(cells, NUM_ROUNDS, print)


@asynccontextmanager
async def both_servers(folder: Path) -> AsyncIterator[dict[str, str]]:
    """Over the same adapters: the demo's LoRAs, since of others PEFT's mixed batches take none."""
    for name, method in ADAPTERS.items():
        if method.startswith(("LoRA", "rsLoRA")):
            shutil.copytree(ADAPTERS_DIR / name, folder / "adapters" / name)
    base = make_base(DEMO, folder)
    heddle = heddle_command(base, folder / "adapters", folder / "store")
    peft = baseline_command("peft-mixed", base, folder / "adapters")
    async with (
        running_child("heddle", heddle, folder / "heddle.log") as ours,
        running_child("PEFT", peft, folder / "peft.log") as theirs,
    ):
        yield {"heddle": ours, "peft-mixed": theirs}
