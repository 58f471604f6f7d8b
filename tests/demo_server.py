"""`heddle serve` over the demo's base as a process of its own, with a small pool: real HTTP, real engine, real disk."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from fingerprints import Fingerprint
from heddle_demo.data import BASE_DIR

READY = re.compile(r"heddle is ready at (\S+)")
START_SECONDS = 120
STOP_SECONDS = 30
REQUEST_SECONDS = 120  # after which a request counts as lost

Json = dict[str, Any]


@dataclass(frozen=True)
class DemoServer:
    """A server that is ready."""

    address: str
    store: Path
    pid: int


@contextmanager
def demo_server(folder: Path, base: Path = BASE_DIR, **options: object) -> Iterator[DemoServer]:
    """`options` as `heddle serve` takes them; its store and its log lie in `folder`."""
    options = {"store": folder / "store", "port": 0, "dtype": "float32", **options}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "heddle_server", "serve", str(base), *words]
    log = folder / "log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while (ready := READY.search(log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield DemoServer(ready[1], folder / "store", process.pid)
        finally:
            process.terminate()
            assert process.wait(STOP_SECONDS) == 0, log.read_text()


@dataclass(frozen=True)
class DemoClient:
    """Somebody who asks a server; what is refused is told, not raised."""

    session: aiohttp.ClientSession

    async def get(self, path: str) -> Json:
        async with self.session.get(path) as response:
            response.raise_for_status()
            content: Json = await response.json()
            return content

    async def upload(self, name: str, content: Fingerprint) -> tuple[int, Json]:
        """Status and reply."""
        form = aiohttp.FormData({"name": name})
        for file_name, data in content.files.items():
            form.add_field(file_name, data, filename=file_name)
        async with self.session.post("/v1/adapters", data=form) as response:
            return response.status, await response.json()

    async def delete(self, name: str) -> int:
        """Status."""
        async with self.session.delete(f"/v1/adapters/{name}") as response:
            return response.status

    async def ask(self, name: str) -> tuple[int, Json]:
        """Status and reply to a request for one token."""
        body = {
            "adapter": name,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
        }
        async with self.session.post("/v1/chat/completions", json=body) as response:
            return response.status, await response.json()

    async def gauges(self) -> dict[str, float]:
        """/metrics: sample to value."""
        async with self.session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


@asynccontextmanager
async def demo_client(server: DemoServer) -> AsyncIterator[DemoClient]:
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.address, timeout=timeout, connector=connector) as session:
        yield DemoClient(session)
