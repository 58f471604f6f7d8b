"""One `heddle serve` over the demo's base in a process of its own, and the way to ask it. Measures nothing."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from heddle_demo.bench.child import running_child
from heddle_demo.bench.counters import Counters
from heddle_demo.bench.failure import BenchFailed as BenchFailed
from heddle_demo.data import BASE_DIR, BASE_NAME

REQUEST_SECONDS = 300.0
SERVER_BYTES = 700 << 20  # of memory, for a server without its pool

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """One request, as its client and its server saw it."""

    adapter: str | None  # None: the base
    started_seconds: float  # on the clock of time.perf_counter
    finished_seconds: float
    num_output_tokens: int
    tier: str | None  # where its adapter was when it arrived; None for the base
    load_seconds: float  # until its adapter was on the device
    ttft_seconds: float  # as the server tells it: nobody reads these streams token by token

    def share_before(self, end_seconds: float) -> float:
        """The part of its time that lies before `end_seconds`, at which it was under way or over."""
        within = min(self.finished_seconds, end_seconds) - self.started_seconds
        return within / (self.finished_seconds - self.started_seconds)


@dataclass(frozen=True)
class BenchServer:
    """A server that is ready."""

    name: str  # for people
    session: aiohttp.ClientSession

    async def ask(self, adapter: str | None, prompt: list[int], num_output_tokens: int) -> Answer:
        """One request of exactly so many tokens in and out; raises `BenchFailed` if it is not answered."""
        body = {
            "prompt": prompt,
            "max_tokens": num_output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            **({} if adapter is None else {"adapter": adapter}),
        }
        started_seconds = time.perf_counter()
        try:
            async with self.session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    raise BenchFailed(f"the server with {self.name} refused a request: {(await response.text())[:500]}")
                reply = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchFailed(f"the server with {self.name} did not answer: {error!r}") from error
        heddle = reply["heddle"]
        return Answer(
            adapter=adapter,
            started_seconds=started_seconds,
            finished_seconds=time.perf_counter(),
            num_output_tokens=reply["usage"]["completion_tokens"],
            tier=heddle["cache"],
            load_seconds=(heddle["load_ms"] or 0.0) / 1000,
            ttft_seconds=heddle["ttft_ms"] / 1000,
        )

    async def counters(self) -> Counters:
        """What it has counted so far."""
        async with self.session.get("/metrics") as response:
            return Counters.parse(await response.text())


@dataclass(frozen=True)
class ServerSettings:
    """What one server differs by from another."""

    name: str  # for people
    store: Path
    pool_bytes: int
    host_cache_bytes: int
    eviction: str = "cost"

    @property
    def log_path(self) -> Path:
        """What it said."""
        return self.store.with_suffix(".log")

    @property
    def command(self) -> list[str]:
        options = {
            "--model-name": BASE_NAME,
            "--store": self.store,
            "--pool-bytes": self.pool_bytes,
            "--host-cache-bytes": self.host_cache_bytes,
            "--eviction": self.eviction,
            "--port": 0,
        }
        words = [str(word) for option in options.items() for word in option]
        return [sys.executable, "-m", "heddle_server", "serve", str(BASE_DIR), *words]


def end_in_order() -> None:
    """However this process is told to end from now on, it ends its servers and removes its folders first."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: signal.raise_signal(signal.SIGINT))


def run_to_end(measurement: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`; of the failures of tasks that ran at the same time, which mostly fail of the same, the first."""
    try:
        return asyncio.run(measurement)
    except ExceptionGroup as failures:
        failure: Exception = failures
        while isinstance(failure, ExceptionGroup):
            failure = failure.exceptions[0]
        raise failure from failures


@asynccontextmanager
async def running_server(settings: ServerSettings) -> AsyncIterator[BenchServer]:
    """A server for as long as the context lasts; raises `BenchFailed` if it does not come up."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with (
        running_child(settings.name, settings.command, settings.log_path) as address,
        aiohttp.ClientSession(address, timeout=timeout) as session,
    ):
        yield BenchServer(settings.name, session)
