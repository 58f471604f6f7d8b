"""transformers' continuous batching with one adapter active at a time. Knows no HTTP.

Requests of the active adapter join at any step. When none of them is left, or another adapter's have waited long
enough, the adapter changes. transformers' manager names no adapters, and its prefix sharing finds a prompt's keys and
values whichever adapter computed them (`compute_block_hash` hashes tokens alone), so that sharing is off here.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from heddle_loadtest.baseline.job import Job, StepStream
from heddle_loadtest.baseline.peft_runner import PAD_TOKEN_ID, PeftRunner
from heddle_loadtest.baseline.request import Answer
from heddle_loadtest.baseline.static_batches import STOPPING

POLL_SECONDS = 0.1  # how long closing waits for the thread that hands out tokens
STOP_SECONDS = 60.0  # for the step that is under way
NO_END_TOKEN = -1  # transformers' word for: none ends an answer
PAGE_TOKENS = 256
# On a GPU transformers sizes its cache by the free memory; of a machine's main memory it would take most as well.
CPU_CACHE_TOKENS = 512  # per request of a batch
CPU_STEP_TOKENS = 1024


@dataclass(frozen=True)
class _Running:
    job: Job
    answer: Answer


class ContinuousBatches:
    """Around one ContinuousBatchingManager, and a thread that hands out its tokens."""

    def __init__(self, runner: PeftRunner, max_batch: int, switch_seconds: float, *, shares_prefixes: bool = False):
        """`shares_prefixes` gives wrong answers with more than one adapter: for the proof of it.

        Raises ValueError, RuntimeError or MemoryError if the manager cannot serve this base.
        """
        self._runner = runner
        self._max_batch = max_batch
        self._switch_seconds = switch_seconds
        self._lock = threading.Lock()
        self._waiting: list[Job] = []
        self._running: dict[str, _Running] = {}  # by the manager's request id
        self._ids = itertools.count()
        self._failure: str | None = None  # nothing is answered any more
        self._active: str | None = None
        runner.activate(None)
        self._manager = runner.base.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_END_TOKEN, pad_token_id=PAD_TOKEN_ID),
            continuous_batching_config=_config(runner, max_batch, shares_prefixes),
        )
        self._manager.warmup()  # makes the cache here and now, where a failure can still be told
        self._manager.start()
        self._thread = threading.Thread(target=self._hand_out, name="continuous-batches")
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._lock:
            if self._failure is not None:
                job.stream.fail(self._failure)
                return
            self._waiting.append(job)
            self._admit()

    def close(self) -> None:
        with self._lock:
            self._fail_all(STOPPING)
        self._thread.join()
        self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)
        self._manager.destroy()

    def _hand_out(self) -> None:
        while self._failure is None:
            output = self._manager.get_result(timeout=POLL_SECONDS)
            with self._lock:
                if output is not None:
                    self._deliver(output)
                    self._admit()
                elif not self._manager.is_running():
                    self._fail_all(f"continuous batching ended: {self._manager.background_thread_status.fatal_error}")

    def _deliver(self, output: Any) -> None:
        """An output holds all of an answer's tokens so far."""
        running = self._running.get(output.request_id)
        if running is None:
            return  # cancelled before
        answer, stream = running.answer, running.job.stream
        new_tokens = output.generated_tokens[len(answer.tokens) :]
        steps = (answer.take(token) for token in new_tokens)
        StepStream.deliver((stream, step) for step in steps if step is not None)
        if output.error is not None:
            stream.fail(f"continuous batching failed: {output.error}")
        if stream.is_abandoned and not output.is_finished():
            self._manager.cancel_request(output.request_id)
        if stream.is_abandoned or output.is_finished():
            del self._running[output.request_id]

    def _admit(self) -> None:
        """Lets the active adapter's requests join; changes the adapter when that is due and nothing is running."""
        self._waiting = [job for job in self._waiting if not job.stream.is_abandoned]
        if not self._waiting or self._failure is not None:
            return
        oldest = self._waiting[0]
        if not self._running:
            try:
                self._activate(oldest.request.adapter)
            except RuntimeError as error:  # its thread has ended
                self._fail_all(f"continuous batching ended: {error}")
                return
        is_other = oldest.request.adapter != self._active
        if is_other and time.monotonic() - oldest.submitted_seconds > self._switch_seconds:
            return  # what is running comes to its end, then it is the oldest one's turn
        joining = [job for job in self._waiting if job.request.adapter == self._active]
        for job in joining[: self._max_batch - len(self._running)]:
            self._waiting.remove(job)
            self._start(job)

    def _activate(self, adapter: str | None) -> None:
        if adapter != self._active:
            with self._manager.pause():  # no step is under way meanwhile
                self._runner.activate(adapter)
            self._active = adapter

    def _start(self, job: Job) -> None:
        request_id = f"request-{next(self._ids)}"
        request = job.request
        self._running[request_id] = _Running(job, Answer(request, self._runner.end_token_ids))
        end_token_ids = [] if request.ignore_eos else sorted(self._runner.end_token_ids)
        accepted = self._manager.add_request(
            request.prompt,
            request_id=request_id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=end_token_ids or NO_END_TOKEN,
        )
        if accepted is None:
            self._fail_all(f"continuous batching ended: {self._manager.background_thread_status.fatal_error}")

    def _fail_all(self, failure: str) -> None:
        self._failure = self._failure or failure
        for job in (*self._waiting, *(running.job for running in self._running.values())):
            job.stream.fail(self._failure)
        self._waiting, self._running = [], {}


def cache_tokens(runner: PeftRunner, max_batch: int) -> int | None:
    """Tokens that all requests together may hold; None: as many as the GPU has room for."""
    if runner.model.device.type == "cuda":
        return None
    wanted = max(max_batch * CPU_CACHE_TOKENS, min(runner.context_length, CPU_CACHE_TOKENS * 32))
    return -(-wanted // PAGE_TOKENS) * PAGE_TOKENS


def _config(runner: PeftRunner, max_batch: int, shares_prefixes: bool) -> ContinuousBatchingConfig:
    tokens = cache_tokens(runner, max_batch)
    return ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=None if tokens is None else tokens // PAGE_TOKENS,
        max_batch_tokens=None if tokens is None else min(CPU_STEP_TOKENS, tokens),
        max_requests_per_batch=max_batch,
        allow_block_sharing=shares_prefixes,
        use_cuda_graph=False,  # a graph would go on computing the adapter that it was captured with
        # Only to a FlashAttention that is installed: transformers would try to fetch one otherwise.
        auto_switch_to_flash=tokens is None and (is_flash_attn_3_available() or is_flash_attn_2_available()),
    )
