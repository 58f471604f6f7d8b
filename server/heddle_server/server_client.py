"""Asks a running server in JSON on behalf of the command line, and reads its streams.

Standard library only, so that a command starts at once.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from heddle_server.server_address import ServerAddress, ServerError, printable

Json = dict[str, Any]


class ServerClient:
    """One server. Every method raises `ServerError`; all may be called from several threads at once."""

    def __init__(self, server: str, api_key: str | None = None, *, timeout_seconds: float = 600.0) -> None:
        """`server` is a URL, or host and port; a path in it is put before the API's own."""
        self._server = ServerAddress.of(server)
        self.address = self._server.url
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._timeout_seconds = timeout_seconds

    def get(self, path: str) -> Json:
        return self._whole("GET", path, None)

    def get_text(self, path: str) -> str:
        with self._answer("GET", path, None) as response:
            return response.read().decode("utf-8", "replace")

    def post(self, path: str, body: Mapping[str, object]) -> Json:
        return self._whole("POST", path, body)

    def stream(self, path: str, body: Mapping[str, object]) -> Generator[Json, None, None]:
        """The answer's events as they come. Who stops early closes the connection, and the server its request."""
        with self._answer("POST", path, {**body, "stream": True}) as response:
            while line := response.readline():
                if not line.startswith(b"data: "):  # between events, or a comment that keeps the connection alive
                    continue
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(_message(event) or "the server ended the answer with an error.")
                yield event
        raise ServerError(f"the answer of {self.address} was cut off.")

    def _whole(self, method: str, path: str, body: Mapping[str, object] | None) -> Json:
        with self._answer(method, path, body) as response:
            content: Json = json.load(response)
            return content

    @contextmanager
    def _answer(self, method: str, path: str, body: Mapping[str, object] | None) -> Iterator[http.client.HTTPResponse]:
        """The response with status 200, its body still to be read."""
        with self._server.connection(self._timeout_seconds) as connection:
            try:
                content = None if body is None else json.dumps(body)
                headers = {**self._headers, **({} if body is None else {"content-type": "application/json"})}
                connection.request(method, self._server.prefix + path, content, headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise ServerError(self._refusal(response))
                yield response
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ServerError(f"the answer of {self.address} was cut off ({printable(error)}).") from None

    def _refusal(self, response: http.client.HTTPResponse) -> str:
        try:
            message = _message(json.load(response))
        except ValueError:
            message = None
        return message or f"{self.address} answers HTTP {response.status}; is it a heddle server?"


def _message(content: object) -> str | None:
    """Of an error's envelope."""
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return printable(message) if isinstance(message, str) else None
