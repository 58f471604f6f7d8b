"""A small real OpenAI-compatible server of known speed, in a thread of the test's own process.

It answers with numbered words, `ttft_seconds` to the first and `inter_token_seconds` between them. What it does
beyond that depends on the adapter's name, taken from `adapter` or else from `model`: see `FAULTS`. Like heddle it
takes uploads, counts in /metrics and ends its answers with a `heddle` object; `/info` and `/lora-adapters` are those
of LoRAX and llama.cpp.
"""

import asyncio
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from aiohttp import web

FAULTS = {
    "overloaded": "answers 503 with an OpenAI error envelope",
    "teapot": "answers 418 with plain text",
    "unstreamed": "answers 200 with JSON instead of a stream",
    "poisoned": "sends an error event after two words",
    "garbled": "sends an event that is not JSON",
    "cut": "ends the stream after two words, without finish_reason or [DONE]",
    "dropped": "breaks the connection after two words",
    "silent": "sends no usage and counts nothing",
    "stuck": "never sends a word",
    "frail": "breaks the connection before it answers anything",
}


_HEDDLE_PART = {"adapter": "poet", "version": 3, "cache": "disk", "load_ms": 182.5, "queue_ms": 200, "ttft_ms": 231}


class FakeOpenAIServer:
    """Serves while its `with` block runs; `url` is its address, `bodies` the chat requests it got so far."""

    def __init__(
        self,
        models: Sequence[str] = ("tiny", "poet", "clerk"),
        *,
        ttft_seconds: float = 0.05,
        inter_token_seconds: float = 0.01,
        api_key: str | None = None,
        has_metrics: bool = True,
    ) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []  # of the same requests
        self.keys: list[str | None] = []  # the Authorization headers of the same requests
        self.uploads: dict[str, dict[str, bytes]] = {}  # adapter -> its files
        self.max_in_flight = 0
        self._num_in_flight = 0
        self._models = list(models)
        self._has_metrics = has_metrics
        self._ttft_seconds = ttft_seconds
        self._inter_token_seconds = inter_token_seconds
        self._api_key = api_key
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready: Future[str] = Future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> Self:
        self._thread.start()
        self.url = self._ready.result(timeout=30)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=30)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._chat)
        app.router.add_post("/v1/adapters", self._upload)
        app.router.add_delete("/v1/adapters/{name}", self._delete)
        app.router.add_get("/info", self._info)
        app.router.add_get("/lora-adapters", self._list_numbers)
        if self._has_metrics:
            app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            self._ready.set_result(f"http://{host}:{port}")
            await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _list_models(self, request: web.Request) -> web.Response:
        if self._api_key is not None and request.headers.get("Authorization") != f"Bearer {self._api_key}":
            return web.json_response(_envelope("invalid_api_key", "wrong key"), status=401)
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in self._models]
        return web.json_response({"object": "list", "data": entries})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_id": self._models[0]})

    async def _list_numbers(self, request: web.Request) -> web.Response:
        return web.json_response([{"id": n, "path": f"{name}.gguf"} for n, name in enumerate(self._models[1:])])

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text="# TYPE requests_total counter\n"
            f'requests_total{{adapter="a b}}\\"", path = "/v1"}} {len(self.bodies)} 1700000000000\n'
            f"running {self._num_in_flight}\n"
        )

    async def _upload(self, request: web.Request) -> web.Response:
        parts = dict(await request.post())
        name = str(parts.pop("name"))
        if name == "unfit":
            return web.json_response(_envelope("adapter_incompatible", "made for another base"), status=400)
        self.uploads[name] = {part: value.file.read() for part, value in parts.items()}  # type: ignore[union-attr]
        self._models.append(name)
        return web.json_response({"name": name}, status=201)

    async def _delete(self, request: web.Request) -> web.Response:
        self._models.remove(request.match_info["name"])
        return web.json_response({"deleted": True})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.paths.append(request.path)
        self.keys.append(request.headers.get("Authorization"))
        adapter = body.get("adapter", body.get("model"))
        if adapter == "overloaded":
            return web.json_response(_envelope("adapter_capacity", "all slots are taken"), status=503)
        if adapter == "teapot":
            return web.Response(text="short and stout", status=418)
        if adapter == "unstreamed":
            return web.json_response({"choices": []})
        if adapter == "frail" and request.transport is not None:
            request.transport.abort()
            await asyncio.sleep(3600)  # until the handler is cancelled
        self._num_in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._num_in_flight)
        try:
            return await self._stream(request, adapter, body["max_tokens"])
        finally:
            self._num_in_flight -= 1

    async def _stream(self, request: web.Request, adapter: str, num_tokens: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        is_chat = request.path == "/v1/chat/completions"
        await response.write(b": keep-alive\n\n")
        if is_chat:
            await _send(response, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(3600 if adapter == "stuck" else self._ttft_seconds)
        for index in range(num_tokens):
            if index == 2 and adapter in ("poisoned", "garbled", "cut", "dropped"):
                await _fail(request, response, adapter)
                return response
            if index:
                await asyncio.sleep(self._inter_token_seconds)
            is_last = index == num_tokens - 1
            piece = {"delta": {"content": f"{index} "}} if is_chat else {"text": f"{index} "}
            choice = {"index": 0, **piece, "finish_reason": "length" if is_last else None}
            source = {"heddle": _HEDDLE_PART} if is_last and adapter != "silent" else {}
            await _send(response, {"choices": [choice], "usage": None, **source})
        if adapter != "silent":
            await _send(response, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": num_tokens}})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


async def _fail(request: web.Request, response: web.StreamResponse, adapter: str) -> None:
    if adapter == "poisoned":
        await _send(response, _envelope("adapter_evicted", "the adapter went away"))
        await response.write(b"data: [DONE]\n\n")
    elif adapter == "garbled":
        await response.write(b"data: {oops\n\n")
    elif adapter == "dropped" and request.transport is not None:
        request.transport.abort()


def _envelope(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}
