"""The parts of one running server, put together once and handed to the routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from starlette.requests import Request

from heddle_adapters.store import AdapterStore
from heddle_server.api.adapter_card import AdapterCards
from heddle_server.api.adapter_holds import AdapterHolds
from heddle_server.api.admission import Admission
from heddle_server.api.chat_template import ChatTemplate
from heddle_server.api.engine_client import ENGINE_COMMAND, EngineClient
from heddle_server.api.metrics import Metrics
from heddle_server.api.overload import LoadGate
from heddle_server.api.registry import AdapterRegistry, ImportReport
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.config import ServerConfig
from heddle_server.messages import ModelCard, StartupProgress, StepOutput


class Service:
    """What a request may use. `start` and `close` belong to the app's lifespan."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        engine_command: Sequence[str] = ENGINE_COMMAND,
        on_progress: Callable[[StartupProgress], None] = lambda progress: None,
        on_ready: Callable[[ModelCard], None] = lambda model: None,
        on_failed: Callable[[str], None] = lambda reason: None,
        on_imported: Callable[[ImportReport], None] = lambda report: None,
    ) -> None:
        """Reads the tokenizer and opens the store; raises `ConfigError` and `StoreUnusable` before anything starts.

        `on_ready` is called each time an engine is ready; the first time when `on_imported` has told what became of the
        folder of adapters, if there is one.
        """
        model_path = Path(config.engine.model_path)
        self.config = config
        self.model_name = config.engine.model_name
        self.created = int(time.time())  # Unix seconds
        self.metrics = Metrics()
        self.tokenizer = Tokenizer(model_path)
        chat_template = ChatTemplate.from_folder(model_path, self.tokenizer.config, self.tokenizer.special_tokens)
        self.store = AdapterStore(config.store_path, config.keep_versions)
        self.engine = EngineClient(
            config.engine,
            max_restarts=config.max_engine_restarts,
            command=engine_command,
            on_progress=on_progress,
            on_ready=self._engine_is_ready,
            on_failed=on_failed,
            on_step=self._engine_has_stepped,
        )
        # One thread: checking an upload reads gigabytes, and must not keep tokenizers from theirs.
        self.disk_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self.holds = AdapterHolds(self.store, self.disk_worker, self.engine.forget_adapter)
        self.registry = AdapterRegistry(self.store, self.engine, self.holds, self.disk_worker, self.model_name)
        self.cards = AdapterCards(self.store, self.engine)
        self.gate = LoadGate(
            max_requests=config.max_queued_requests,
            max_wait_seconds=config.max_queue_seconds,
            max_batch_tokens=config.engine.max_batch_tokens,
            max_batch_requests=config.engine.max_batch_requests,
            on_refused=self.metrics.count_refusal,
        )
        self.admission = Admission(
            model_name=self.model_name,
            engine=self.engine,
            tokenizer=self.tokenizer,
            chat_template=chat_template,
            holds=self.holds,
            gate=self.gate,
            on_damaged=self._content_is_damaged,
            metrics=self.metrics,
        )
        self.metrics.watch(self.engine, self.store)
        self._on_ready = on_ready
        self._on_imported = on_imported
        self._first_start: asyncio.Task[None] | None = None  # from when the engine is first ready

    @property
    def is_ready(self) -> bool:
        """Whether everything that the server was started with can be asked for."""
        return self.engine.is_ready and self._first_start is not None and self._first_start.done()

    async def __aenter__(self) -> Self:
        self.engine.start()
        self.registry.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._first_start is not None:
            self._first_start.cancel()
            await asyncio.gather(self._first_start, return_exceptions=True)
        await self.registry.close()
        await self.engine.close()
        self.disk_worker.shutdown()
        self.store.close()

    def _engine_is_ready(self, model: ModelCard) -> None:
        self.registry.engine_is_ready()
        if self._first_start is None:
            self._first_start = asyncio.get_running_loop().create_task(self._start_first(model))
        elif self._first_start.done():
            self._on_ready(model)

    def _engine_has_stepped(self, step: StepOutput) -> None:
        self.gate.observe(step.stats)
        self.metrics.record_moves(step.moves)

    def _content_is_damaged(self, digest: str, reason: str) -> None:
        if self.registry.quarantine(digest, reason):
            self.metrics.count_quarantine()

    async def _start_first(self, model: ModelCard) -> None:
        if self.config.adapters_path is not None:
            self._on_imported(await self.registry.import_folder(self.config.adapters_path))
        self._on_ready(model)


def service_of(request: Request) -> Service:
    """The service behind the app that got this request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
