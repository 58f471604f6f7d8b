"""Static batches: what waits when the model is free goes through one `generate`, and who comes later waits for its end.

The model has a thread of its own. Knows no HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from heddle_loadtest.baseline.job import Job, StepStream
from heddle_loadtest.baseline.peft_runner import OnStep, PeftRunner
from heddle_loadtest.baseline.request import GenerationRequest, Step

STOPPING = "the baseline is stopping"

Generate = Callable[[Sequence[GenerationRequest], OnStep], object]
Choose = Callable[[Sequence[Job]], list[Job]]  # who of those waiting may be in one batch


def first_come(waiting: Sequence[Job]) -> list[Job]:
    """All, in the order they came."""
    return list(waiting)


def one_adapter(waiting: Sequence[Job]) -> list[Job]:
    """Those of the oldest one's adapter."""
    return [job for job in waiting if job.request.adapter == waiting[0].request.adapter]


class StaticBatches:
    """A queue, and the thread that answers it batch by batch."""

    def __init__(self, generate: Generate, choose: Choose, max_batch: int, max_wait_seconds: float) -> None:
        """A batch waits for more until the oldest of its requests is `max_wait_seconds` old."""
        self._generate = generate
        self._choose = choose
        self._max_batch = max_batch
        self._max_wait_seconds = max_wait_seconds
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._failure: str | None = None  # nothing is answered any more
        self._thread = threading.Thread(target=self._run, name="static-batches")
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._changed:
            if self._failure is not None:
                job.stream.fail(self._failure)
                return
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        self._fail_all(STOPPING)
        self._thread.join()

    def _run(self) -> None:
        while batch := self._take_batch():
            try:
                self._answer(batch)
            except Exception as error:  # whatever it was: the clients are told, and the process can still be stopped
                # PEFT leaves the batch's adapter names in the layers when `generate` fails: what came after would be
                # wrong, so nothing does.
                self._fail_all(f"PEFT failed: {type(error).__name__}: {error}")
            if self._failure is not None:
                for job in batch:
                    job.stream.fail(self._failure)

    def _answer(self, batch: list[Job]) -> None:
        def on_step(steps: Sequence[Step | None]) -> bool:
            StepStream.deliver((job.stream, step) for job, step in zip(batch, steps, strict=True) if step is not None)
            return self._failure is None

        self._generate([job.request for job in batch], on_step)

    def _take_batch(self) -> list[Job]:
        """Waits for one; empty when there will be none any more."""
        with self._changed:
            while self._failure is None:
                self._waiting = [job for job in self._waiting if not job.stream.is_abandoned]
                batch = self._choose(self._waiting)[: self._max_batch] if self._waiting else []
                if batch and (len(batch) == self._max_batch or self._left_seconds(batch) <= 0):
                    self._waiting = [job for job in self._waiting if job not in batch]
                    return batch
                self._changed.wait(self._left_seconds(batch) if batch else None)
            return []

    def _left_seconds(self, batch: list[Job]) -> float:
        return batch[0].submitted_seconds + self._max_wait_seconds - time.monotonic()

    def _fail_all(self, failure: str) -> None:
        with self._changed:
            self._failure = self._failure or failure
            for job in self._waiting:
                job.stream.fail(self._failure)
            self._waiting = []
            self._changed.notify()


def static_batches(runner: PeftRunner, *, is_mixed: bool, max_batch: int, max_wait_seconds: float) -> StaticBatches:
    """Batches of any adapters, or of one each."""
    if is_mixed:
        return StaticBatches(runner.generate_mixed, first_come, max_batch, max_wait_seconds)
    return StaticBatches(runner.generate_grouped, one_adapter, max_batch, max_wait_seconds)
