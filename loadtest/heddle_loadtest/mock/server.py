"""A fake OpenAI-compatible server of known speed: its routes and its process. Measures only how late it was itself.

Its chats and completions look like heddle's, `heddle` object included. `/mock/lateness` says how late its tokens
left, `/mock/requests` how many came and how many it ran at once, `/metrics` counts as heddle counts.
"""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import sys

import msgspec
from aiohttp import web

from heddle_loadtest.errors import SpecError
from heddle_loadtest.mock.adapter_slots import AdapterSlots
from heddle_loadtest.mock.counts import Counts
from heddle_loadtest.mock.generation import Generation, Machine
from heddle_loadtest.mock.lateness import Lateness
from heddle_loadtest.mock.places import Places
from heddle_loadtest.mock.settings import MockSettings
from heddle_loadtest.mock.wire import Answer, Body, envelope
from heddle_loadtest.workload.names import BASE

MODEL = "mock"  # the base model
READY = "mock is ready at "  # the line that says where it listens starts so
_BACKLOG = 4096  # connections that come at once: of more than 128, aiohttp's own choice, some would come a second late
_INVALID = "invalid_request_error"


class MockServer:
    """The server behind its routes."""

    def __init__(self, settings: MockSettings) -> None:
        self._settings = settings
        self._adapters = frozenset(settings.adapter_names)
        self._machine = Machine(
            settings,
            AdapterSlots(settings.num_slots, settings.load_seconds),
            Places(settings.capacity),
            Counts(),
            Lateness(),
            random.Random(f"jitter {settings.seed}"),
        )
        self._faults = random.Random(settings.seed)
        self._decoder = msgspec.json.Decoder(Body)
        self._num_requests = 0

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(client_max_size=64 * 2**20)
        application.router.add_get("/health", self._answer_health)
        application.router.add_get("/v1/models", self._list_models)
        application.router.add_post("/v1/chat/completions", self._chat)
        application.router.add_post("/v1/completions", self._complete)
        application.router.add_get("/metrics", self._answer_metrics)
        application.router.add_get("/mock/lateness", self._answer_lateness)
        application.router.add_get("/mock/requests", self._answer_requests)
        return application

    async def _answer_health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _list_models(self, request: web.Request) -> web.Response:
        common = {"object": "model", "created": 0, "owned_by": "heddle", "root": MODEL}
        models = [{"id": MODEL, **common, "parent": None}]
        models += [{"id": name, **common, "parent": MODEL} for name in self._settings.adapter_names]
        return web.json_response({"object": "list", "data": models})

    async def _answer_metrics(self, request: web.Request) -> web.Response:
        self._machine.counts.running.set(self._machine.places.num_taken)
        return web.Response(body=self._machine.counts.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _answer_lateness(self, request: web.Request) -> web.Response:
        return web.json_response(self._machine.lateness.to_json())

    async def _answer_requests(self, request: web.Request) -> web.Response:
        return web.json_response({"count": self._num_requests, "max_running": self._machine.places.max_taken})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, is_chat=True)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, is_chat=False)

    async def _answer(self, request: web.Request, *, is_chat: bool) -> web.StreamResponse:
        arrived_at = asyncio.get_running_loop().time()
        try:
            body = self._decoder.decode(await request.read())
        except msgspec.MsgspecError as error:
            return self._refuse(400, str(error), "invalid_request")
        model, adapter = body.model or MODEL, _adapter_of(body)
        if adapter is not None and adapter not in self._adapters:
            field, code = ("adapter", "adapter_not_found") if body.adapter else ("model", "model_not_found")
            return self._refuse(404, f"there is no {field} {adapter!r}", code, field)
        self._num_requests += 1
        # Both are drawn for every request, so that one rate does not change whom the other one hits.
        is_refused = self._faults.random() < self._settings.error_rate
        is_broken = self._faults.random() < self._settings.break_rate
        if is_refused:
            return self._refuse(503, "refused, as the error rate asks for", "overloaded")
        answer = Answer(self._num_requests, model, body, is_chat=is_chat)
        return await Generation(self._machine, answer, body, adapter, arrived_at, is_broken=is_broken).serve(request)

    def _refuse(self, status: int, message: str, code: str, field: str | None = None) -> web.Response:
        self._machine.counts.errors.labels(code).inc()
        kind = _INVALID if status < 500 else "server_error"
        return web.Response(status=status, body=envelope(message, kind, code, field), content_type="application/json")


async def serve(settings: MockSettings, *, ends_with_stdin: bool = False) -> None:
    """Serves until the process is told to end, by a signal or by the end of its standard input.

    Raises SpecError if the port is taken.
    """
    runner = web.AppRunner(
        MockServer(settings).application(), access_log=None, shutdown_timeout=0.1, handler_cancellation=True
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, "127.0.0.1", settings.port, backlog=_BACKLOG).start()
        except OSError as error:
            raise SpecError(
                "port", settings.port, f"cannot be listened on ({error})", "Give 0 for a free one"
            ) from None
        gc.collect()
        gc.freeze()  # what lives for ever is looked at no more, so that a collection stays far below a millisecond
        host, port = runner.addresses[0][:2]
        print(f"{READY}http://{host}:{port}", flush=True)
        await _told_to_end(ends_with_stdin=ends_with_stdin)
    finally:
        await runner.cleanup()


async def _told_to_end(*, ends_with_stdin: bool) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if ends_with_stdin:
        loop.add_reader(sys.stdin, stop.set)
    await stop.wait()


def _adapter_of(body: Body) -> str | None:
    """The adapter that a request names, in either way; None for the base model."""
    name = body.adapter or body.model
    return None if name in (None, BASE, MODEL) else name


if __name__ == "__main__":
    asyncio.run(serve(msgspec.json.decode(sys.argv[1], type=MockSettings), ends_with_stdin=True))
