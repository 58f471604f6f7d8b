"""One stretch of load on one server, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from heddle_demo.bench.counters import Counters
from heddle_demo.bench.server import Answer, BenchServer

Adapters = Iterator[str | None]  # what one stream asks for, request by request
FIRST_PLAIN_TOKEN = 16  # below lie the tokens that mark turns


def base_only(num_streams: int) -> list[Adapters]:
    """Streams that ask the base."""
    return [repeat(None) for _ in range(num_streams)]


@dataclass(frozen=True)
class RequestShape:
    """Every request's size. Prompts are random tokens, no two alike, so that no prefix is found in the cache."""

    num_prompt_tokens: int
    num_output_tokens: int
    vocabulary_size: int


class Label(NamedTuple):
    """What a window belongs to."""

    section: str
    num_registered: int  # adapters that the server knew
    arm: str  # what else tells it from the section's other windows


@dataclass(frozen=True)
class Window:
    """What a server did under load for so long, by its replies and its own counters."""

    label: Label
    seconds: float
    num_requests: int  # started in it
    requests_per_second: float
    output_tokens_per_second: float
    ttft_p50_seconds: float
    ttft_p99_seconds: float
    load_seconds_per_request: float  # waited for an adapter
    num_adapters: int  # different ones
    requests_by_tier: dict[str, int]  # where the replies say that the adapter was
    counted_by_tier: dict[str, int]  # the same, as /metrics has it
    num_loads: int  # adapters copied to the device
    read_bytes: int  # from disk to host memory
    loaded_bytes: int  # from host memory to the device
    num_steps: int
    num_segments: int
    step_seconds: float  # of all steps

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "label": self.label._asdict()}


class Load:
    """A closed loop: every stream sends a request, waits for its end, sends the next."""

    def __init__(
        self, server: BenchServer, streams: Sequence[Adapters], shape: RequestShape, *, first: Sequence[str] = ()
    ) -> None:
        """Adapters in `first` are brought to the device, room permitting, before each window."""
        self._server = server
        self._streams = streams
        self._shape = shape
        self._first = first
        self._random = np.random.default_rng(0)  # the same prompts for all loads

    async def run_until(self, deadline: float) -> list[Answer]:
        """All answers to what was started before `deadline`; returns when the last has come."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._run_stream(adapters, deadline)) for adapters in self._streams]
        return [answer for task in tasks for answer in task.result()]

    async def measure(self, label: Label, seconds: float, settle_seconds: float) -> Window:
        """A window, after `settle_seconds` of the same load so that the caches are as it makes them."""
        await ask_each(self._server, self._first, len(self._streams))
        await self.run_until(time.perf_counter() + settle_seconds)
        before = await self._server.counters()
        end = time.perf_counter() + seconds
        answers = await self.run_until(end)
        counted = (await self._server.counters()).since(before)
        return summarise(label, seconds, end, answers, counted)

    async def _run_stream(self, adapters: Adapters, deadline: float) -> list[Answer]:
        answers = []
        while time.perf_counter() < deadline:
            answers.append(await self._server.ask(next(adapters), self._prompt(), self._shape.num_output_tokens))
        return answers

    def _prompt(self) -> list[int]:
        shape = self._shape
        tokens = self._random.integers(FIRST_PLAIN_TOKEN, shape.vocabulary_size, size=shape.num_prompt_tokens)
        return [int(token) for token in tokens]


async def ask_each(server: BenchServer, names: Sequence[str], num_streams: int) -> None:
    """A shortest request to each of these adapters, in this order: it brings its rows, and caches no prefix."""
    left = iter(names)

    async def stream() -> None:
        for name in left:
            await server.ask(name, [FIRST_PLAIN_TOKEN], num_output_tokens=1)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(stream())


def summarise(label: Label, seconds: float, end: float, answers: Sequence[Answer], counted: Counters) -> Window:
    """The window of `seconds` up to `end`, on the answers' clock; every answer was asked for in it."""
    # A request that outlasts the window counts by the part of it that lies inside: whole ones only would make the
    # figure jump by the number of streams.
    shares = [answer.share_before(end) for answer in answers]
    num_tokens = sum(share * answer.num_output_tokens for share, answer in zip(shares, answers, strict=True))
    counted_requests = counted.by_label("heddle_adapter_cache_requests_total", "tier")
    moved_bytes = counted.by_label("heddle_adapter_load_bytes_total", "source")
    ttfts = [answer.ttft_seconds for answer in answers]
    return Window(
        label=label,
        seconds=seconds,
        num_requests=len(answers),
        requests_per_second=sum(shares) / seconds,
        output_tokens_per_second=num_tokens / seconds,
        ttft_p50_seconds=float(np.percentile(ttfts, 50)),
        ttft_p99_seconds=float(np.percentile(ttfts, 99)),
        load_seconds_per_request=sum(answer.load_seconds for answer in answers) / len(answers),
        num_adapters=len({answer.adapter for answer in answers} - {None}),
        requests_by_tier=dict(Counter(answer.tier for answer in answers if answer.tier is not None)),
        counted_by_tier={tier: int(count) for tier, count in counted_requests.items()},
        num_loads=int(counted.total("heddle_adapter_loads_total")),
        read_bytes=int(moved_bytes.get("disk", 0)),
        loaded_bytes=int(moved_bytes.get("host", 0)),
        num_steps=int(counted.total("heddle_engine_steps_total")),
        num_segments=int(counted.total("heddle_segments_total")),
        step_seconds=counted.total("heddle_step_seconds_total"),
    )
