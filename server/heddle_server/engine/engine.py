"""The engine: requests in, tokens out, one step at a time. Usable in-process for tests and offline work.

It knows nothing of text, HTTP or sockets: token ids go in, token ids come out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.device_rows import DeviceRows
from heddle_adapters.errors import AdapterDamaged, AdapterError, AdapterExceedsPool, StoreUnusable
from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.host_tier import HostTier
from heddle_adapters.loader import AdapterLoader
from heddle_adapters.page_pool import PagePool
from heddle_adapters.residency import AdapterCapacity, Residency
from heddle_adapters.row_compiler import RowCompiler
from heddle_adapters.tier import AdapterMove
from heddle_kernels.dispatch import BackendUnavailable, Kernels, select_kernels
from heddle_server.config import PAGE_TOKENS, ConfigError, EngineConfig
from heddle_server.engine.adapter_batch import ForwardContext
from heddle_server.engine.base_linear import BaseLinears
from heddle_server.engine.base_weights import keep_base_weights
from heddle_server.engine.fused_modules import fuse_modules
from heddle_server.engine.grammar import GrammarFailed, Grammars
from heddle_server.engine.kv_cache import KvCache
from heddle_server.engine.model_loader import LoadedModel, load_model, measure_weights
from heddle_server.engine.model_runner import LaunchedStep, ModelRunner
from heddle_server.engine.resources import default_threads, host_cache_bytes, pool_bytes
from heddle_server.engine.sampler import Sampled
from heddle_server.engine.scheduler import Chunk, PoolTooSmall, Scheduler
from heddle_server.engine.self_test import self_test
from heddle_server.engine.sequence import Sequence
from heddle_server.engine.weave import base_biases, weave
from heddle_server.engine.woven_places import groups_of, weave_places
from heddle_server.grammar_compiler import GrammarCompiler
from heddle_server.messages import (
    AdmissionReport,
    CacheReport,
    EngineStats,
    FinishReason,
    ModelCard,
    TokenOutput,
)
from heddle_server.request import Request

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)


class AdapterOverflow(AdapterError):
    """An adapter drives the model's arithmetic out of its range."""


Progress = Callable[[str, float, str], None]  # (phase, seconds, detail)

FOUR_BIT = ("nf4", "fp4")

ERROR_CODES: tuple[tuple[type[Exception], str], ...] = (
    (AdapterDamaged, "adapter_damaged"),
    (AdapterExceedsPool, "adapter_too_large"),
    (AdapterCapacity, "adapter_capacity"),
    (PoolTooSmall, "adapter_capacity"),
    (StoreUnusable, "store_unusable"),
    (AdapterError, "adapter_load_failed"),
    (GrammarFailed, "grammar_failed"),
    (Exception, "internal_error"),
)


class Engine:
    """One base, one page pool, one scheduler. All methods are called from one thread."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: Progress = lambda phase, seconds, detail: None,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """Loads the base. `on_loaded` is called in a loader thread whenever an adapter has come nearer.

        Raises ConfigError when the base cannot be served with these settings.
        """
        with _phase("weights", on_progress):
            loaded = load_model(config)
        torch.set_num_threads(config.num_threads or default_threads(loaded.weights_bytes))
        kernels = _select_kernels(config, loaded)
        ops = kernels.ops
        with _phase("kernels", on_progress):
            context = ForwardContext(ops)
            biases = base_biases(loaded.model)
            if config.load_format != "dummy":  # random weights are no adapter's base
                keep_base_weights(loaded, Path(config.store_path))
            if loaded.dtype != torch.float32:  # who asks for that compares to the last digit
                fuse_modules(loaded.model, ops.elementwise, loaded.dtype, loaded.device)
            if config.base_cache != "none" and loaded.quantization not in FOUR_BIT:
                raise ConfigError(
                    f"--base-cache {config.base_cache} keeps 4-bit weights written out, and this base has none "
                    f"(quantization: {loaded.quantization}): leave it out, or choose --quantization nf4 or fp4."
                )
            base_linears = BaseLinears(ops, loaded.dtype, keep_dense=config.base_cache == "bf16")
            linears, groups = weave(loaded.model, loaded.shared_inputs, base_linears, context)
            others, layers = weave_places(loaded.model, loaded.places, len(linears), context)
            ops.prepare(groups + groups_of(others, len(linears)), loaded.dtype)
        with _phase("self-test", on_progress):
            self_test(loaded.model, loaded.kv_layout, loaded.dtype, ops)
        layout = BaseLayout(
            config.model_name,
            loaded.fingerprint,
            loaded.quantization,
            sites=linears + others,
            layers=layers,
            kv=loaded.kv_layout,
            embedding=loaded.places.embedding,
            head=loaded.places.head,
            head_is_tied=loaded.places.head_is_tied,
            allows_dense=config.allow_dense_adapters,
        )
        with _phase("page pool", on_progress):
            page_bytes = loaded.kv_layout.page_bytes(PAGE_TOKENS, loaded.dtype.itemsize)
            num_pages = pool_bytes(config, loaded.device) // page_bytes
            max_model_len = _max_model_len(config, loaded, num_pages)
            memory = torch.zeros((num_pages + 1) * page_bytes, dtype=torch.uint8, device=loaded.device)
            pool = PagePool(num_pages, page_bytes, EvictionOrder(config.eviction))
        rows = DeviceRows(memory[: num_pages * page_bytes], pool, loaded.dtype, layout, biases)
        compiler = RowCompiler(Path(config.store_path), layout, _name_of(loaded.dtype), page_bytes, biases)
        self._runner = ModelRunner(loaded, context, rows, memory, num_pages, PAGE_TOKENS, max_model_len, ops)
        self._pool = pool
        self._kv_cache = KvCache(pool, PAGE_TOKENS)
        self._host = HostTier(host_cache_bytes(config), EvictionOrder(config.eviction))
        self._residency = Residency(
            AdapterLoader(compiler, rows, on_loaded),
            rows,
            pool,
            self._host,
            tenant_page_limit=int(config.tenant_pool_share * num_pages),
        )
        self._scheduler = Scheduler(self._kv_cache, self._residency, config.max_batch_tokens, config.max_batch_requests)
        self._sequences: dict[int, Sequence] = {}
        self._refused: list[tuple[Sequence, Exception]] = []  # to be told at the next step
        self.num_steps = 0
        self._num_computed_tokens = 0
        self._step_seconds = 0.0
        self._host_seconds = 0.0
        self._overlap = config.overlap == "on" or (config.overlap == "auto" and loaded.device.type == "cuda")
        self._in_flight: LaunchedStep | None = None  # where steps overlap: launched, and not collected
        self._compiling: list[tuple[Sequence, Future[LLMatcher]]] = []  # requests whose grammar is not ready
        with _phase("grammars", on_progress):
            vocabulary_size = int(loaded.model.get_input_embeddings().weight.shape[0])
            tokenizer_path = Path(config.model_path) / "tokenizer.json"
            self._grammars = Grammars(GrammarCompiler(tokenizer_path, vocabulary_size, loaded.eos_token_ids), on_loaded)
        self.model = _model_card(loaded, layout, max_model_len, num_pages, page_bytes)

    @property
    def has_requests(self) -> bool:
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        """Queue a request. The API process has checked lengths and ranges."""
        assert request.request_id not in self._sequences, f"request {request.request_id} is already here"
        sequence = Sequence.of(request, self.model.max_model_len, self.model.vocabulary_size)
        self._sequences[request.request_id] = sequence
        if not 0 < sequence.num_prompt_tokens < self.model.max_model_len:  # admitted by what an earlier engine could
            self._refused.append((sequence, PoolTooSmall(sequence)))
        elif request.sampling.grammar is not None:
            self._compiling.append((sequence, self._grammars.begin(request.sampling.grammar)))
        else:
            self._scheduler.add(sequence)

    def abort(self, request_id: int) -> None:
        """Forget a request and free what it holds; unknown ids have ended already."""
        if (sequence := self._sequences.pop(request_id, None)) is not None:
            self._scheduler.finish(sequence)
            self._refused = [refusal for refusal in self._refused if refusal[0] is not sequence]
            self._compiling = [waiting for waiting in self._compiling if waiting[0] is not sequence]

    def prepare_adapter(self, digest: str) -> None:
        """New content: compile its rows in the background, so that its first request finds them."""
        self._residency.prepare(digest)

    def pin_adapters(self, tenants: Mapping[str, str]) -> None:
        """Keep these on the device from now on, by digest, each in its tenant's share, in place of those before."""
        self._residency.pin(tenants)

    def forget_adapter(self, digest: str) -> None:
        """No request will name this adapter again."""
        self._residency.forget(digest)

    def take_moves(self) -> list[AdapterMove]:
        """Which adapters have changed tiers since this was last asked."""
        return self._residency.take_moves()

    def step(self) -> list[TokenOutput]:
        """Plan and launch a step, then tell the tokens of the one that is done.

        Where steps overlap that is the one before: the host plans while the device computes. Empty when every request
        waits for an adapter, or none is there.
        """
        started, device_seconds = time.monotonic(), self._runner.device_seconds
        self._add_compiled()
        outputs = self._collect_before_planning()
        plan = self._scheduler.plan()
        failed = plan.failed + self._refused
        self._refused = []
        outputs += [self._fail(sequence, error) for sequence, error in failed]
        launched = self._launch(plan.chunks, outputs) if plan.chunks else None
        if self._overlap:
            self._in_flight, launched = launched, self._in_flight
        if launched is not None:
            outputs += self._collect(launched)
        if plan.chunks or outputs:
            elapsed = time.monotonic() - started
            self._step_seconds += elapsed
            self._host_seconds += elapsed - (self._runner.device_seconds - device_seconds)
        return outputs

    def _add_compiled(self) -> None:
        """Queue the requests whose grammar has been compiled since."""
        waiting, self._compiling = self._compiling, []
        for sequence, compiled in waiting:
            if not compiled.done():
                self._compiling.append((sequence, compiled))
                continue
            try:
                sequence.grammar = self._grammars.state_of(compiled)
            except GrammarFailed as error:
                self._refused.append((sequence, error))
            else:
                self._scheduler.add(sequence)

    def _collect_before_planning(self) -> list[TokenOutput]:
        """The step in flight, where a request of it can only go on with its token known: for these, steps do not
        overlap."""
        step = self._in_flight
        if step is None or not any(chunk.sequence.reads_tokens for chunk in step.completing):
            return []
        self._in_flight = None
        return self._collect(step)

    def _launch(self, chunks: list[Chunk], outputs: list[TokenOutput]) -> LaunchedStep | None:
        """Give the runner a step. If it cannot be computed, its requests end with an error, told in `outputs`."""
        self.num_steps += 1
        try:
            launched = self._runner.launch(chunks, self._in_flight)
        except Exception as error:
            if self.model.device == "cuda":
                raise  # after a device error the whole context is unusable
            logger.exception("a step failed; its requests end with an error, the others go on")
            outputs += [self._fail(chunk.sequence, error) for chunk in chunks]
            return None
        for chunk in launched.chunks:
            chunk.sequence.num_unscored -= len(chunk.scored)
            chunk.sequence.num_computed += chunk.num_tokens
            chunk.sequence.num_unread += chunk.completes
            self._num_computed_tokens += chunk.num_tokens
        return launched

    def _collect(self, step: LaunchedStep) -> list[TokenOutput]:
        """Advance the sequences of a step that is done, but for those that have ended in the meantime."""
        outputs = list[TokenOutput]()
        for chunk in step.chunks:
            if not chunk.completes and self._is_here(chunk.sequence):
                self._kv_cache.remember(chunk.sequence)
        for sequence, scores in step.scores:
            sequence.prompt_logprobs += scores.read()
        for chunk, token in zip(step.completing, self._runner.read(step), strict=True):
            sequence = chunk.sequence
            sequence.num_unread -= 1
            if not self._is_here(sequence):
                continue
            if token is None:
                outputs.append(self._fail(sequence, self._not_finite(sequence)))
            else:
                outputs.append(self._advance(sequence, token))
        return outputs

    def _is_here(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request.request_id) is sequence

    def stats(self) -> EngineStats:
        """Gauges of this moment, counters since the start."""
        pool, residency, scheduler, host = self._pool, self._residency, self._scheduler, self._host
        num_cached = self._kv_cache.num_idle_pages
        num_adapter = residency.num_pages
        num_loading = residency.num_loading_pages
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_kv_pages=pool.num_pages - pool.num_free - num_cached - num_adapter - num_loading,
            num_cached_pages=num_cached,
            num_adapter_pages=num_adapter,
            num_resident_adapters=residency.num_resident,
            num_steps=self.num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_pinned_pages=residency.num_pinned_pages,
            num_loading_pages=num_loading,
            adapter_used_bytes=residency.used_bytes,
            host_bytes=host.num_bytes,
            host_budget_bytes=host.budget_bytes,
            num_host_adapters=host.num_adapters,
            num_device_hits=residency.num_requests["device"],
            num_host_hits=residency.num_requests["host"],
            num_misses=residency.num_requests["disk"],
            num_adapter_loads=residency.num_loads,
            num_adapter_evictions=residency.num_evictions,
            num_host_evictions=host.num_evictions,
            num_prefix_queries=self._kv_cache.num_queries,
            num_prefix_hits=self._kv_cache.num_hits,
            num_prefix_evictions=self._kv_cache.num_evictions,
            num_segments=self._runner.num_segments,
            num_computed_tokens=self._num_computed_tokens,
            step_seconds=self._step_seconds,
            host_seconds=self._host_seconds,
        )

    def describe_cache(self, query_id: int) -> CacheReport:
        """What lies in the pool and the host tier at this moment."""
        return CacheReport(query_id, self._pool.eviction.policy, self._residency.describe(), self.stats())

    def check_integrity(self) -> None:
        """Every page, reference and table line is accounted for."""
        self._pool.check_integrity()
        self._kv_cache.check_integrity(list(self._scheduler.sequences()))
        self._residency.check_integrity()

    def close(self) -> None:
        self._grammars.close()
        self._residency.close()

    def _advance(self, sequence: Sequence, sampled: Sampled) -> TokenOutput:
        """Append the new token; end the sequence where it ends."""
        sequence.append(sampled.token_id)
        if sequence.grammar is not None and sequence.grammar.failure is not None:
            return self._fail(sequence, sequence.grammar.failure)
        self._kv_cache.remember(sequence)
        is_first = sequence.num_generated == 1
        wants_prompt_logprobs = sequence.request.sampling.num_prompt_logprobs is not None
        finish_reason = self._finish_reason(sequence)
        if finish_reason is not None:
            del self._sequences[sequence.request.request_id]
            self._scheduler.finish(sequence)
        return TokenOutput(
            request_id=sequence.request.request_id,
            token_ids=[sampled.token_id],
            logprobs=None if sampled.logprobs is None else (sampled.logprobs,),
            finish_reason=finish_reason,
            num_cached_tokens=sequence.num_cached,
            admission=_admission(sequence) if is_first else None,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first and wants_prompt_logprobs else None,
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        sampling, last = sequence.request.sampling, sequence.token_ids[-1]
        if last in sampling.stop_token_ids or (last in self.model.eos_token_ids and not sampling.ignore_eos):
            return "stop"
        if sequence.grammar is not None and sequence.grammar.is_over:
            return "stop"
        return "length" if len(sequence.token_ids) >= sequence.max_num_tokens else None

    def _not_finite(self, sequence: Sequence) -> Exception:
        if not sequence.request.adapters:
            return ArithmeticError(f"The base's own logits are not finite in {self.model.dtype}.")
        return AdapterOverflow(
            f"The adapter's weights are too large for {self.model.dtype}: its logits are not finite. "
            "Check the checkpoint, or serve with --dtype float32."
        )

    def _fail(self, sequence: Sequence, error: Exception) -> TokenOutput:
        """End a request that cannot be served, and give back what it holds."""
        del self._sequences[sequence.request.request_id]
        self._scheduler.finish(sequence)
        code = next(code for kind, code in ERROR_CODES if isinstance(error, kind))
        if code == "internal_error":
            logger.error("request %d failed: %s", sequence.request.request_id, error)
        return TokenOutput(
            request_id=sequence.request.request_id,
            token_ids=[],
            finish_reason="error",
            error_code=code,
            error_message="The engine failed on this request." if code == "internal_error" else str(error),
        )


def _admission(sequence: Sequence) -> AdmissionReport:
    assert sequence.started_at is not None, "it has been computed and never started"
    return AdmissionReport(sequence.tier, sequence.load_seconds, sequence.started_at - sequence.arrived_at)


def _select_kernels(config: EngineConfig, loaded: LoadedModel) -> Kernels:
    try:
        kernels = select_kernels(loaded.device, loaded.dtype, config.kernels)
    except BackendUnavailable as error:
        raise ConfigError(f"--kernels {error}.") from error
    logger.info("kernels: %s (%s)", kernels.name, kernels.reason)
    return kernels


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _max_model_len(config: EngineConfig, loaded: LoadedModel, num_pages: int) -> int:
    """The longest context that the model knows, the user wants and the pool can hold."""
    wanted = config.max_model_len or loaded.context_length
    if wanted > loaded.context_length:
        raise ConfigError(f"--max-model-len is {wanted}; this model's own limit is {loaded.context_length}.")
    capacity = num_pages * PAGE_TOKENS
    if capacity < min(wanted, 2 * PAGE_TOKENS) or (config.max_model_len and capacity < wanted):
        raise ConfigError(
            f"the page pool holds {capacity} tokens, and a context of {wanted} is wanted. Raise --pool-bytes or "
            "--memory-fraction, or lower --max-model-len."
        )
    return min(wanted, capacity)


def _model_card(
    loaded: LoadedModel, layout: BaseLayout, max_model_len: int, num_pages: int, page_bytes: int
) -> ModelCard:
    weights_bytes, quantized_bytes = measure_weights(loaded.model)  # as woven: joined, repacked, or kept twice
    return ModelCard(
        layout=layout,
        dtype=_name_of(loaded.dtype),
        device=loaded.device.type,
        vocabulary_size=loaded.model.get_input_embeddings().weight.shape[0],
        max_model_len=max_model_len,
        eos_token_ids=loaded.eos_token_ids,
        weights_bytes=weights_bytes,
        quantized_bytes=quantized_bytes,
        pool_bytes=num_pages * page_bytes,
        page_bytes=page_bytes,
        page_tokens=PAGE_TOKENS,
        num_pages=num_pages,
    )


@contextmanager
def _phase(name: str, on_progress: Progress) -> Iterator[None]:
    start = time.monotonic()
    yield
    on_progress(name, time.monotonic() - start, "")
