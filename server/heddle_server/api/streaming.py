"""Answers over HTTP: server-sent events or one JSON body, and in both an end as soon as the client is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from heddle_server.api.generation import Answer, Delta

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Headers = dict[str, str]
Json = dict[str, Any]

KEEP_ALIVE_SECONDS = 5.0  # between two signs of life: proxies take a silent connection for a dead one
UNREAD_SECONDS = 60.0  # that a client may leave what was sent to it lying
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the events otherwise
}
_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


class SentReply(Protocol):
    """What makes an answer's JSON: the whole of it, or the events of its stream."""

    has_named_events: bool  # each by its `type`, the last one ending the stream; otherwise [DONE] ends it

    def take(self, number: int, delta: Delta) -> None: ...

    def whole(self) -> Json: ...

    def final_headers(self) -> Headers: ...

    def opening(self) -> Iterable[Json]: ...

    def chunks(self, number: int, delta: Delta) -> Iterable[Json]: ...

    def closing(self) -> Iterable[Json]: ...

    def failing(self, error: Exception) -> Iterable[Json]: ...


async def whole_reply(answer: Answer, reply: SentReply, receive: Receive, headers: Headers) -> Response:
    """Answers a request that does not stream."""
    with answer:
        content = await until_disconnect(receive, _collect(answer, reply))
    headers = {**headers, **reply.final_headers()}
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")


class EventStream(Response):
    """Answers a request that streams: one event per increment, errors after the 200 as an event too."""

    def __init__(self, answer: Answer, reply: SentReply, headers: Headers) -> None:
        self.status_code = 200
        self.background = None
        self._answer = answer
        self._reply = reply
        self._all_headers = {**_HEADERS, **headers}
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Nobody is left to tell, and nothing to answer: the 200 is long out.
        with self._answer, suppress(ClientDisconnect):
            await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in self._all_headers.items()]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        self._last_sent = time.monotonic()
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        try:
            async with aclosing(_events(self._answer, self._reply)) as events:
                async for event in events:
                    await self._say(send, event)
        finally:
            keeping_alive.cancel()
            await asyncio.gather(keeping_alive, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """A comment, which clients skip, whenever nothing was said for a while, as in a queue."""
        while True:
            silent_seconds = time.monotonic() - self._last_sent
            if silent_seconds >= KEEP_ALIVE_SECONDS:
                await self._say(send, _KEEP_ALIVE)
                silent_seconds = 0.0
            await asyncio.sleep(KEEP_ALIVE_SECONDS - silent_seconds)

    async def _say(self, send: Send, part: bytes) -> None:
        """A client that does not read is gone: else it would keep its place in the server as long as it likes."""
        try:
            async with asyncio.timeout(UNREAD_SECONDS):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except TimeoutError:
            raise ClientDisconnect from None
        self._last_sent = time.monotonic()


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


async def _collect(answer: Answer, reply: SentReply) -> Json:
    async with aclosing(answer.deltas()) as deltas:
        async for number, delta in deltas:
            reply.take(number, delta)
    return reply.whole()


async def _events(answer: Answer, reply: SentReply) -> AsyncGenerator[bytes, None]:
    event = _named_event if reply.has_named_events else _event
    try:
        for content in reply.opening():
            yield event(content)
        async with aclosing(answer.deltas()) as deltas:
            async for number, delta in deltas:
                for content in reply.chunks(number, delta):
                    yield event(content)
        for content in reply.closing():
            yield event(content)
    except Exception as error:
        log.warning("A stream ended with an error: %s", error)
        for content in reply.failing(error):
            yield event(content)
    if not reply.has_named_events:
        yield _DONE


def _named_event(content: Json) -> bytes:
    return f"event: {content['type']}\n".encode() + _event(content)


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
