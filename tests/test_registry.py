"""Adapters between the store, the routes and the engine: folders imported at start, pins, room in the pool."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import scripted_engine
from heddle_adapters.errors import AdapterExceedsPool, InvalidAdapter, StoreUnusable
from heddle_adapters.store_index import AdapterDetails
from heddle_server.api.adapter_folders import adapter_folders
from heddle_server.api.errors import PinCapacity
from heddle_server.api.pool_room import PoolRoom
from heddle_server.api.registry import ImportReport, disk_errors
from heddle_server.api.service import Service
from heddle_server.api.upload import Upload
from heddle_server.config import ServerConfig
from heddle_server.request import Request, SamplingParams
from live_server import SCRIPTED_ENGINE, server_config
from test_adapter_api import CONFIG, weights


def write_adapter(folder: Path, fill: float = 1.0, rank: int = 2, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": rank, **config}))
    (folder / "adapter_model.safetensors").write_bytes(weights(fill, rank))
    return folder


def upload_of(folder: Path, name: str, **details: Any) -> Upload:
    config = (folder / "adapter_config.json").read_bytes()
    return Upload(name, config, folder / "adapter_model.safetensors", AdapterDetails(**details))


@asynccontextmanager
async def running(config: ServerConfig, **callbacks: Any) -> AsyncIterator[Service]:
    """A service whose engine is ready and whose folder of adapters is imported."""
    async with Service(config, engine_command=SCRIPTED_ENGINE, **callbacks) as service:
        await until(lambda: service.is_ready)
        yield service


async def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


def import_once(config: ServerConfig) -> tuple[ImportReport, list[tuple[str, int]]]:
    """Starts and stops a server: what it said of its folder, and which names have how many versions then."""
    reports: list[ImportReport] = []

    async def start() -> list[tuple[str, int]]:
        async with running(config, on_imported=reports.append) as service:
            return [(record.name, record.num_versions) for record in service.store.list()]

    names = asyncio.run(start())
    (report,) = reports
    return report, names


def test_folders_become_names(tmp_path: Path) -> None:
    write_adapter(tmp_path / "sql")
    write_adapter(tmp_path / "sql/checkpoint-500")
    write_adapter(tmp_path / "team/chat")
    write_adapter(tmp_path / "team/deeper/still")
    write_adapter(tmp_path / ".hidden")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    found = list(adapter_folders(tmp_path))
    assert [folder.name for folder in found] == ["sql", "team/chat"]
    (tmp_path / "sql/adapter_model.safetensors").rename(tmp_path / "sql/adapter_model.bin")
    with pytest.raises(InvalidAdapter, match=r"no adapter_model\.safetensors"):
        found[0].check()


def test_a_folder_of_adapters_is_registered_at_start(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    write_adapter(folder / "sql")
    write_adapter(folder / "team/chat", 2.0)
    write_adapter(folder / "not a name")
    write_adapter(folder / "huge", rank=600)
    write_adapter(folder / "odd", r="two")
    config = msgspec.structs.replace(server_config(tmp_path), adapters_path=folder)
    report, names = import_once(config)
    assert names == [("sql", 1), ("team/chat", 1)]
    assert [version.reference for version in report.registered] == ["sql@1", "team/chat@1"]
    assert [name for name, _ in report.refused] == ["huge", "not a name", "odd"]
    assert "--pool-bytes" in report.refused[0][1]
    # The same again is no new version; what has changed is.
    (folder / "sql/adapter_model.safetensors").write_bytes(weights(3.0))
    report, names = import_once(config)
    assert names == [("sql", 2), ("team/chat", 1)]
    assert [version.reference for version in report.registered] == ["sql@2", "team/chat@1"]


def test_a_folder_that_cannot_be_read_stops_no_server(tmp_path: Path) -> None:
    config = msgspec.structs.replace(server_config(tmp_path), adapters_path=tmp_path / "gone")
    report, names = import_once(config)
    assert (names, len(report.refused)) == ([], 1)


def test_a_server_is_ready_when_its_folder_is_imported(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/sql")
    config = msgspec.structs.replace(server_config(tmp_path), adapters_path=tmp_path / "adapters")
    said: list[str] = []

    async def start() -> None:
        async with running(
            config, on_imported=lambda report: said.append("imported"), on_ready=lambda model: said.append("ready")
        ):
            pass

    asyncio.run(start())
    assert said == ["imported", "ready"]


def in_service(tmp_path: Path, test: Callable[[Service], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running(server_config(tmp_path)) as service:
            await test(service)

    asyncio.run(run())


def test_a_new_engine_is_told_the_pins_again(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")

    async def test(service: Service) -> None:
        version, _ = await service.registry.upload(upload_of(folder, "sql", is_pinned=True))
        await until(lambda: service.engine.tier_of(version.digest) == "device")
        sampling = SamplingParams(max_tokens=2, seed=scripted_engine.DIES_AT_ONCE)
        request = Request(request_id=1, prompt_token_ids=[65], sampling=sampling)
        outputs = [output async for output in service.engine.generate(request)]
        assert outputs[-1].error_code == "engine_died"
        await until(lambda: service.engine.num_restarts == 1 and service.engine.is_ready)
        await until(lambda: service.engine.tier_of(version.digest) == "device")

    in_service(tmp_path, test)


def test_a_pin_follows_its_name_to_the_newest_version(tmp_path: Path) -> None:
    first, second = write_adapter(tmp_path / "1"), write_adapter(tmp_path / "2", 2.0)

    async def test(service: Service) -> None:
        old, _ = await service.registry.upload(upload_of(first, "sql", is_pinned=True))
        new, _ = await service.registry.upload(upload_of(second, "sql"))
        await until(lambda: service.engine.tier_of(new.digest) == "device")
        assert await pinned_digests(service) == [new.digest]
        await service.registry.delete(new.reference)
        assert await pinned_digests(service) == [old.digest]
        await service.registry.update("sql", AdapterDetails(is_pinned=False))
        assert await pinned_digests(service) == []

    in_service(tmp_path, test)


async def pinned_digests(service: Service) -> list[str]:
    report = await service.engine.describe_cache()
    return [each.adapter_digest for each in report.adapters if each.is_pinned]


def test_the_engine_hears_of_new_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "adapters/sql")

    async def test(service: Service) -> None:
        told: list[str] = []
        monkeypatch.setattr(service.engine, "prepare_adapter", told.append)
        first, _ = await service.registry.upload(upload_of(folder, "sql"))
        write_adapter(tmp_path / "adapters/chat", 2.0)
        report = await service.registry.import_folder(tmp_path / "adapters")
        assert [version.name for version in report.registered] == ["chat", "sql"]
        assert told == [first.digest, report.registered[0].digest]

    in_service(tmp_path, test)


def test_a_change_is_finished_when_its_client_leaves(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")

    async def test(service: Service) -> None:
        uploading = asyncio.create_task(service.registry.upload(upload_of(folder, "sql", is_pinned=True)))
        await asyncio.sleep(0)
        uploading.cancel()
        await asyncio.gather(uploading, return_exceptions=True)
        assert uploading.cancelled()
        await until(lambda: [record.name for record in service.store.list()] == ["sql"])
        digest = service.store.resolve("sql").digest
        await until(lambda: service.engine.tier_of(digest) == "device")

    in_service(tmp_path, test)


def test_names_whose_time_is_up_leave_the_engine_too(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")

    async def test(service: Service) -> None:
        version, _ = await service.registry.upload(upload_of(folder, "sql", is_pinned=True, ttl_seconds=1))
        await until(lambda: service.engine.tier_of(version.digest) == "device")
        await until(lambda: service.engine.tier_of(version.digest) == "disk")
        assert service.store.list() == ()

    in_service(tmp_path, test)


def test_what_the_disk_refuses_is_told_as_the_stores_trouble() -> None:
    with pytest.raises(StoreUnusable, match="No space left on device"), disk_errors():
        raise OSError(28, "No space left on device")


@dataclasses.dataclass(frozen=True)
class Sized:
    """An adapter of so many numbers."""

    num_values: int
    num_prefix_tokens: int = 0

    def estimate_bytes(self, row_dtype_bytes: int) -> int:
        return self.num_values * row_dtype_bytes


MODEL = scripted_engine.model_card()  # 8 pages of 4 KiB; a context of 64 tokens takes 4


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_room_counts_in_the_dtype_of_the_rows(dtype: str, size: int) -> None:
    room = PoolRoom(msgspec.structs.replace(MODEL, dtype=dtype))
    assert room.bytes_of(Sized(2048)) == 2048 * size
    assert room.pages_of(Sized(2048)) == size // 2
    assert room.pages_of(Sized(2049)) == size // 2 + 1


@pytest.mark.parametrize(
    ("num_tokens", "num_others", "num_pages"), [(1, 0, 1), (16, 0, 1), (17, 0, 2), (16, 1, 2), (17, 1, 3), (1, 1025, 3)]
)
def test_a_prefix_takes_whole_pages(num_tokens: int, num_others: int, num_pages: int) -> None:
    num_values = num_tokens * MODEL.page_bytes // MODEL.page_tokens // 4
    assert PoolRoom(MODEL).pages_of(Sized(num_values + num_others, num_tokens)) == num_pages


def test_room_of_one_adapter_and_of_pins() -> None:
    room = PoolRoom(MODEL)
    room.check_fits(Sized(8192))
    with pytest.raises(AdapterExceedsPool, match=r"32772 bytes .* 32768"):
        room.check_fits(Sized(8193))
    assert room.share_of(Sized(1024)) == 0.125
    room.check_pins([Sized(1024)], [Sized(3072)], tells_totals=True)
    with pytest.raises(PinCapacity, match="20480"):
        room.check_pins([Sized(1025)], [Sized(3072)], tells_totals=True)
    with pytest.raises(PinCapacity, match="does not fit beside what is pinned") as error:
        room.check_pins([Sized(1025)], [Sized(3072)], tells_totals=False)
    assert not any(character.isdigit() for character in error.value.message)
    sizes = [("a", 2048), ("b", 4096), ("a", 2048), ("c", 2048), ("d", 1)]
    pinned = [(digest, "blue", Sized(size)) for digest, size in sizes]
    assert room.pins_that_fit(pinned) == {"a": "blue", "c": "blue"}
    assert PoolRoom(msgspec.structs.replace(MODEL, max_model_len=1000)).pins_that_fit(pinned) == {}


def test_pins_of_one_tenant_stay_in_its_share() -> None:
    room = PoolRoom(MODEL, tenant_pool_share=0.25)
    room.check_pins([Sized(1024), Sized(1024)], [Sized(2048)], tells_totals=False)
    with pytest.raises(PinCapacity, match=r"need 12288 bytes .* may take 8192"):
        room.check_pins([Sized(1024), Sized(1025)], [], tells_totals=False)
    pinned = [("a", "blue", Sized(2048)), ("b", "blue", Sized(1)), ("c", "green", Sized(2048)), ("d", "red", Sized(1))]
    assert room.pins_that_fit(pinned) == {"a": "blue", "c": "green"}
