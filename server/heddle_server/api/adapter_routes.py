"""/v1/adapters: upload, try, list, look at, change and delete adapters while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from heddle_adapters.store_index import AdapterRecord, AdapterVersion
from heddle_server.api.adapter_protocol import AdapterChanges, AliasTarget, ListQuery
from heddle_server.api.registry import disk_errors
from heddle_server.api.service import Service, service_of
from heddle_server.api.upload import Upload, read_upload

UPLOAD_PATH = "/v1/adapters"
VALIDATE_ROUTE = "/validate"
STREAMED_PATHS = frozenset({UPLOAD_PATH, UPLOAD_PATH + VALIDATE_ROUTE})  # they count their own bodies

router = APIRouter(prefix=UPLOAD_PATH, tags=["adapters"])


@router.post("", status_code=201)
async def upload_adapter(request: Request, response: Response) -> dict[str, Any]:
    """Stores a new adapter, or a new version of one; answered when it is on disk and ready to be used.

    200 instead of 201 where the name's newest version has this very content already.
    """
    service = service_of(request)
    async with _received(request, service) as upload:
        version, is_new = await service.registry.upload(upload)
    response.status_code = 201 if is_new else 200
    return {**service.cards.of_upload(version), "is_new_version": is_new}


@router.post(VALIDATE_ROUTE)
async def validate_adapter(request: Request) -> dict[str, Any]:
    """Everything an upload does, except that nothing is stored; says what memory the adapter would take."""
    service = service_of(request)
    async with _received(request, service) as upload:
        validation = await service.registry.validate(upload)
    return service.cards.of_validation(validation, service.registry.room)


@router.get("")
async def list_adapters(request: Request, query: Annotated[ListQuery, Query()]) -> dict[str, Any]:
    """What every name means now, by name, page by page."""
    service = service_of(request)
    matching = (record for record in _in_order(service, query) if _matches(service, record, query))
    page = list(islice(matching, query.limit + 1))
    data = [service.cards.of_record(record) for record in page[: query.limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(page) > query.limit,
    }


# Names may contain a slash, so the longer paths stand before those that take everything.


@router.get("/{name:path}/versions")
async def list_versions(name: str, request: Request) -> dict[str, Any]:
    """The versions of one adapter that still exist, oldest first."""
    service = service_of(request)
    record = service.store.record(name)
    return {"object": "list", "data": [service.cards.of_version(version, record) for version in record.versions]}


@router.put("/{name:path}/aliases/{alias}")
async def set_alias(name: str, alias: str, body: AliasTarget, request: Request) -> dict[str, Any]:
    """Makes an alias mean another version, for every request from now on; tells what it meant before."""
    version, previous = await service_of(request).registry.set_alias(name, alias, body.selector)
    return {**_alias("adapter.alias", alias, version), "previous": previous and _identity(previous)}


@router.delete("/{name:path}/aliases/{alias}")
async def remove_alias(name: str, alias: str, request: Request) -> dict[str, Any]:
    """Makes an alias mean nothing."""
    version = await service_of(request).registry.remove_alias(name, alias)
    return {**_alias("adapter.alias.deleted", alias, version), "deleted": True}


@router.get("/{reference:path}")
async def retrieve_adapter(reference: str, request: Request) -> dict[str, Any]:
    """One adapter: what its name means now, or the version that the reference picks."""
    return service_of(request).cards.of_reference(reference)


@router.patch("/{name:path}")
async def change_adapter(name: str, body: AdapterChanges, request: Request) -> dict[str, Any]:
    """Changes what is said about a name: description, tags, pin, time to live. Versions never change."""
    service = service_of(request)
    return service.cards.of_record(await service.registry.update(name, body.details))


@router.delete("/{reference:path}")
async def delete_adapter(reference: str, request: Request) -> dict[str, Any]:
    """No new request gets the adapter, or the version that the reference picks; running ones finish on it."""
    deletion = await service_of(request).registry.delete(reference)
    return {
        "id": reference,
        "object": "adapter.deleted",
        "deleted": True,
        "versions": [_identity(version) for version in deletion.versions],
        "draining": deletion.num_draining,
    }


@asynccontextmanager
async def _received(request: Request, service: Service) -> AsyncGenerator[Upload, None]:
    """The upload in a request, on the store's own disk until the end of the block.

    The folder is made and removed off the event loop: dropping a gigabyte takes a while.
    """
    _ = service.registry.room  # without a model nothing can be checked: said before a gigabyte is read
    manager = service.store.upload_folder()
    with disk_errors():
        folder: FilePath = await asyncio.to_thread(manager.__enter__)
        try:
            yield await read_upload(request, service.config.max_upload_bytes, folder)
        finally:
            await asyncio.to_thread(manager.__exit__, None, None, None)


def _in_order(service: Service, query: ListQuery) -> list[AdapterRecord]:
    """Every record after the page before, in the order asked for."""
    records = service.store.list()
    if query.order == "desc":
        return [record for record in reversed(records) if query.after is None or record.name < query.after]
    return [record for record in records if query.after is None or record.name > query.after]


def _matches(service: Service, record: AdapterRecord, query: ListQuery) -> bool:
    digest = record.latest.digest
    return (
        (query.q is None or query.q.lower() in record.name.lower())
        and (query.tag is None or query.tag in record.tags)
        and (query.method is None or query.method.lower() == record.latest.method.lower())
        and (query.status is None or query.status == service.cards.status_of(digest))
        and (query.tier is None or query.tier == service.engine.tier_of(digest))
        and (query.pinned is None or query.pinned == record.is_pinned)
    )


def _alias(kind: str, alias: str, version: AdapterVersion) -> dict[str, Any]:
    return {"object": kind, "name": version.name, "alias": alias, **_identity(version)}


def _identity(version: AdapterVersion) -> dict[str, Any]:
    return {"version": version.version, "digest": version.digest}
