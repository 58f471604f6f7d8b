"""GET /: the page that asks the base and its adapters side by side, and the two files it is made of."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent / "page"
_HEADERS = {
    "cache-control": "no-cache",  # a new heddle brings a new page
    "content-security-policy": "default-src 'self'",
}


@router.get("/")
async def page() -> FileResponse:
    """The page itself."""
    return _file("index.html", "text/html")


@router.get("/page/page.js")
async def script() -> FileResponse:
    """What it does."""
    return _file("page.js", "text/javascript")


@router.get("/page/page.css")
async def style() -> FileResponse:
    """How it looks."""
    return _file("page.css", "text/css")


@router.get("/favicon.ico")
async def icon() -> Response:
    """Browsers ask for one unasked, and would show a 404 as an error."""
    return Response(status_code=204)


def _file(name: str, media_type: str) -> FileResponse:
    return FileResponse(_FOLDER / name, media_type=media_type, headers=_HEADERS)
