"""What a running server says when its disk loses or refuses something, and that it goes on when the disk does."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from demo_server import DemoClient, DemoServer, Json, demo_client, demo_server
from fingerprints import Fingerprint, token_bytes
from heddle_adapters.content_folder import content_paths
from live_server import wait_until

SOUND = Fingerprint(0)  # is on the device whatever happens to the disk
FULL_BYTES = 1 << 14  # no file grows beyond it on a disk that is full


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    with demo_server(tmp_path_factory.mktemp("trouble"), pool_bytes="64MiB") as server:
        yield server


@asynccontextmanager
async def client_of(server: DemoServer) -> AsyncIterator[DemoClient]:
    """One who has seen the sound adapter answer, and sees it answer in the end."""
    async with demo_client(server) as client:
        await upload(client, "sound", SOUND)
        await assert_answers(client, "sound", SOUND)
        yield client
        await assert_answers(client, "sound", SOUND)


async def upload(client: DemoClient, name: str, content: Fingerprint) -> str:
    """Its digest."""
    status, card = await client.upload(name, content)
    assert status in (200, 201), card
    return str(card["digest"])


async def assert_answers(client: DemoClient, name: str, content: Fingerprint) -> None:
    status, reply = await client.ask(name)
    assert status == 200, reply
    (entry,) = reply["choices"][0]["logprobs"]["content"]
    assert bytes(entry["bytes"]) == token_bytes()[content.token_id]


def rows_files(server: DemoServer, digest: str) -> list[Path]:
    return list((server.store / "rows").glob(f"*/{digest.removeprefix('sha256:')}.rows"))


def message_of(reply: Json, server: DemoServer, code: str) -> str:
    """What an error says, which is nothing of where the server keeps its files."""
    error = reply["error"]
    assert error["code"] == code, reply
    assert "/" not in error["message"]
    return str(error["message"])


def test_damaged_content_is_in_quarantine_until_it_comes_again(server: DemoServer) -> None:
    content = Fingerprint(1)

    async def run() -> None:
        async with client_of(server) as client:
            digest = await upload(client, "damaged", content)
            await asyncio.to_thread(wait_until, lambda: rows_files(server, digest))
            rows_files(server, digest)[0].unlink()
            weights = content_paths(server.store, digest).weights
            data = bytearray(weights.read_bytes())
            data[-100] ^= 4
            weights.write_bytes(data)

            status, reply = await client.ask("damaged")
            assert status == 422
            assert "is damaged" in message_of(reply, server, "adapter_damaged")
            await assert_answers(client, "sound", SOUND)
            status, reply = await client.ask("damaged")
            assert status == 422
            assert "in quarantine until it is uploaded again" in message_of(reply, server, "adapter_damaged")
            card = await client.get("/v1/adapters/damaged")
            assert card["status"] == "quarantined"
            assert "is damaged" in card["reason"]
            assert (await client.gauges())["heddle_adapters_quarantined_total"] == 1

            assert await upload(client, "damaged", content) == digest
            assert (await client.get("/v1/adapters/damaged"))["status"] == "ready"
            await assert_answers(client, "damaged", content)

    asyncio.run(run())


@contextmanager
def nowhere_for_rows(server: DemoServer) -> Iterator[None]:
    """A file lies where the folder of rows should be."""
    rows, away = server.store / "rows", server.store / "rows-away"
    rows.rename(away)
    rows.touch()
    try:
        yield
    finally:
        rows.unlink()
        away.rename(rows)


@contextmanager
def full_disk(pid: int) -> Iterator[None]:
    """As one process sees it: what it writes does not fit."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_BYTES, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def compile_worker(pid: int) -> int:
    """The process that compiles rows for a server which has compiled something."""
    (worker,) = (
        child for child in descendants(pid) if b"compile_worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return worker


def descendants(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in file.read_text().split()]
    return children + [each for child in children for each in descendants(child)]


@pytest.mark.parametrize(("trouble", "reason"), [("folder", "Not a directory"), ("full", "File too large")])
def test_rows_that_cannot_be_written_fail_their_adapter_alone(server: DemoServer, trouble: str, reason: str) -> None:
    content = Fingerprint(2 if trouble == "folder" else 3)

    async def run() -> None:
        async with client_of(server) as client:
            disk = nowhere_for_rows(server) if trouble == "folder" else full_disk(compile_worker(server.pid))
            with disk:
                await upload(client, trouble, content)
                status, reply = await client.ask(trouble)
                assert status == 503, reply
                assert reason in message_of(reply, server, "store_unusable")
                await assert_answers(client, "sound", SOUND)
            await assert_answers(client, trouble, content)
            assert (await client.get(f"/v1/adapters/{trouble}"))["status"] == "ready"
            assert not list((server.store / "rows").glob("*/*.tmp"))

    asyncio.run(run())


def test_an_upload_to_a_full_disk_changes_nothing(server: DemoServer) -> None:
    before, after = Fingerprint(4), Fingerprint(5)

    async def run() -> None:
        async with client_of(server) as client:
            digest = await upload(client, "name", before)
            with full_disk(server.pid):
                status, reply = await client.upload("name", after)
                assert status == 503
                assert "cannot be read or written" in message_of(reply, server, "store_unusable")
                await assert_answers(client, "name", before)
            assert (await client.get("/v1/adapters/name"))["digest"] == digest
            assert not list((server.store / "incoming").iterdir())
            await upload(client, "name", after)
            await assert_answers(client, "name", after)

    asyncio.run(run())
