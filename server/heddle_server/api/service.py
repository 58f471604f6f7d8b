"""The parts of one running server, put together once and handed to the routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Self

from starlette.requests import Request

from heddle_adapters.store import AdapterStore
from heddle_server.api.adapter_card import AdapterCards
from heddle_server.api.adapter_holds import AdapterHolds
from heddle_server.api.admission import Admission
from heddle_server.api.answer_format import answer_format
from heddle_server.api.answer_reader import load_parser
from heddle_server.api.chat_template import ChatTemplate
from heddle_server.api.engine_client import ENGINE_COMMAND, EngineClient
from heddle_server.api.grammar_checker import GrammarChecker
from heddle_server.api.loopback import is_loopback
from heddle_server.api.metrics import Metrics
from heddle_server.api.overload import LoadGate
from heddle_server.api.registry import AdapterRegistry, ImportReport
from heddle_server.api.request_rate import RequestRates
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.api.upload_places import UploadPlaces
from heddle_server.audit_log import AuditLog
from heddle_server.config import ConfigError, ServerConfig
from heddle_server.key_store import KeyStore
from heddle_server.messages import ModelCard, StartupProgress, StepOutput
from heddle_server.version import heddle_version


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
        self.audit = AuditLog(config.store_path)
        with ExitStack() as opened:
            self.keys = opened.enter_context(KeyStore(config.store_path, self.audit))
            check_exposure(config, self.keys)
            self.store = opened.enter_context(AdapterStore(config.store_path, config.keep_versions))
            self._opened = opened.pop_all()
        self.request_rates = RequestRates()
        self.change_rates = RequestRates("requests that change adapters")
        self.upload_places = UploadPlaces()
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
        self.registry = AdapterRegistry(
            self.store,
            self.keys,
            self.audit,
            self.engine,
            self.holds,
            self.disk_worker,
            self.model_name,
            config.engine.tenant_pool_share,
        )
        self.cards = AdapterCards(self.store, self.engine)
        self.gate = LoadGate(
            max_requests=config.max_queued_requests,
            max_wait_seconds=config.max_queue_seconds,
            max_batch_tokens=config.engine.max_batch_tokens,
            max_batch_requests=config.engine.max_batch_requests,
            on_refused=self.metrics.count_refusal,
            queued_token_limit=lambda tenant: self.keys.limits_of(tenant).queued_tokens,
            is_shared=lambda: self.keys.has_keys,
        )
        self._answer_format = answer_format(
            self.tokenizer.config, chat_template.source, self.tokenizer.special_token_ids
        )
        self.grammars = GrammarChecker(model_path / "tokenizer.json")
        self.admission = Admission(
            model_name=self.model_name,
            engine=self.engine,
            tokenizer=self.tokenizer,
            chat_template=chat_template,
            answer_format=self._answer_format,
            grammars=self.grammars,
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
    def fingerprint(self) -> str:
        """Changes with what may change an answer, adapters and sampling aside: OpenAI's `system_fingerprint`."""
        model = self.engine.model
        parts = (heddle_version(), *((model.layout.fingerprint, model.dtype, model.device) if model else ()))
        return f"fp_{sha256(repr(parts).encode()).hexdigest()[:12]}"

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
        await self.grammars.close()
        await self.engine.close()
        self.disk_worker.shutdown()
        self._opened.close()

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
        if self._answer_format is not None:
            await asyncio.to_thread(load_parser)  # seconds, which no request is to wait for
        if self.config.adapters_path is not None:
            self._on_imported(await self.registry.import_folder(self.config.adapters_path))
        self._on_ready(model)


def check_exposure(config: ServerConfig, keys: KeyStore) -> None:
    """Raises `ConfigError` where a server without keys would listen to other machines."""
    if config.allow_anonymous or keys.has_keys or is_loopback(config.host):
        return
    raise ConfigError(
        f"--host is {config.host}, which other machines can reach, and there are no API keys: anybody could use this "
        f"server and change its adapters. Make a key with `heddle keys create --store {config.store_path}`, listen on "
        "--host 127.0.0.1, or say --allow-anonymous."
    )


def service_of(request: Request) -> Service:
    """The service behind the app that got this request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
