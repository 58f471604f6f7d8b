"""/v1/models: the base and, as models of their own, its adapters: each by name, which means its latest version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from heddle_adapters.errors import AdapterNotFound
from heddle_adapters.store_index import AdapterVersion
from heddle_server.api.actor import actor_of
from heddle_server.api.admission import BASE_NAME
from heddle_server.api.errors import InvalidRequest
from heddle_server.api.principal import principal_of
from heddle_server.api.service import Service, service_of

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Everything `model` can name."""
    service = service_of(request)
    records = service.store.visible_to(principal_of(request).tenant)
    adapters = [_adapter_model(service, record.name, record.latest) for record in records]
    return {"object": "list", "data": [_base_model(service, service.model_name), *adapters]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """One model; the base answers to its own name and to `base`, an adapter to every reference."""
    service = service_of(request)
    if name in (BASE_NAME, service.model_name):
        return _base_model(service, name)
    try:
        return _adapter_model(service, name, service.store.resolve(name, principal_of(request).tenant))
    except AdapterNotFound as error:
        raise service.admission.model_not_found(name, error.nearest) from None


@router.delete("/v1/models/{name:path}")
async def delete_model(name: str, request: Request) -> dict[str, Any]:
    """What `DELETE /v1/adapters/{reference}` does, as OpenAI's clients ask for it."""
    service = service_of(request)
    if name in (BASE_NAME, service.model_name):
        raise InvalidRequest("The base is what this server was started with; only adapters can be deleted.")
    try:
        await service.registry.delete(name, actor_of(request))
    except AdapterNotFound as error:
        raise service.admission.model_not_found(name, error.nearest) from None
    return {"id": name, "object": "model", "deleted": True}


def _base_model(service: Service, name: str) -> dict[str, Any]:
    model = service.engine.model
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "heddle",
        "root": service.model_name,
        "parent": None,
        "max_model_len": model.max_model_len if model else None,
        "quantization": model.layout.quantization if model else None,
    }


def _adapter_model(service: Service, name: str, adapter: AdapterVersion) -> dict[str, Any]:
    return {
        **_base_model(service, name),
        "created": adapter.created_unix_seconds,
        "root": adapter.digest,
        "parent": service.model_name,
    }
