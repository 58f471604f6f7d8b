"""Requests, repeats and workloads whose every number is known, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heddle_loadtest.client.result import RequestError, RequestResult, ServerReport
from heddle_loadtest.run.outcome import ClientHealth, Outcome, Scrape
from heddle_loadtest.workload.spec import Closed, Poisson, Workload

OPEN_LOOP = Workload(name="sample", requests=4, arrivals=Poisson(rate=1.0))
CLOSED_LOOP = Workload(name="sample", requests=4, arrivals=Closed(streams=2))


def make_result(
    start: float,
    *chunks: float,
    adapter: str = "base",
    error: RequestError | None = None,
    lag: float = 0.0,
    **fields: Any,
) -> RequestResult:
    """Scheduled at `start`, sent `lag` later, content at each of `chunks`, over with the last (or after a second)."""
    defaults: dict[str, Any] = {
        "adapter": adapter,
        "scheduled_seconds": start,
        "started_seconds": start + lag,
        "finished_seconds": chunks[-1] if chunks else start + 1.0,
        "chunk_seconds": chunks,
        "text": "x" * len(chunks),
        "num_prompt_tokens": 7,
        "num_output_tokens": len(chunks),
        "finish_reason": None if error else "stop",
        "http_status": 200,
        "error": error,
    }
    return RequestResult(**{**defaults, **fields})


def make_cached_result(start: float, *chunks: float, cache: str | None, **fields: Any) -> RequestResult:
    """The same with heddle's report: `cache`, and queue and load times unless `fields` say otherwise."""
    load_seconds = {None: None, "device": 0.0}.get(cache, 0.1)
    report = ServerReport(cache=cache, load_seconds=load_seconds, queue_seconds=0.2, ttft_seconds=0.3)
    return make_result(start, *chunks, adapter="base" if cache is None else "poet", server=report, **fields)


def make_outcome(
    results: Sequence[RequestResult],
    *,
    seed: int = 0,
    started: float = 0.0,
    ended: float | None = None,
    cpu_share: float = 0.1,
    loop_lag: Sequence[float] = (),
    scrapes: Sequence[Mapping[str, float]] = (),
    **fields: Any,
) -> Outcome:
    """A repeat that ends with its last request unless `ended` says otherwise, scraped once a second."""
    return Outcome(
        seed=seed,
        started_at="2026-11-21T00:00:00Z",
        started_seconds=started,
        ended_seconds=max((result.finished_seconds for result in results), default=started) if ended is None else ended,
        was_interrupted=fields.pop("was_interrupted", False),
        results=tuple(results),
        scrapes=tuple(Scrape(at_seconds=started + second, samples=samples) for second, samples in enumerate(scrapes)),
        health=ClientHealth(cpu_share=cpu_share, loop_lag_seconds=tuple(loop_lag)),
        **fields,
    )
