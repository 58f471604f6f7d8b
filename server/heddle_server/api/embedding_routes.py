"""POST /v1/embeddings: a clear no, for clients that try."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from heddle_server.api.errors import NotServed

router = APIRouter(tags=["generation"])


@router.post("/v1/embeddings", include_in_schema=False)
async def create_embeddings() -> Response:
    """Refuses, whatever is sent."""
    raise NotServed("This server generates text and has no embeddings: its base was trained to go on from a text.")
