"""`x-request-id`: the client's own label, or one made here, on every reply but one to an unforeseen error.

With it goes `openai-processing-ms`, the time until the reply began.
"""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LABEL = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """A label for logs and clients only; the server's own ids of requests are never the client's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        label = given if _LABEL.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = label
        started = time.monotonic()

        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = label
                headers["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
            await send(message)

        return await self.app(scope, receive, send_labelled)
