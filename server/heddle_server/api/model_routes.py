"""GET /v1/models: the base and, as models of their own, its adapters: each by name, which means its latest version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from heddle_adapters.errors import AdapterNotFound
from heddle_adapters.store_index import AdapterVersion
from heddle_server.api.admission import BASE_NAME
from heddle_server.api.service import Service, service_of

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Everything `model` can name."""
    service = service_of(request)
    adapters = [_adapter_model(service, record.name, record.latest) for record in service.store.list()]
    return {"object": "list", "data": [_base_model(service, service.model_name), *adapters]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """One model; the base answers to its own name and to `base`, an adapter to every reference."""
    service = service_of(request)
    if name in (BASE_NAME, service.model_name):
        return _base_model(service, name)
    try:
        return _adapter_model(service, name, service.store.resolve(name))
    except AdapterNotFound as error:
        raise service.admission.model_not_found(name, error.nearest) from None


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
    }


def _adapter_model(service: Service, name: str, adapter: AdapterVersion) -> dict[str, Any]:
    return {
        **_base_model(service, name),
        "created": adapter.created_unix_seconds,
        "root": adapter.digest,
        "parent": service.model_name,
    }
