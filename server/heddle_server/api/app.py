"""The HTTP application: routes, middleware, and every error in one envelope."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from heddle_adapters.errors import AdapterError
from heddle_server.api import (
    adapter_routes,
    cache_routes,
    chat_routes,
    docs_routes,
    embedding_routes,
    health_routes,
    model_routes,
    page_routes,
    responses_routes,
    token_routes,
)
from heddle_server.api.authentication import Authentication
from heddle_server.api.body_limit import BodyLimit
from heddle_server.api.errors import ApiError, error_response, http_error_response, kind_of
from heddle_server.api.openapi import openapi_document
from heddle_server.api.request_id import RequestId
from heddle_server.api.service import Service, service_of
from heddle_server.api.validation import invalid_body

ROUTERS = [
    routes.router
    for routes in (
        chat_routes,
        responses_routes,
        token_routes,
        embedding_routes,
        model_routes,
        adapter_routes,
        cache_routes,
        health_routes,
        docs_routes,
        page_routes,
    )
]


def create_app(service: Service) -> FastAPI:
    """The app that serves `service`, which runs as long as the app does."""
    app = FastAPI(
        openapi_url=None,  # FastAPI's viewers load their scripts from a CDN; `docs_routes` has one that does not
        lifespan=_lifespan,
        middleware=[
            Middleware(RequestId),
            Middleware(Authentication, service=service),
            Middleware(
                BodyLimit, max_bytes=service.config.max_body_bytes, streamed_paths=adapter_routes.STREAMED_PATHS
            ),
        ],
        exception_handlers={
            ApiError: _typed_error,
            AdapterError: _typed_error,
            RequestValidationError: _invalid_body,
            HTTPException: _framework_error,
            ClientDisconnect: _client_gone,
            Exception: _typed_error,
        },
    )
    app.state.service = service
    app.state.api_document = _encoded_api_document()
    for router in ROUTERS:
        app.include_router(router)
    return app


def api_document() -> dict[str, Any]:
    """What `/openapi.json` says, the same for every server."""
    return openapi_document([route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)])


@cache
def _encoded_api_document() -> bytes:
    return msgspec.json.encode(api_document())


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with app.state.service:
        yield


async def _typed_error(request: Request, error: Exception) -> Response:
    service_of(request).metrics.count_error(kind_of(error).code)
    return error_response(error)


async def _invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _typed_error(request, invalid_body(error.errors()))


async def _framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return http_error_response(404, f"There is no {request.method} {_path(request)} here.")
    if error.status_code == 405:
        headers = {"allow": ", ".join(_methods(request))}
        return http_error_response(405, f"{request.method} is not allowed on {_path(request)}.", headers)
    return http_error_response(error.status_code, f"{error.detail}.", error.headers)


def _methods(request: Request) -> list[str]:
    """Those that a path has, of whichever route; the framework knows of the first only."""
    routes = iter_route_contexts(request.app.routes)
    matching = (route for route in routes if route.matches(request.scope)[0] != Match.NONE)
    return sorted({method for route in matching for method in route.methods or ()})


def _path(request: Request) -> str:
    """As it was sent, so that no character in it is a control character."""
    raw: bytes = request.scope["raw_path"]
    return raw[:200].decode("latin-1")


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody is left to read it
