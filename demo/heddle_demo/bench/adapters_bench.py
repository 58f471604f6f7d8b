"""`heddle bench adapters`: what the number of registered adapters costs, on the demo's base and this machine.

Servers are children of this process, each over a store of its own in a temporary folder. Those that are compared are
up at the same time and measured in turn, one under load and the others idle, in an order that turns round each time.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from heddle_demo.bench.floor import BaseBytes
from heddle_demo.bench.machine import check_room, describe_machine, memory_bandwidth
from heddle_demo.bench.plan import FULL, QUICK, Plan
from heddle_demo.bench.popularity import POPULARITIES, own_shares, popular
from heddle_demo.bench.random_adapters import RandomAdapters, linear_layout
from heddle_demo.bench.report import print_report
from heddle_demo.bench.results import BASE_ONLY, FLATNESS, SMALL_POOL, TABLE, Results
from heddle_demo.bench.server import SERVER_BYTES, BenchServer, ServerSettings, end_in_order, run_to_end, running_server
from heddle_demo.bench.stores import BenchStores
from heddle_demo.bench.window import Label, Load, RequestShape, Window, ask_each, base_only
from heddle_demo.data import BASE_DIR

SPARE_BYTES = 512 << 20  # of a pool that holds all adapters, so that cached prefixes have room of their own

Arm = tuple[Label, Load]


def run_adapters_bench(json_path: Path, *, quick: bool) -> None:
    """Measures, prints tables and a JSON line, and writes everything to `json_path`.

    Raises `BenchFailed` if a server does not start or refuses a request, `TooLittleRoom` before anything is started.
    """
    end_in_order()
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="heddle-bench-") as folder:
        results = AdaptersBench(plan, Path(folder), Console(stderr=True)).run()
    content = results.to_json()
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(content, indent=1) + "\n")
    print_report(results)
    print(json.dumps({name: value for name, value in content.items() if name != "windows"}), flush=True)


class AdaptersBench:
    """One run."""

    def __init__(self, plan: Plan, folder: Path, console: Console) -> None:
        """`folder` is for stores; `console` is told what is going on."""
        self._plan = plan
        self._folder = folder
        self._console = console
        self._started_seconds = time.monotonic()
        self._adapters = RandomAdapters(linear_layout(BASE_DIR))
        self._stores = BenchStores(folder, self._adapters)
        vocabulary_size = json.loads((BASE_DIR / "config.json").read_text())["vocab_size"]
        self._shape = RequestShape(plan.num_prompt_tokens, plan.num_output_tokens, vocabulary_size)
        self._windows: list[Window] = []

    def run(self) -> Results:
        """Everything, from empty stores to the last window."""
        self._check_room()
        bandwidth = memory_bandwidth()
        for size in self._plan.store_sizes:
            self._say(f"making a store of {size} adapters")
            self._stores.fill(size)
        run_to_end(self._measure())
        return Results(
            plan=self._plan,
            machine=describe_machine(),
            bandwidth_bytes_per_second=bandwidth,
            base_bytes=BaseBytes.of(BASE_DIR, self._adapters.base),
            smallest_mean_row_bytes=self._adapters.mean_row_bytes(self._plan.table_sizes[0]),
            windows=tuple(self._windows),
        )

    def _check_room(self) -> None:
        content_bytes = sum(map(self._stores.room_bytes, self._plan.store_sizes))
        all_rows_bytes = self._stores.room_bytes(self._plan.num_adapters)
        table_bytes = self._stores.room_bytes(self._plan.table_pool_adapters + self._plan.table_host_adapters)
        memory_bytes = max(all_rows_bytes + SPARE_BYTES, len(self._plan.table_sizes) * table_bytes)
        check_room(self._folder, content_bytes + all_rows_bytes, memory_bytes + 4 * SERVER_BYTES)

    async def _measure(self) -> None:
        async with AsyncExitStack() as servers:
            await self._measure_resident(servers)
        async with AsyncExitStack() as servers:
            await self._measure_table(servers)

    async def _measure_resident(self, servers: AsyncExitStack) -> None:
        """What more registered adapters cost where there is room for all, and what too little room costs."""
        plan, stores = self._plan, self._stores
        few, many = plan.flat_sizes
        small_store = stores.copy(many)
        roomy_bytes = stores.room_bytes(many) + SPARE_BYTES
        small_bytes = stores.room_bytes(plan.small_pool_adapters)
        # For adapters on their way: two per stream, so that what is not in the pool is on disk.
        staging_bytes = stores.room_bytes(2 * plan.num_streams)

        (full,) = await self._start(
            servers, ServerSettings(f"{many} resident", stores.path(many), roomy_bytes, staging_bytes)
        )
        await self._warm_up(full, many)
        for store in (small_store, *(stores.path(size) for size in plan.store_sizes if 0 < size < many)):
            stores.share_rows(many, store)
        none, some, small = await self._start(
            servers,
            ServerSettings("no adapters", stores.path(0), roomy_bytes, staging_bytes),
            ServerSettings(f"{few} resident", stores.path(few), roomy_bytes, staging_bytes),
            ServerSettings(f"room for {plan.small_pool_adapters}", small_store, small_bytes, staging_bytes),
        )
        await self._warm_up(some, few)

        await self._in_turn(
            plan.num_pairs,
            (Label(FLATNESS, few, "all resident"), self._changing_load(some, few)),
            (Label(FLATNESS, many, "all resident"), self._changing_load(full, many)),
        )
        await self._in_turn(
            plan.num_pairs,
            (Label(BASE_ONLY, 0, "base"), self._base_load(none)),
            (Label(BASE_ONLY, many, "base"), self._base_load(full)),
        )
        await self._in_turn(
            plan.small_pool_repeats,
            (Label(SMALL_POOL, many, "all resident"), self._changing_load(full, many)),
            *(
                (Label(SMALL_POOL, many, f"{uses} in use"), self._changing_load(small, uses, plan.small_pool_adapters))
                for uses in plan.small_pool_uses
            ),
        )

    async def _measure_table(self, servers: AsyncExitStack) -> None:
        """The same memory for ever more adapters."""
        plan, stores = self._plan, self._stores
        pool_bytes = stores.room_bytes(plan.table_pool_adapters)
        host_bytes = stores.room_bytes(plan.table_host_adapters)
        started = await self._start(
            servers,
            *(
                ServerSettings(f"{size} adapters", stores.path(size), pool_bytes, host_bytes)
                for size in plan.table_sizes
            ),
        )
        arms: list[Arm] = []
        for size, server in zip(plan.table_sizes, started, strict=True):
            await self._warm_up(server, size)
            arms += [(Label(TABLE, size, name), self._popular_load(server, size, name)) for name in POPULARITIES]
        await self._in_turn(plan.table_repeats, *arms)

    async def _start(self, servers: AsyncExitStack, *settings: ServerSettings) -> list[BenchServer]:
        """Servers that run until `servers` closes, started at the same time."""
        self._say(f"starting servers: {', '.join(each.name for each in settings)}")
        async with asyncio.TaskGroup() as starting:
            tasks = [starting.create_task(servers.enter_async_context(running_server(each))) for each in settings]
        return [task.result() for task in tasks]

    async def _warm_up(self, server: BenchServer, count: int) -> None:
        self._say(f"{server.name}: one request to each of {count} adapters")
        await ask_each(server, self._stores.names(count), self._plan.num_streams)

    async def _in_turn(self, num_rounds: int, *arms: Arm) -> None:
        """Windows of all arms, round by round, every other round backwards: what drifts hits all alike."""
        section = arms[0][0].section
        for number in range(num_rounds):
            self._say(f"measuring {section}, round {number + 1} of {num_rounds}")
            for label, load in arms if number % 2 == 0 else reversed(arms):
                self._windows.append(await load.measure(label, self._plan.window_seconds, self._plan.settle_seconds))

    def _changing_load(self, server: BenchServer, uses: int, num_fitting: int = 0) -> Load:
        """As many adapters at a time as there are streams, out of the first `uses`, another with each request.

        Where they fit all together, they are brought in before each window: the arm before has taken their place.
        """
        names = self._stores.names(uses)
        draws = own_shares(names, self._plan.num_streams, seed=0)
        return Load(server, draws, self._shape, first=names if uses <= num_fitting else ())

    def _base_load(self, server: BenchServer) -> Load:
        return Load(server, base_only(self._plan.num_streams), self._shape)

    def _popular_load(self, server: BenchServer, size: int, popularity: str) -> Load:
        names = self._stores.names(size)
        draws = [popular(names, POPULARITIES[popularity], seed) for seed in range(self._plan.num_streams)]
        return Load(server, draws, self._shape)

    def _say(self, what: str) -> None:
        self._console.print(f"{time.monotonic() - self._started_seconds:5.0f} s  {what} ...", highlight=False)
