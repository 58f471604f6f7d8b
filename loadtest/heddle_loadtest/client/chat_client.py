"""An async streaming client for any OpenAI-compatible server. Knows HTTP; knows no load, plan or statistics.

async with ChatClient("http://127.0.0.1:8000") as client:
    result = await client.chat([{"role": "user", "content": "Hello"}], adapter="poet", on_text=print)
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from heddle_loadtest.client.answer import StreamedAnswer, read_error_body
from heddle_loadtest.client.body import CHAT_PATH, STREAM_FIELDS, request_body, request_path
from heddle_loadtest.client.result import ABANDONED, CLIENT_LIMIT, RequestError, RequestResult, describe
from heddle_loadtest.client.server_pages import ServerPages
from heddle_loadtest.client.sse import SseParser
from heddle_loadtest.client.style import Style
from heddle_loadtest.client.target import Target
from heddle_loadtest.workload.names import BASE
from heddle_loadtest.workload.schedule import ScheduledRequest

_CONNECT_TIMEOUT_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 4.0
_TAIL_SECONDS = 1.0  # that a server may hold the connection after the end of its answer
_CLIENT_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)
_JSON_HEADERS = {"Content-Type": "application/json"}


class ChatClient:
    """One server, many requests at once. Use as `async with ChatClient(...) as client`."""

    def __init__(
        self,
        target: Target | str,
        api_key: str | None = None,
        *,
        style: Style = Style.HEDDLE,
        timeout_seconds: float = 600.0,
    ) -> None:
        """A whole Target, or its address with or without the final `/v1`; the rest then counts with an address.

        `timeout_seconds` bounds each request from start to end. Raises SpecError if the address is none.
        """
        if isinstance(target, str):
            target = Target(url=target, api_key=api_key, style=style, timeout_seconds=timeout_seconds)
        self.target = target
        self._session: aiohttp.ClientSession | None = None
        self._encode = msgspec.json.Encoder().encode

    async def __aenter__(self) -> Self:
        target = self.target
        self._session = aiohttp.ClientSession(
            # aiohttp lets 100 connections through and queues the rest, which would show up as latency of the server.
            # Servers close idle connections too, some after five seconds, and lose what is on its way just then.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),  # a load balancer's cookie would send all to one replica
            headers=bearer(target.api_key),
            timeout=aiohttp.ClientTimeout(total=target.timeout_seconds, sock_connect=_CONNECT_TIMEOUT_SECONDS),
        )
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        session, self._session = self._open_session(), None
        await session.close()

    @property
    def pages(self) -> ServerPages:
        """What the server has to say beside answers: its models, its metrics."""
        return ServerPages(self.target, self._open_session())

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        adapter: str | None = None,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        scheduled_seconds: float | None = None,
    ) -> RequestResult:
        """One streamed chat request; `on_text` gets each piece of content as it arrives.

        `adapter` None or `base` asks the base model. `scheduled_seconds` is when the request was due, on the clock of
        `time.perf_counter`; now, if None. A failed request does not raise: the result's `error` says what happened.
        """
        optional_fields = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        body = {
            **self.target.style.adapter_fields(adapter or BASE, model),
            "messages": [dict(message) for message in messages],
            **STREAM_FIELDS,
            **{name: value for name, value in optional_fields.items() if value is not None},
        }
        answer = StreamedAnswer(on_text)
        started_seconds = time.perf_counter()
        await self._send(CHAT_PATH, body, None, answer)
        return _result(
            answer,
            adapter=adapter or BASE,
            scheduled_seconds=started_seconds if scheduled_seconds is None else scheduled_seconds,
            started_seconds=started_seconds,
        )

    async def send(
        self, request: ScheduledRequest, scheduled_seconds: float, *, api_key: str | None = None, keep_text: bool = True
    ) -> RequestResult:
        """One request of a schedule, due at `scheduled_seconds` on the clock of `time.perf_counter`; never raises.

        `api_key` takes the place of the target's. Cancelled, it returns what came so far, with the error `abandoned`.
        """
        answer = StreamedAnswer()
        started_seconds = time.perf_counter()
        body = request_body(request, self.target.style, self.target.model)
        try:
            await self._send(request_path(request), body, api_key, answer)
        except asyncio.CancelledError:
            answer.error = RequestError(ABANDONED, "the run was stopped while the request was under way")
        return _result(
            answer,
            id=request.id,
            adapter=request.adapter,
            tenant=request.tenant,
            scheduled_seconds=scheduled_seconds,
            started_seconds=started_seconds,
            keep_text=keep_text,
        )

    async def list_models(self) -> tuple[str, ...]:
        """The ids that `GET /v1/models` lists, in the server's order.

        Raises TargetError if the server is down, refuses the key, or answers in another shape than OpenAI's.
        """
        return await self.pages.list_models()

    async def _send(self, path: str, body: dict[str, Any], api_key: str | None, answer: StreamedAnswer) -> None:
        """Fills `answer`, with an error at the worst; whatever a server sends, only cancelling raises."""
        headers = _JSON_HEADERS if api_key is None else _JSON_HEADERS | bearer(api_key)
        url, data, session = self.target.base_url + path, self._encode(body), self._open_session()
        try:
            async with session.post(url, data=data, headers=headers, allow_redirects=False) as response:
                answer.http_status = response.status
                await _receive(response, answer)
        except Exception as error:
            if not answer.is_whole and answer.error is None:
                answer.error = _explain(error, answer.http_status)
        if answer.error is not None:
            answer.error = _without_keys(answer.error, (api_key, self.target.api_key))

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("ChatClient is not open: use it as `async with ChatClient(...) as client`")
        return self._session


def bearer(api_key: str | None) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


async def _receive(response: aiohttp.ClientResponse, answer: StreamedAnswer) -> None:
    if response.status != 200:
        answer.error = read_error_body(response.status, (await response.read()).decode("utf-8", "replace"))
        return
    if response.content_type != "text/event-stream":
        answer.error = RequestError("not_an_event_stream", f"the answer's content type is {response.content_type}")
        return
    parser = SseParser()
    feed, take, read, now = parser.feed, answer.take, response.content.readany, time.perf_counter
    while not answer.is_whole and (piece := await read()):
        arrived_seconds = now()
        for event in feed(piece):
            take(event, arrived_seconds)
    for event in parser.flush():
        take(event, now())
    answer.end()
    # Only when the body has ended can the connection serve the next request.
    with suppress(TimeoutError):
        async with asyncio.timeout(_TAIL_SECONDS):
            while await read():
                pass


def _explain(error: Exception, http_status: int | None) -> RequestError:
    """What a failed connection shows as in the results."""
    if isinstance(error, TimeoutError):
        return RequestError("timeout", describe(error))
    if isinstance(error, OSError) and error.errno in _CLIENT_LIMITS:
        return RequestError(CLIENT_LIMIT, describe(error))
    if isinstance(error, aiohttp.ClientError):
        return RequestError("connection_failed" if http_status is None else "connection_lost", describe(error))
    return RequestError("unreadable", f"{type(error).__name__}: {error}")


def _without_keys(error: RequestError, keys: Iterable[str | None]) -> RequestError:
    """A server may echo the key that it refuses; results are kept and shown."""
    code, message = error.code, error.message
    for key in filter(None, keys):
        code, message = code.replace(key, "***"), message.replace(key, "***")
    return RequestError(code, message)


def _result(
    answer: StreamedAnswer,
    *,
    id: int = 0,
    adapter: str,
    tenant: str = "",
    scheduled_seconds: float,
    started_seconds: float,
    keep_text: bool = True,
) -> RequestResult:
    finished_seconds = answer.finished_seconds if answer.error is None else None
    return RequestResult(
        id=id,
        adapter=adapter,
        tenant=tenant,
        scheduled_seconds=scheduled_seconds,
        started_seconds=started_seconds,
        finished_seconds=time.perf_counter() if finished_seconds is None else finished_seconds,
        chunk_seconds=tuple(answer.chunk_seconds),
        text=answer.text if keep_text else "",
        num_prompt_tokens=answer.num_prompt_tokens,
        num_output_tokens=answer.num_output_tokens,
        finish_reason=answer.finish_reason,
        http_status=answer.http_status,
        server=answer.server,
        error=answer.error,
    )
