"""GET /: the playground, a page of plain files that asks the public API and nothing else."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
_ICON = "icon.svg"
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Read once: a name from a URL is only ever looked up here, and never becomes a path.
_PARTS = {file.name: file for file in sorted(_FOLDER.iterdir()) if file.suffix in _MEDIA_TYPES}
_HEADERS = {
    "cache-control": "no-cache",  # a new heddle brings a new page
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@router.get("/")
async def page() -> FileResponse:
    """The page itself."""
    return FileResponse(_FOLDER / _INDEX, media_type="text/html", headers=_HEADERS)


@router.get("/page/{name}")
async def part(name: str) -> FileResponse:
    """A script, a style sheet or a picture of the page."""
    if name not in _PARTS:
        raise HTTPException(404)
    file = _PARTS[name]
    return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=_HEADERS)


@router.get("/favicon.ico")
async def icon() -> FileResponse:
    """Browsers ask for one unasked."""
    return await part(_ICON)
