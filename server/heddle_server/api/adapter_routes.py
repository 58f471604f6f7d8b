"""/v1/adapters: upload, try, list, look at, change and delete adapters while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.convertors import PathConvertor, register_url_convertor

from heddle_adapters.names import ALIAS, PART
from heddle_adapters.store_index import AdapterRecord, AdapterVersion
from heddle_server.api.actor import Acting, Actor, actor_of
from heddle_server.api.adapter_protocol import AdapterChanges, AliasTarget, ListQuery
from heddle_server.api.errors import RateLimitExceeded
from heddle_server.api.principal import principal_of
from heddle_server.api.registry import disk_errors
from heddle_server.api.service import Service, service_of
from heddle_server.api.upload import Upload, UploadBounds, discard, read_upload

UPLOAD_PATH = "/v1/adapters"
VALIDATE_ROUTE = "/validate"
STREAMED_PATHS = frozenset({UPLOAD_PATH, UPLOAD_PATH + VALIDATE_ROUTE})  # they count their own bodies


class _ReferenceConvertor(PathConvertor):
    """Names may contain a slash; what lies under a name is no name, so that another method on it is a 405."""

    regex = "(?!.*/versions$)(?!.*/aliases/).*"


register_url_convertor("reference", _ReferenceConvertor())

# For the description only: what breaks a pattern is told by the store.
Name = Annotated[str, Path(description="sql or team/sql.", json_schema_extra={"pattern": f"^(?:{PART}/)?{PART}$"})]
Reference = Annotated[
    str, Path(description="A name, or one of its versions: sql, team/sql@3, sql@prod, sql@sha256:...")
]
Alias = Annotated[str, Path(description="As in sql@prod.", json_schema_extra={"pattern": f"^{ALIAS.pattern}$"})]

router = APIRouter(prefix=UPLOAD_PATH, tags=["adapters"])


@router.post("", status_code=201)
async def upload_adapter(request: Request, response: Response, actor: Acting) -> dict[str, Any]:
    """Stores a new adapter, or a new version of one; answered when it is on disk and ready to be used.

    200 instead of 201 where the name's newest version has this very content already.

        curl localhost:8000/v1/adapters -F name=sql -F adapter_config.json=@sql/adapter_config.json \\
          -F adapter_model.safetensors=@sql/adapter_model.safetensors
    """
    service = service_of(request)
    async with _received(request, service, actor) as upload:
        version, is_new = await service.registry.upload(upload, actor)
    response.status_code = 201 if is_new else 200
    return {**service.cards.of_upload(version), "is_new_version": is_new}


@router.post(VALIDATE_ROUTE)
async def validate_adapter(request: Request, actor: Acting) -> dict[str, Any]:
    """Everything an upload does, except that nothing is stored; says what memory the adapter would take.

        curl localhost:8000/v1/adapters/validate -F adapter_config.json=@sql/adapter_config.json \\
          -F adapter_model.safetensors=@sql/adapter_model.safetensors
    """
    service = service_of(request)
    async with _received(request, service, actor) as upload:
        validation = await service.registry.validate(upload, actor)
    return service.cards.of_validation(validation, service.registry.room)


@router.get("")
async def list_adapters(request: Request, query: Annotated[ListQuery, Query()]) -> dict[str, Any]:
    """What every name means to the asker now, own adapters and public ones, by name, page by page."""
    service, tenant = service_of(request), actor_of(request, query.owner).owner
    records = _in_order(service.store.visible_to(tenant), query)
    matching = (record for record in records if _matches(service, record, query))
    page = list(islice(matching, query.limit + 1))
    data = [service.cards.of_record(record) for record in page[: query.limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(page) > query.limit,
    }


@router.get("/{name:path}/versions")
async def list_versions(name: Name, request: Request, actor: Acting) -> dict[str, Any]:
    """The versions of one adapter that still exist, oldest first."""
    service = service_of(request)
    record = service.store.record(name, actor.owner)
    return {"object": "list", "data": [service.cards.of_version(version, record) for version in record.versions]}


@router.put("/{name:path}/aliases/{alias:path}")
async def set_alias(name: Name, alias: Alias, body: AliasTarget, request: Request, actor: Acting) -> dict[str, Any]:
    """Makes an alias mean another version, for every request from now on; tells what it meant before."""
    version, previous = await service_of(request).registry.set_alias(name, alias, body.selector, actor)
    return {**_alias("adapter.alias", alias, version), "previous": previous and _identity(previous)}


@router.delete("/{name:path}/aliases/{alias:path}")
async def remove_alias(name: Name, alias: Alias, request: Request, actor: Acting) -> dict[str, Any]:
    """Makes an alias mean nothing."""
    version = await service_of(request).registry.remove_alias(name, alias, actor)
    return {**_alias("adapter.alias.deleted", alias, version), "deleted": True}


@router.get("/{name:reference}")
async def retrieve_adapter(name: Reference, request: Request, actor: Acting) -> dict[str, Any]:
    """One adapter: what its name means now, or the version that the reference picks."""
    return service_of(request).cards.of_reference(name, actor.owner)


@router.patch("/{name:reference}")
async def change_adapter(name: Name, body: AdapterChanges, request: Request, actor: Acting) -> dict[str, Any]:
    """Changes what is said about a name: description, tags, pin, time to live, visibility. Versions never change."""
    service = service_of(request)
    return service.cards.of_record(await service.registry.update(name, body.details, actor))


@router.delete("/{name:reference}")
async def delete_adapter(name: Reference, request: Request, actor: Acting) -> dict[str, Any]:
    """No new request gets the adapter, or the version that the reference picks; running ones finish on it."""
    deletion = await service_of(request).registry.delete(name, actor)
    return {
        "id": name,
        "object": "adapter.deleted",
        "deleted": True,
        "versions": [_identity(version) for version in deletion.versions],
        "draining": deletion.num_draining,
    }


@asynccontextmanager
async def _received(request: Request, service: Service, actor: Actor) -> AsyncGenerator[Upload, None]:
    """The upload in a request, on the store's own disk until the end of the block.

    The folder is made and removed off the event loop: dropping a gigabyte takes a while.
    """
    _ = service.registry.room  # without a model nothing can be checked: said before a gigabyte is read
    bounds = UploadBounds(service.config.max_upload_bytes, service.keys.limits_of(actor.owner).stored_bytes)
    try:
        place = service.upload_places.take(principal_of(request))
    except RateLimitExceeded:
        await discard(request.stream())
        raise
    manager = service.store.upload_folder()
    with place, disk_errors():
        folder: FilePath = await asyncio.to_thread(manager.__enter__)
        try:
            yield await read_upload(request, bounds, folder)
        finally:
            await asyncio.to_thread(manager.__exit__, None, None, None)


def _in_order(records: Sequence[AdapterRecord], query: ListQuery) -> list[AdapterRecord]:
    """Every record, of these in order, after the page before, in the order asked for."""
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
        and (query.visibility is None or query.visibility == record.visibility)
    )


def _alias(kind: str, alias: str, version: AdapterVersion) -> dict[str, Any]:
    return {"object": kind, "name": version.name, "alias": alias, **_identity(version)}


def _identity(version: AdapterVersion) -> dict[str, Any]:
    return {"version": version.version, "digest": version.digest}
