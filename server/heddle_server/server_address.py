"""Where a running server is, as people write it on the command line."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit


class ServerError(Exception):
    """What the server refused, or why it could not be asked: one line for people."""


@dataclass(frozen=True)
class ServerAddress:
    """One server's."""

    url: str  # as it is told: scheme, host and port
    is_tls: bool
    host: str
    port: int | None
    prefix: str  # a path that comes before the API's own

    @classmethod
    def of(cls, server: str) -> Self:
        """From a URL, or host and port; a trailing /v1 is the API's own. Raises `ServerError`."""
        url = urlsplit(server if "://" in server else f"http://{server}")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ServerError(f"{printable(server)} is no server's address; write for example http://127.0.0.1:8000.")
        try:
            port = url.port
        except ValueError as error:
            raise ServerError(f"{printable(server)} is no server's address: {error}.") from None
        prefix = url.path.rstrip("/").removesuffix("/v1")
        return cls(f"{url.scheme}://{url.netloc}", url.scheme == "https", url.hostname, port, prefix)

    @contextmanager
    def connection(self, timeout_seconds: float) -> Iterator[http.client.HTTPConnection]:
        """An open one, until the end of the block; raises `ServerError`."""
        connect = http.client.HTTPSConnection if self.is_tls else http.client.HTTPConnection
        with closing(connect(self.host, self.port, timeout=timeout_seconds)) as connection:
            try:
                connection.connect()
            except OSError as error:
                raise ServerError(
                    f"no heddle server answers at {self.url} ({error.strerror or error}). Start one with "
                    "`heddle serve MODEL`, or name it with --server."
                ) from None
            yield connection


def printable(value: object) -> str:
    """Text from elsewhere without what would move the terminal's cursor or change its colours."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(value))
