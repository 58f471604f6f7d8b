"""Is the process alive, can it serve, which heddle is it, and what has it counted."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from heddle_server.api.errors import EngineUnavailable, error_response
from heddle_server.api.service import service_of
from heddle_server.version import heddle_version

router = APIRouter(tags=["health"])


@router.get("/livez")
async def live() -> dict[str, str]:
    """200 as long as the event loop turns."""
    return {"status": "ok"}


@router.get("/readyz")
@router.get("/health", name="health")
async def ready(request: Request) -> Response:
    """200 when requests can be answered, 503 while the engine loads or restarts."""
    if service_of(request).is_ready:
        return JSONResponse({"status": "ready"})
    # Not raised: a probe that waits is no error to count.
    return error_response(EngineUnavailable("The model is not ready: it is loading or restarting."))


@router.get("/version")
async def version() -> dict[str, str]:
    """Which heddle this is."""
    return {"version": heddle_version()}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
