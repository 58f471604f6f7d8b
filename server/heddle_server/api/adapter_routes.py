"""/v1/adapters: upload, list, look at and delete adapters while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from heddle_adapters.checkpoint import read_checkpoint
from heddle_adapters.errors import AdapterIncompatible, InvalidAdapterName
from heddle_adapters.names import check_name
from heddle_adapters.store_index import AdapterVersion
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.api.errors import EngineUnavailable
from heddle_server.api.service import Service, service_of
from heddle_server.api.upload import Upload, read_upload
from heddle_server.messages import ModelCard

UPLOAD_PATH = "/v1/adapters"

router = APIRouter(prefix=UPLOAD_PATH, tags=["adapters"])


@router.post("", status_code=201)
async def upload_adapter(request: Request) -> dict[str, Any]:
    """Stores a new adapter, or a new version of one; answered when it is on disk and ready to be used."""
    service = service_of(request)
    model = service.engine.model
    if model is None:
        raise EngineUnavailable("The model is not loaded yet, so no adapter can be checked against it.")
    async with _upload_folder(service) as folder:
        upload = await read_upload(request, service.config.max_upload_bytes, folder)
        worker = asyncio.get_running_loop().run_in_executor(service.disk_worker, _store, service, model, upload)
        # Finished even when the client leaves: half a write is worth nothing to anybody.
        adapter = await asyncio.shield(worker)
    service.holds.collect_soon()
    return _card(adapter)


@router.get("")
async def list_adapters(request: Request) -> dict[str, Any]:
    """The current version of every adapter."""
    return {"object": "list", "data": [_card(adapter) for adapter in service_of(request).store.list()]}


@router.get("/{name:path}")
async def retrieve_adapter(name: str, request: Request) -> dict[str, Any]:
    """One adapter's current version, and its earlier ones."""
    service = service_of(request)
    current = service.store.resolve(name)
    loop = asyncio.get_running_loop()
    versions = await loop.run_in_executor(service.disk_worker, service.store.versions, name)
    return {**_card(current), "versions": [_card(version) for version in versions]}


@router.delete("/{name:path}")
async def delete_adapter(name: str, request: Request) -> dict[str, Any]:
    """No new request gets the adapter; running ones finish on it."""
    service = service_of(request)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(service.disk_worker, service.store.delete, name)
    service.holds.collect_soon()
    return {"id": name, "object": "adapter.deleted", "deleted": True}


@asynccontextmanager
async def _upload_folder(service: Service) -> AsyncGenerator[Path, None]:
    """The store's folder for one upload, made and removed off the event loop: dropping a gigabyte takes a while."""
    manager = service.store.upload_folder()
    folder = await asyncio.to_thread(manager.__enter__)
    try:
        yield folder
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


def _store(service: Service, model: ModelCard, upload: Upload) -> AdapterVersion:
    """Checks an upload to the last tensor and makes it durable; runs in the worker thread."""
    check_name(upload.name)
    if upload.name == service.model_name:
        raise InvalidAdapterName(f"{upload.name!r} is the name of the base model; choose another.", param="name")
    checkpoint = read_checkpoint(upload.config, upload.weights_path, model.layout)
    needed = checkpoint.estimate_bytes(4 if model.dtype == "float32" else 2)
    if needed > model.pool_bytes:
        raise AdapterIncompatible(
            f"{WEIGHTS_FILE} needs {needed} bytes of the page pool, which has {model.pool_bytes}; "
            "start the server with a larger --pool-bytes.",
            param=WEIGHTS_FILE,
        )
    return service.store.put(upload.name, checkpoint, upload.config, upload.weights_path)


def _card(adapter: AdapterVersion) -> dict[str, Any]:
    return {
        "id": adapter.name,
        "object": "adapter",
        "name": adapter.name,
        "version": adapter.version,
        "digest": adapter.digest,
        "method": adapter.method,
        "rank": adapter.max_rank,
        "size_bytes": adapter.size_bytes,
        "created": adapter.created_unix_seconds,
    }
