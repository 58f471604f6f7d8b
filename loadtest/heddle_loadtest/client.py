"""An async streaming chat client for any OpenAI-compatible server. Knows HTTP; knows no load, plan or statistics.

async with ChatClient("http://127.0.0.1:8000") as client:
    result = await client.chat([{"role": "user", "content": "Hello"}], adapter="poet", on_text=print)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp

from heddle_loadtest.answer import StreamedAnswer, read_error_body
from heddle_loadtest.errors import TargetError
from heddle_loadtest.result import RequestError, RequestResult
from heddle_loadtest.sse import SseParser
from heddle_loadtest.style import BASE, AdapterStyle

_CONNECT_TIMEOUT_SECONDS = 10.0
_LIST_TIMEOUT_SECONDS = 30.0


class ChatClient:
    """One server, many requests at once. Use as `async with ChatClient(...) as client`."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        style: AdapterStyle = AdapterStyle.HEDDLE,
        timeout_seconds: float = 600.0,
    ) -> None:
        """`base_url` with or without the final `/v1`; `timeout_seconds` bounds each request from start to end."""
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.style = style
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=_CONNECT_TIMEOUT_SECONDS)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # aiohttp lets 100 connections through and queues the rest, which would show up as latency of the server.
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        session, self._session = self._open_session(), None
        await session.close()

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
            **self.style.request_fields(adapter or BASE, model),
            "messages": [dict(message) for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in optional_fields.items() if value is not None},
        }
        answer = StreamedAnswer(on_text)
        started_seconds = time.perf_counter()
        http_status = await self._send(body, answer)
        finished_seconds = answer.finished_seconds if answer.error is None else None
        return RequestResult(
            adapter=adapter or BASE,
            scheduled_seconds=started_seconds if scheduled_seconds is None else scheduled_seconds,
            started_seconds=started_seconds,
            finished_seconds=time.perf_counter() if finished_seconds is None else finished_seconds,
            chunk_seconds=tuple(answer.chunk_seconds),
            text=answer.text,
            num_prompt_tokens=answer.num_prompt_tokens,
            num_output_tokens=answer.num_output_tokens,
            finish_reason=answer.finish_reason,
            http_status=http_status,
            error=answer.error,
        )

    async def list_models(self) -> tuple[str, ...]:
        """The ids that `GET /v1/models` lists, in the server's order.

        Raises TargetError if the server is down, refuses the key, or answers in another shape than OpenAI's.
        """
        timeout = aiohttp.ClientTimeout(total=_LIST_TIMEOUT_SECONDS, sock_connect=_CONNECT_TIMEOUT_SECONDS)
        try:
            async with self._open_session().get(f"{self.base_url}/v1/models", timeout=timeout) as response:
                if response.status in (401, 403):
                    problem = f"{self.base_url} refuses it (HTTP {response.status})"
                    raise TargetError("api_key", None, problem, "Pass a key that this server accepts")
                if response.status != 200:
                    raise self._not_openai(f"GET /v1/models answers HTTP {response.status}")
                return _read_model_ids(await response.json(content_type=None))
        except ValueError:
            raise self._not_openai("GET /v1/models answers no OpenAI model list") from None
        except (TimeoutError, aiohttp.ClientError) as error:
            problem = f"no answer from there ({_describe(error)})"
            remedy = "Start the server, or correct the address"
            raise TargetError("target", self.base_url, problem, remedy) from error

    async def _send(self, body: dict[str, Any], answer: StreamedAnswer) -> int | None:
        """Fills `answer`, with an error at the worst; the HTTP status, or None if none came."""
        http_status = None
        try:
            async with self._open_session().post(f"{self.base_url}/v1/chat/completions", json=body) as response:
                http_status = response.status
                await _receive(response, answer)
        except TimeoutError as error:
            answer.error = RequestError("timeout", _describe(error))
        except aiohttp.ClientError as error:
            code = "connection_failed" if http_status is None else "connection_lost"
            answer.error = RequestError(code, _describe(error))
        return http_status

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("ChatClient is not open: use it as `async with ChatClient(...) as client`")
        return self._session

    def _not_openai(self, problem: str) -> TargetError:
        remedy = "Point it at an OpenAI-compatible server, for example http://127.0.0.1:8000"
        return TargetError("target", self.base_url, problem, remedy)


async def _receive(response: aiohttp.ClientResponse, answer: StreamedAnswer) -> None:
    if response.status != 200:
        answer.error = read_error_body(response.status, (await response.read()).decode("utf-8", "replace"))
        return
    if response.content_type != "text/event-stream":
        answer.error = RequestError("not_an_event_stream", f"the answer's content type is {response.content_type}")
        return
    parser = SseParser()
    # Reads on after [DONE] until the body ends: only then can the connection serve the next request.
    async for piece in response.content.iter_any():
        arrived_seconds = time.perf_counter()
        for event in parser.feed(piece):
            answer.take(event, arrived_seconds)
    for event in parser.flush():
        answer.take(event, time.perf_counter())
    answer.end()


def _read_model_ids(listing: object) -> tuple[str, ...]:
    """Raises ValueError if `listing` is not an OpenAI model list."""
    entries = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise ValueError("no model list")
    return tuple(str(entry["id"]) for entry in entries)


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
