"""GET /openapi.json, and /docs: Swagger UI over it, to look at the API and to try it, without a file from elsewhere.

Swagger UI's own two files are those of the package fastapi-offline, of which nothing else is used.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent / "docs"
_BUNDLE = Path(str(files("fastapi_offline"))) / "static"
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
# A name from a URL is only ever looked up here, and never becomes a path.
_PARTS = {
    "viewer.js": _FOLDER / "viewer.js",
    "swagger-ui-bundle.js": _BUNDLE / "swagger-ui-bundle.js",
    "swagger-ui.css": _BUNDLE / "swagger-ui.css",
}
_HEADERS = {
    "cache-control": "no-cache",  # a new heddle brings a new page
    # The style sheet has its pictures in it.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@router.get("/openapi.json")
async def api_document(request: Request) -> Response:
    """What all routes take and answer."""
    return Response(request.app.state.api_document, media_type="application/json")


@router.get("/docs")
async def docs() -> FileResponse:
    """The page itself."""
    return FileResponse(_FOLDER / "index.html", media_type="text/html", headers=_HEADERS)


@router.get("/docs/{name}")
async def docs_part(name: str) -> FileResponse:
    """A script or a style sheet of the page."""
    if name not in _PARTS:
        raise HTTPException(404)
    file = _PARTS[name]
    return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=_HEADERS)
