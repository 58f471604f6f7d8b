"""The API process's end of the engine: starts it, talks to it, notices its death and starts it again.

The engine is a child process behind one ZeroMQ socket in a private directory. Everything here runs on the event
loop; nothing here knows HTTP, text or adapters' names.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from heddle_adapters.tier import Tier
from heddle_server.api.errors import EngineUnavailable
from heddle_server.config import EngineConfig
from heddle_server.messages import (
    Abort,
    CacheReport,
    DescribeCache,
    EngineStats,
    ForgetAdapter,
    FromEngine,
    Generate,
    ModelCard,
    PinAdapters,
    PrepareAdapter,
    Ready,
    Shutdown,
    StartupFailed,
    StartupProgress,
    StepOutput,
    ToEngine,
    TokenOutput,
)
from heddle_server.request import Request

log = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "heddle_server.engine.engine_process")
SHUTDOWN_GRACE_SECONDS = 5.0
REPORT_SECONDS = 10.0  # for the engine to describe its cache: it answers between two steps
STABLE_SECONDS = 10.0  # an engine that was ready for so long was no failed start, whatever ended it
# What a dying engine wrote last may still be on its way through ZeroMQ's own thread.
_LAST_WORDS_SECONDS = 0.3


class EngineFailed(Exception):
    """The engine cannot be brought up; the server has nothing left to serve."""


class EngineClient:
    """One engine process at a time, restarted when it dies.

    `start` returns at once; `wait_ready` waits for the model. `failed` is called once, with the reason, when the
    engine is given up.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_restarts: int = 3,
        command: Sequence[str] = ENGINE_COMMAND,
        on_progress: Callable[[StartupProgress], None] = lambda progress: None,
        on_ready: Callable[[ModelCard], None] = lambda model: None,
        on_failed: Callable[[str], None] = lambda reason: None,
        on_step: Callable[[StepOutput], None] = lambda step: None,
    ) -> None:
        self.model: ModelCard | None = None  # of the last engine that was ready; outlives a restart
        self.stats: EngineStats | None = None
        self.num_restarts = 0
        self._config = config
        self._max_restarts = max_restarts
        self._command = tuple(command)
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._on_step = on_step
        self._ready = asyncio.Event()
        self._outputs: dict[int, asyncio.Queue[TokenOutput]] = {}
        self._reports: dict[int, asyncio.Future[CacheReport]] = {}  # asked for, by query
        self._query_ids = itertools.count(1)
        self._tiers: dict[str, Tier] = {}  # of every adapter that this engine holds nearer than the disk
        self._ready_since: float | None = None  # on the monotonic clock
        self._failed_starts = 0  # in a row, without one token or STABLE_SECONDS between them
        self._failure: str | None = None
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._outputs)

    def start(self) -> None:
        """Launches the engine and keeps one running until `close`."""
        self._context = zmq.asyncio.Context()
        self._supervisor = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> ModelCard:
        """The loaded model, once there is one; `EngineFailed` when there will be none."""
        ready = asyncio.create_task(self._ready.wait())
        assert self._supervisor is not None
        await asyncio.wait({ready, self._supervisor}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            raise EngineFailed(self._failure or "The engine was closed.")
        assert self.model is not None
        return self.model

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        """The engine's outputs for one request, the last with a finish_reason. Leaving early aborts the request."""
        if not self.is_ready:
            raise EngineUnavailable("The engine is not ready: it is loading or restarting. Try again shortly.")
        queue: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self._outputs[request.request_id] = queue
        self._send(Generate(request))
        is_finished = False
        try:
            while not is_finished:
                output = await queue.get()
                is_finished = output.finish_reason is not None
                yield output
        finally:
            # Gone already when the engine died: then there is nobody to tell.
            if self._outputs.pop(request.request_id, None) is not None and not is_finished:
                self._send(Abort(request.request_id))

    def forget_adapter(self, digest: str) -> None:
        """Lets the engine free a digest that no name and no request refers to."""
        self._send(ForgetAdapter(digest))

    def prepare_adapter(self, digest: str) -> None:
        """Content that was just stored: the engine compiles its rows when it has time."""
        self._send(PrepareAdapter(digest))

    def pin_adapters(self, tenants: Mapping[str, str]) -> None:
        """All adapters that are to stay on the device from now on, each with the tenant in whose share it counts.

        A new engine knows of none until it is told.
        """
        self._send(PinAdapters(dict(tenants)))

    def tier_of(self, digest: str) -> Tier:
        """Where the engine last said that the adapter is."""
        return self._tiers.get(digest, "disk")

    def resident_digests(self) -> frozenset[str]:
        """Adapters on the device."""
        return frozenset(digest for digest, tier in self._tiers.items() if tier == "device")

    async def describe_cache(self) -> CacheReport:
        """What lies in the pool and the host tier; raises `EngineUnavailable` when the engine cannot say."""
        if not self.is_ready:
            raise EngineUnavailable("The engine is not ready: it is loading or restarting. Try again shortly.")
        query_id = next(self._query_ids)
        report = self._reports[query_id] = asyncio.get_running_loop().create_future()
        self._send(DescribeCache(query_id))
        try:
            return await asyncio.wait_for(report, REPORT_SECONDS)
        except TimeoutError:
            raise EngineUnavailable("The engine is busy and did not describe its cache in time.") from None
        finally:
            self._reports.pop(query_id, None)

    async def close(self) -> None:
        """Asks the engine to leave, then makes it."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    async def _supervise(self) -> None:
        while True:
            try:
                reason = await self._run_engine()
            except (OSError, zmq.ZMQError) as error:  # no such program, no place for the socket
                return self._give_up(f"The engine could not be started: {error}.")
            if self._ready_since is not None and time.monotonic() - self._ready_since > STABLE_SECONDS:
                self._failed_starts = 0
            self._ready_since = None
            self._failed_starts += 1
            if reason.is_final or self._failed_starts > self._max_restarts:
                return self._give_up(reason.text)
            self.num_restarts += 1
            log.error("%s Restart %d of %d.", reason.text, self._failed_starts, self._max_restarts)

    def _give_up(self, reason: str) -> None:
        self._failure = reason
        log.debug("giving up on the engine: %s", reason)  # whoever gets `on_failed` tells it
        self._on_failed(reason)

    async def _run_engine(self) -> _Exit:
        """One engine's whole life: returns why it ended."""
        # A socket and a directory (0700) per engine: nothing meant for a dead one reaches the next.
        directory = Path(tempfile.mkdtemp(prefix="heddle-"))
        assert self._context is not None
        self._socket = self._context.socket(zmq.PAIR)
        try:
            # No high-water mark on either end: a full pipe would block the loop or drop tokens. What is in flight is
            # bounded by the requests admitted, not by the socket.
            self._socket.set_hwm(0)
            address = f"ipc://{directory / 'engine.sock'}"
            self._socket.bind(address)
            self._process = await self._launch(address)
            return await self._serve(self._socket, self._process)
        finally:
            was_ready = self.is_ready
            self._ready.clear()
            self.end_all("The engine stopped while it worked on this request. Try again shortly.")
            self._tiers.clear()
            await self._stop_process(is_listening=was_ready)
            self._socket.close(linger=0)
            shutil.rmtree(directory, ignore_errors=True)

    async def _launch(self, address: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            "--socket",
            address,
            "--config",
            msgspec.msgpack.encode(self._config).hex(),
            # Never written to: its end tells the engine that this process is gone, however it went.
            stdin=asyncio.subprocess.PIPE,
            # Ctrl-C in the terminal is for this process, which then closes the engine in order.
            start_new_session=True,
        )

    async def _serve(self, socket: zmq.asyncio.Socket, process: asyncio.subprocess.Process) -> _Exit:
        dead = asyncio.create_task(process.wait())
        reader = asyncio.create_task(self._read(socket))
        try:
            await asyncio.wait({dead, reader}, return_when=asyncio.FIRST_COMPLETED)
            if not reader.done():
                await asyncio.wait({reader}, timeout=_LAST_WORDS_SECONDS)
            if reader.done():
                return reader.result()
            return _Exit(f"The engine process ended with {_status(process.returncode)}.")
        finally:
            dead.cancel()
            reader.cancel()
            await asyncio.gather(dead, reader, return_exceptions=True)

    async def _read(self, socket: zmq.asyncio.Socket) -> _Exit:
        """Handles what the engine says until it says something that ends it."""
        while True:
            frame = await socket.recv()
            try:
                message = self._decoder.decode(frame)
            except msgspec.MsgspecError as error:
                return _Exit(f"The engine sent a message that cannot be read: {error}.")
            match message:
                case StepOutput():
                    self._deliver(message)
                case CacheReport():
                    if (report := self._reports.get(message.query_id)) and not report.done():
                        report.set_result(message)
                case StartupProgress():
                    self._on_progress(message)
                case Ready():
                    self.model = message.model
                    self._ready.set()
                    self._ready_since = time.monotonic()
                    self._on_ready(message.model)
                case StartupFailed():
                    # The same weights and settings would fail the same way again.
                    return _Exit(message.message, is_final=True)

    def _deliver(self, step: StepOutput) -> None:
        if step.outputs:
            self._failed_starts = 0
        self.stats = step.stats
        for move in step.moves:
            if move.target == "disk":
                self._tiers.pop(move.adapter_digest, None)
            else:
                self._tiers[move.adapter_digest] = move.target
        self._on_step(step)
        for output in step.outputs:
            # A request aborted a moment ago may still get an output: nobody waits for it.
            if queue := self._outputs.get(output.request_id):
                queue.put_nowait(output)

    def end_all(self, reason: str) -> None:
        """Every request in flight ends with an error event, and every question to the engine with an error."""
        for report in self._reports.values():
            if not report.done():
                report.set_exception(EngineUnavailable(reason))
        requests, self._outputs = self._outputs, {}
        for request_id, queue in requests.items():
            queue.put_nowait(
                TokenOutput(request_id, [], finish_reason="error", error_code="engine_died", error_message=reason)
            )

    def _send(self, message: ToEngine) -> None:
        if self._socket is None or not self.is_ready:
            return
        # Done at once, since nothing bounds the pipe; fails only when the engine just died, which `_serve` notices.
        sent = self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        if isinstance(sent, asyncio.Future) and sent.done():
            sent.exception()

    async def _stop_process(self, *, is_listening: bool) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        assert self._socket is not None
        if is_listening:
            with contextlib.suppress(zmq.ZMQError, TimeoutError):
                await asyncio.wait_for(self._socket.send(self._encoder.encode(Shutdown())), 1.0)
                await asyncio.wait_for(process.wait(), SHUTDOWN_GRACE_SECONDS)
        if process.returncode is None:
            # Still loading, or deaf: either way it holds nothing that must be put away.
            process.kill()
            await process.wait()


def _status(returncode: int | None) -> str:
    return f"signal {-returncode}" if returncode is not None and returncode < 0 else f"status {returncode}"


class _Exit(msgspec.Struct, frozen=True):
    """Why an engine ended; a final reason is not worth a restart."""

    text: str
    is_final: bool = False
