"""A server in a process of its own: started, awaited, ended. Knows no command and asks it nothing."""

from __future__ import annotations

import asyncio
import re
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from heddle_demo.bench.failure import BenchFailed

READY = re.compile(r"is ready at (?P<address>\S+)")
START_SECONDS = 300.0
STOP_SECONDS = 30.0


@asynccontextmanager
async def running_child(name: str, command: Sequence[str], log_path: Path) -> AsyncIterator[str]:
    """Its address, for as long as the context lasts. Raises `BenchFailed` if it does not come up."""
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        yield await _address(process, name, log_path)
    finally:
        await _stop(process)


async def _address(process: Process, name: str, log_path: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while (match := READY.search(words := _words(log_path))) is None:
        if process.returncode is not None or time.monotonic() > deadline:
            raise BenchFailed(f"the server with {name} did not start:\n{words[-2000:]}")
        await asyncio.sleep(0.1)
    return match["address"]


def _words(log_path: Path) -> str:
    return log_path.read_text(errors="replace")


async def _stop(process: Process) -> None:
    with suppress(ProcessLookupError):  # gone already, as after Ctrl-C, which the terminal sends to all
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
