"""The parts of one running server, put together once and handed to the routes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from starlette.requests import Request

from heddle_adapters.store import AdapterStore
from heddle_server.api.adapter_holds import AdapterHolds
from heddle_server.api.admission import Admission
from heddle_server.api.chat_template import ChatTemplate
from heddle_server.api.engine_client import ENGINE_COMMAND, EngineClient
from heddle_server.api.metrics import Metrics
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.config import ServerConfig
from heddle_server.messages import ModelCard, StartupProgress


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
    ) -> None:
        """Reads the tokenizer and opens the store; raises `ConfigError` and `StoreUnusable` before anything starts."""
        model_path = Path(config.engine.model_path)
        self.config = config
        self.model_name = config.engine.model_name
        self.created = int(time.time())  # Unix seconds
        self.metrics = Metrics()
        self.tokenizer = Tokenizer(model_path)
        chat_template = ChatTemplate.from_folder(model_path, self.tokenizer.config, self.tokenizer.special_tokens)
        self.store = AdapterStore(config.store_path)
        self.engine = EngineClient(
            config.engine,
            max_restarts=config.max_engine_restarts,
            command=engine_command,
            on_progress=on_progress,
            on_ready=on_ready,
            on_failed=on_failed,
        )
        # One thread: checking an upload reads gigabytes, and must not keep tokenizers from theirs.
        self.disk_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self.holds = AdapterHolds(self.store, self.disk_worker, self.engine.forget_adapter)
        self.admission = Admission(
            model_name=self.model_name,
            engine=self.engine,
            tokenizer=self.tokenizer,
            chat_template=chat_template,
            store=self.store,
            holds=self.holds,
            metrics=self.metrics,
        )
        self.metrics.watch(lambda: self.engine.stats, lambda: self.engine.is_ready)

    async def __aenter__(self) -> Self:
        self.engine.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.engine.close()
        self.disk_worker.shutdown()
        self.store.close()


def service_of(request: Request) -> Service:
    """The service behind the app that got this request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
