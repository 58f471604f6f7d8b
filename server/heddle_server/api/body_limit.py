"""Bodies are counted before anything parses them."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heddle_server.api.errors import BodyTooLarge, InvalidRequest, UnsupportedEncoding, error_response

# A refusal sent to a client that is still sending reaches it as a reset connection: so much is read for it first.
MAX_DISCARDED_BYTES = 32 << 20


class BodyLimit:
    """Reads a request's body up to a limit and hands it on whole.

    Paths in `streamed_paths` read and count their own bodies, which are too large to hold.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, streamed_paths: Collection[str]) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.streamed_paths = streamed_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # A few compressed bytes can unpack to any size.
        is_compressed = Headers(scope=scope).get("content-encoding", "identity") != "identity"
        if scope["path"] in self.streamed_paths and not is_compressed:
            return await self.app(scope, receive, send)
        messages = await _read(receive, self.max_bytes)
        if is_compressed:
            return await self._refuse(
                UnsupportedEncoding("Compressed bodies are not accepted. Send it without Content-Encoding."),
                scope,
                send,
            )
        if messages is None:
            return await self._refuse(
                BodyTooLarge(f"The body is over this server's limit of {self.max_bytes} bytes."), scope, send
            )
        return await self.app(scope, _replayed(messages, receive), send)

    async def _refuse(self, error: InvalidRequest, scope: Scope, send: Send) -> None:
        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        await error_response(error)(scope, nothing, send)


async def _read(receive: Receive, max_bytes: int) -> list[Message] | None:
    """The messages of a body; None for one over the limit, of which a part is read and dropped."""
    messages: list[Message] = []
    size = 0
    while size <= max_bytes + MAX_DISCARDED_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if size <= max_bytes:
            messages.append(message)
        if not message.get("more_body", False):
            break
    return messages if size <= max_bytes else None


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def next_message() -> Message:
        message = next(waiting, None)
        return await receive() if message is None else message

    return next_message
