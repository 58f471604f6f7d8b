"""Runs one server in this process until it is told to stop: its socket, its app, its words on the terminal."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import typer
import uvicorn

from heddle_adapters.errors import StoreUnusable
from heddle_server.adapter_footprint import TYPICAL_RANK, all_linears, footprint
from heddle_server.api.app import create_app
from heddle_server.api.engine_client import ENGINE_COMMAND
from heddle_server.api.registry import ImportReport
from heddle_server.api.service import Service
from heddle_server.config import ConfigError, ServerConfig
from heddle_server.messages import ModelCard, StartupProgress
from heddle_server.sizes import format_count, format_size

# Longer than clients and proxies keep an idle connection (httpx 5 s, aiohttp 15 s, nginx 60 s): were the server first,
# a request could be on its way over a connection that is just being closed, and be lost.
KEEP_ALIVE_SECONDS = 75
SHUTDOWN_SECONDS = 10  # for requests in flight when the server is told to stop; then they end with an error
LAST_WORDS_SECONDS = 2  # for those errors to reach their clients

log = logging.getLogger(__name__)

Companion = Callable[[str], Awaitable[int | None]]


def serve(
    config: ServerConfig, *, companion: Companion | None = None, engine_command: Sequence[str] = ENGINE_COMMAND
) -> None:
    """Serves until a signal, the companion or a lost engine ends it; raises `ConfigError` before anything is started.

    The companion runs beside the server, with its address, from when it is first ready; a number that it returns ends
    the server with that exit status.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a malformed upload is told to its sender
    with _listen(config.host, config.port) as listener:
        run = _Run(config, listener, companion, engine_command)
        # uvicorn raises a signal again when it is done: leave in order then, so that temporary files go.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(run.exit_status))
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))  # the terminal was closed
        typer.echo(f"heddle: loading {config.engine.model_name} ...")
        with suppress(KeyboardInterrupt):
            run.server.run(sockets=[listener])
    if run.exit_status:
        raise typer.Exit(run.exit_status)


class _Server(uvicorn.Server):
    """uvicorn, except that requests in flight are ended in order when their time is up."""

    def __init__(self, config: uvicorn.Config, service: Service, on_stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._on_stopping = on_stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        ending = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_requests(self) -> None:
        engine = self._service.engine
        if engine.num_requests:
            requests = "1 request" if engine.num_requests == 1 else f"{engine.num_requests} requests"
            typer.echo(f"heddle: finishing {requests}, {SHUTDOWN_SECONDS} s at most ...")
        await asyncio.sleep(SHUTDOWN_SECONDS)
        engine.end_all("The server is shutting down. Try again shortly.")


class _Run:
    """The server and what ends it."""

    def __init__(
        self,
        config: ServerConfig,
        listener: socket.socket,
        companion: Companion | None,
        engine_command: Sequence[str],
    ) -> None:
        self.exit_status = 0
        self._config = config
        self._address = _address(listener)
        self._companion = companion
        self._companion_task: asyncio.Task[None] | None = None
        try:
            service = Service(
                config,
                engine_command=engine_command,
                on_progress=_say_phase,
                on_ready=self._ready,
                on_imported=_say_imported,
                on_failed=self._failed,
            )
        except StoreUnusable as error:
            raise ConfigError(error.message) from error
        self._service = service
        self._is_first_start = True
        self.server = _Server(
            uvicorn.Config(
                create_app(service),
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS + LAST_WORDS_SECONDS,
            ),
            service,
            on_stopping=self._dismiss_companion,
        )

    def _ready(self, model: ModelCard) -> None:
        if not self._is_first_start:
            typer.echo("heddle: the engine is back")
            return
        self._is_first_start = False
        _say_ready(self._config, model, self._address, has_keys=self._service.keys.has_keys)
        if self._companion is not None and self._companion_task is None:
            self._companion_task = asyncio.get_running_loop().create_task(self._accompany(self._companion))

    def _failed(self, reason: str) -> None:
        typer.secho(f"heddle: {reason}", fg="red", err=True)
        self._end(1)

    async def _accompany(self, companion: Companion) -> None:
        try:
            exit_status = await companion(self._address)
        except Exception:
            if self.server.should_exit:  # it lost its server, as it had to
                return
            log.exception("What ran beside the server failed.")
            exit_status = 1
        if exit_status is not None:
            self._end(exit_status)

    def _dismiss_companion(self) -> None:
        if self._companion_task is not None and not self._companion_task.done():
            self._companion_task.cancel()

    def _end(self, exit_status: int) -> None:
        self.exit_status = exit_status
        self.server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the model loads, so that a taken port is known in a moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = f"port {port} is in use" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
        typer.secho(f"heddle: cannot listen on {host}:{port}: {reason}. See --host and --port.", fg="red", err=True)
        raise typer.Exit(1) from None
    # asyncio does this only for sockets that name their protocol; without it a token can wait 40 ms for the one before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _address(listener: socket.socket) -> str:
    """The base URL for a client on this machine."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _say_phase(progress: StartupProgress) -> None:
    typer.echo(f"  {progress.phase:<12} {progress.seconds:6.1f} s  {progress.detail}".rstrip())


def _say_imported(report: ImportReport) -> None:
    refused = f", {len(report.refused)} refused:" if report.refused else ""
    typer.echo(f"adapters: {len(report.registered)} registered from {report.path}{refused}")
    for name, reason in report.refused:
        typer.echo(f"  {name}: {reason}")


def _say_ready(config: ServerConfig, model: ModelCard, address: str, *, has_keys: bool) -> None:
    typer.echo(memory_line(model))
    typer.echo(f"heddle is ready at {address}")
    typer.echo(f"playground: {address}/")
    typer.echo(access_line(config, has_keys))
    key = '-H "Authorization: Bearer $HEDDLE_API_KEY" ' if has_keys else ""
    typer.echo(
        f"try: curl {address}/v1/chat/completions {key}-H 'Content-Type: application/json' "
        """-d '{"model": "base", "messages": [{"role": "user", "content": "Hello"}]}'"""
    )


def access_line(config: ServerConfig, has_keys: bool) -> str:
    """Who may use this server, as the last line but one says it."""
    if has_keys:
        return "API keys: every request needs one; `heddle keys ls` shows whose there are"
    if config.allow_anonymous:
        return "no API keys: whoever reaches this server can use it and change its adapters (--allow-anonymous)"
    return "no API keys: only this machine can use this server; `heddle keys create` makes one"


def memory_line(model: ModelCard) -> str:
    """What the base takes and what the rest is good for: either tokens or adapters, in the same pages."""
    rest = f"{format_size(model.weights_bytes - model.quantized_bytes)} in {model.dtype}"
    quantized = (
        f"{format_size(model.quantized_bytes)} in {model.layout.quantization}, " if model.quantized_bytes else ""
    )
    sites = all_linears(model.layout.sites, model.vocabulary_size)
    num_adapters = model.num_pages // footprint(sites, TYPICAL_RANK, model.dtype, model.page_bytes).num_pages
    return (
        f"memory: base {format_size(model.weights_bytes)} ({quantized}{rest}), pool {format_size(model.pool_bytes)} = "
        f"{format_count(model.num_pages * model.page_tokens)} tokens or {num_adapters} adapters r{TYPICAL_RANK} on all "
        f"linears, {model.max_model_len} tokens at most in one request, on {model.device}"
    )
