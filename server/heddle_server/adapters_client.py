"""Asks a server's /v1/adapters on behalf of the command line.

Standard library only, so that a command starts at once.
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from heddle_server.server_address import ServerAddress, ServerError, printable

ADAPTERS_PATH = "/v1/adapters"
FILES = ("adapter_config.json", "adapter_model.safetensors")
TIMEOUT_SECONDS = 600.0  # a gigabyte is checked to its last number, behind others that are
CHUNK_BYTES = 1 << 20
MAX_PAGE = 1000


class AdaptersClient:
    """One server. Every method raises `ServerError`."""

    def __init__(self, server: str, api_key: str | None = None) -> None:
        """`server` is a URL, or host and port; a path in it is put before the API's own."""
        self._server = ServerAddress.of(server)
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._prefix = self._server.prefix + ADAPTERS_PATH

    def push(
        self,
        folder: Path,
        texts: Mapping[str, str],
        *,
        is_dry_run: bool = False,
        on_sent: Callable[[int], None] = lambda num_bytes: None,
    ) -> dict[str, Any]:
        """Uploads the two files in `folder` with the small parts `texts`; the card, or the report of a dry run.

        The files are streamed; `on_sent` is told how many bytes went out at a time.
        """
        boundary = secrets.token_hex(16)
        parts = [(name, text.encode()) for name, text in texts.items()]
        files = [(name, folder / name) for name in FILES]
        heads = {name: _head(boundary, name) for name, _ in (*parts, *files)}
        tail = f"--{boundary}--\r\n".encode()

        def body() -> Iterator[bytes]:
            for name, value in parts:
                yield heads[name] + value + b"\r\n"
            for name, path in files:
                yield heads[name]
                with path.open("rb") as file:
                    while chunk := file.read(CHUNK_BYTES):
                        yield chunk
                        on_sent(len(chunk))
                yield b"\r\n"
            yield tail

        values = sum(len(value) for _, value in parts) + sum(path.stat().st_size for _, path in files)
        size = values + sum(len(head) + 2 for head in heads.values()) + len(tail)
        headers = {"content-type": f"multipart/form-data; boundary={boundary}", "content-length": str(size)}
        return self._ask("POST", "/validate" if is_dry_run else "", body(), headers)

    def cards(self, filters: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Every adapter that passes the filters, page by page."""
        query = {**filters, "limit": str(MAX_PAGE)}
        while True:
            page = self._ask("GET", f"?{urlencode(query)}")
            yield from page["data"]
            if not page["has_more"]:
                return
            query["after"] = page["data"][-1]["name"]

    def card(self, reference: str) -> dict[str, Any]:
        return self._ask("GET", _path(reference))

    def versions(self, name: str) -> list[dict[str, Any]]:
        versions: list[dict[str, Any]] = self._ask("GET", _path(name) + "/versions")["data"]
        return versions

    def change(self, name: str, *, owner: str | None = None, **changes: object) -> dict[str, Any]:
        """Of another `owner` than the key's own with an admin's key only."""
        query = "" if owner is None else f"?{urlencode({'owner': owner})}"
        return self._send("PATCH", _path(name) + query, changes)

    def set_alias(self, name: str, alias: str, target: str) -> dict[str, Any]:
        return self._send("PUT", f"{_path(name)}/aliases/{quote(alias, safe='')}", {"target": target})

    def remove_alias(self, name: str, alias: str) -> dict[str, Any]:
        return self._ask("DELETE", f"{_path(name)}/aliases/{quote(alias, safe='')}")

    def delete(self, reference: str) -> dict[str, Any]:
        return self._ask("DELETE", _path(reference))

    def _send(self, method: str, path: str, content: Mapping[str, object]) -> dict[str, Any]:
        body = json.dumps(content).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        return self._ask(method, path, (body,), headers)

    def _ask(
        self, method: str, path: str, body: Iterable[bytes] = (), headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        with self._server.connection(TIMEOUT_SECONDS) as connection:
            try:
                return self._read(self._exchange(connection, method, self._prefix + path, body, headers or {}))
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"the answer of {self._server.url} was cut off ({error!r}).") from None

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Iterable[bytes],
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        connection.putrequest(method, path)
        for name, value in {**self._headers, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        for chunk in body:
            try:
                connection.send(chunk)
            except (BrokenPipeError, ConnectionResetError):  # refused before all was sent: the answer says why
                break
        return connection.getresponse()

    def _read(self, response: http.client.HTTPResponse) -> dict[str, Any]:
        try:
            content = json.loads(response.read())
        except ValueError:
            content = None
        if response.status in (200, 201) and isinstance(content, dict):
            return content
        error = content.get("error") if isinstance(content, dict) else None
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            hint = " Give it with --api-key or HEDDLE_API_KEY." if error.get("code") == "missing_api_key" else ""
            raise ServerError(printable(error["message"]) + hint)
        raise ServerError(f"{self._server.url} answers HTTP {response.status}; is it a heddle server?")


def _head(boundary: str, name: str) -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()


def _path(reference: str) -> str:
    return "/" + quote(reference, safe="/@:")
