"""The target's own numbers, and whether they agree with the client's. Knows the metrics' names of several servers.

Warm-up requests lie before the first scrape. Sources of the names: heddle's own; vLLM v1/metrics/loggers.py; SGLang
srt/metrics/collector.py (it counts requests with any end together); llama.cpp tools/server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.ending import Ending, ending_of
from heddle_loadtest.measure.scraped import Increases
from heddle_loadtest.run.outcome import Outcome

COUNT_TOLERANCE = 0.01  # of the client's number
TTFT_TOLERANCE = 0.1
TTFT_TOLERANCE_SECONDS = 0.01  # HTTP and two event loops lie between the two clocks

_UNFINISHED = ("error", "disconnect", "abort")
_FINISHED_REQUESTS = ("heddle_requests_total", "vllm:request_success_total", "sglang:num_requests_total")
_OUTPUT_TOKENS = (
    "heddle_generated_tokens_total",
    "vllm:generation_tokens_total",
    "sglang:generation_tokens_total",
    "llamacpp:tokens_predicted_total",
)
_TTFT = (
    "heddle_time_to_first_token_seconds",
    "vllm:time_to_first_token_seconds",
    "sglang:time_to_first_token_seconds",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One number that both sides know."""

    name: str
    metric: str  # of the target, that it was read from
    client: float
    server: float
    is_within_tolerance: bool

    @property
    def relative_difference(self) -> float | None:
        """(server - client) / client; None where the client has 0."""
        return (self.server - self.client) / self.client if self.client else None

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        relative_difference = self.relative_difference
        return {
            "name": self.name,
            "metric": self.metric,
            "client": round(self.client, 6),
            "server": round(self.server, 6),
            "relative_difference": None if relative_difference is None else round(relative_difference, 6),
            "is_within_tolerance": self.is_within_tolerance,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerNumbers:
    """Over all repeats that have scrapes. None, or empty: the target does not count it."""

    checks: tuple[Check, ...]
    num_steps: float | None
    segments_per_step: float | None  # different adapters that a step computed, the base model among them
    tokens_per_step: float | None  # computed, of prompts and answers
    hits_by_tier: dict[str, float]  # requests by where their adapter was; disk is a miss
    num_adapter_loads: float | None  # to the device
    adapter_load_bytes: dict[str, float]  # by the tier they came from
    adapter_evictions: dict[str, float]  # by the tier they were dropped from
    num_preemptions: float | None
    prefix_hit_rate: float | None  # of the prompt tokens looked up in the prefix cache

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        values = {name: value for name, value in asdict(self).items() if name != "checks"}
        return {"checks": [check.to_json() for check in self.checks], **values}


def server_numbers(outcomes: Sequence[Outcome]) -> ServerNumbers | None:
    """The numbers of the repeats that were scraped at least twice; None if none was."""
    scraped = [outcome for outcome in outcomes if len(outcome.scrapes) >= 2]
    if not scraped:
        return None
    all_increases = [Increases(outcome) for outcome in scraped]
    results = [result for outcome in scraped for result in outcome.results]
    num_steps = _total(all_increases, "heddle_engine_steps_total")
    return ServerNumbers(
        checks=tuple(_checks(results, all_increases)),
        num_steps=num_steps,
        segments_per_step=_ratio(_total(all_increases, "heddle_segments_total"), num_steps),
        tokens_per_step=_ratio(_total(all_increases, "heddle_computed_tokens_total"), num_steps),
        hits_by_tier=_by_label(all_increases, "heddle_adapter_cache_requests_total", "tier"),
        num_adapter_loads=_total(all_increases, "heddle_adapter_loads_total"),
        adapter_load_bytes=_by_label(all_increases, "heddle_adapter_load_bytes_total", "source"),
        adapter_evictions=_by_label(all_increases, "heddle_adapter_evictions_total", "tier"),
        num_preemptions=_first_total(all_increases, ("heddle_preemptions_total", "vllm:num_preemptions_total"))[1],
        prefix_hit_rate=_ratio(
            _total(all_increases, "heddle_prefix_cache_hits_total"),
            _total(all_increases, "heddle_prefix_cache_queries_total"),
        ),
    )


def _checks(results: Sequence[RequestResult], all_increases: Sequence[Increases]) -> Iterator[Check]:
    """What client and target both counted.

    A request that the client gave up, or lost, may have been finished by the target: so much more it may count.
    """
    num_unsure = sum(ending_of(result) is not Ending.OK for result in results)
    tokens = [result.num_output_tokens for result in results]
    num_ok = len(results) - num_unsure
    yield from _count_check("finished requests", num_ok, num_unsure, all_increases, _FINISHED_REQUESTS)
    most_tokens = num_unsure * max(tokens, default=0)
    yield from _count_check("output tokens", sum(tokens), most_tokens, all_increases, _OUTPUT_TOKENS)
    yield from _ttft_check(results, all_increases)


def _count_check(
    name: str, client: float, slack: float, all_increases: Sequence[Increases], metrics: Sequence[str]
) -> Iterator[Check]:
    metric, server = _first_total(all_increases, metrics, _UNFINISHED)
    if server is not None:
        is_within = abs(server - client) <= COUNT_TOLERANCE * client + slack
        yield Check(name=name, metric=metric, client=client, server=server, is_within_tolerance=is_within)


def _ttft_check(results: Sequence[RequestResult], all_increases: Sequence[Increases]) -> Iterator[Check]:
    """Means, since a histogram's buckets are too wide for a percentile; the client's from when it sent."""
    sent_to_first = [
        result.ttft_seconds - result.lag_seconds
        for result in results
        if result.is_ok and result.ttft_seconds is not None
    ]
    for metric in _TTFT:
        server = _ratio(_total(all_increases, f"{metric}_sum"), _total(all_increases, f"{metric}_count"))
        if server is not None and sent_to_first:
            client = sum(sent_to_first) / len(sent_to_first)
            is_within = abs(server - client) <= max(TTFT_TOLERANCE * client, TTFT_TOLERANCE_SECONDS)
            name = "mean time to first token"
            yield Check(name=name, metric=metric, client=client, server=server, is_within_tolerance=is_within)
            return


def _first_total(
    all_increases: Sequence[Increases], metrics: Sequence[str], leave_out: tuple[str, ...] = ()
) -> tuple[str, float | None]:
    """The first of `metrics` that the target has, and by how much it grew."""
    for metric in metrics:
        if (total := _total(all_increases, metric, leave_out)) is not None:
            return metric, total
    return "", None


def _total(all_increases: Sequence[Increases], metric: str, leave_out: tuple[str, ...] = ()) -> float | None:
    totals = [increases.total(metric, leave_out) for increases in all_increases]
    known = [total for total in totals if total is not None]
    return sum(known) if known else None


def _by_label(all_increases: Sequence[Increases], metric: str, label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for increases in all_increases:
        for value, amount in increases.by_label(metric, label).items():
            found[value] = found.get(value, 0.0) + amount
    return found


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
