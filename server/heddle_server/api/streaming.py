"""Answers over HTTP: server-sent events or one JSON body, and in both an end as soon as the client is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from heddle_server.api.errors import envelope
from heddle_server.api.generation import Generation
from heddle_server.api.replies import Reply

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]
_DONE = b"data: [DONE]\n\n"


async def whole_reply(generation: Generation, reply: Reply, receive: Receive) -> Response:
    """Answers a request that does not stream."""
    with generation:
        content = await until_disconnect(receive, _collect(generation, reply))
    return Response(msgspec.json.encode(content), media_type="application/json")


class EventStream(Response):
    """Answers a request that streams: one event per increment, errors after the 200 as an event too."""

    def __init__(self, generation: Generation, reply: Reply) -> None:
        self.status_code = 200
        self.background = None
        self._generation = generation
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Nobody is left to tell, and nothing to answer: the 200 is long out.
        with self._generation, suppress(ClientDisconnect):
            await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": _HEADERS})
        async with aclosing(_events(self._generation, self._reply)) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled with `ClientDisconnect` when the client goes away first."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collect(generation: Generation, reply: Reply) -> dict[str, Any]:
    return reply.whole([delta async for delta in generation.deltas()])


async def _events(generation: Generation, reply: Reply) -> AsyncGenerator[bytes, None]:
    try:
        for chunk in reply.opening():
            yield _event(chunk)
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                # Tokens that are a piece of a character or of a possible stop string say nothing yet.
                if delta.text or delta.logprobs or delta.finish_reason:
                    yield _event(reply.chunk(delta))
        for chunk in reply.closing():
            yield _event(chunk)
    except Exception as error:
        log.warning("A stream ended with an error: %s", error)
        yield _event(envelope(error))
    yield _DONE


def _event(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
