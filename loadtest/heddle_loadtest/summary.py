"""What a run came to: latencies, throughput and errors, in total and per adapter. Knows no clock and no terminal.

Latencies and tokens are those of the requests that succeeded; failed ones are counted by error code.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from heddle_loadtest.distribution import Distribution
from heddle_loadtest.result import RequestResult
from heddle_loadtest.spec import ClosedLoopSpec

SCHEMA_VERSION = 1  # of to_json(); counts up when a field changes its meaning or goes away, not when one is added


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The numbers of one adapter, or of all together. A distribution is None if nothing was measured."""

    num_ok: int
    num_failed: int
    num_output_tokens: int
    output_tokens_per_second: float
    requests_per_second: float
    ttft_seconds: Distribution | None
    tpot_seconds: Distribution | None
    inter_token_seconds: Distribution | None
    end_to_end_seconds: Distribution | None

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        distributions = {
            "ttft_seconds": self.ttft_seconds,
            "tpot_seconds": self.tpot_seconds,
            "inter_token_seconds": self.inter_token_seconds,
            "end_to_end_seconds": self.end_to_end_seconds,
        }
        return {
            "num_ok": self.num_ok,
            "num_failed": self.num_failed,
            "num_output_tokens": self.num_output_tokens,
            "output_tokens_per_second": round(self.output_tokens_per_second, 3),
            "requests_per_second": round(self.requests_per_second, 3),
            **{name: values.to_json() if values else None for name, values in distributions.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run's outcome with the settings that led to it."""

    spec: ClosedLoopSpec  # as fitted to the target
    elapsed_seconds: float  # from the first request's start to the last one's end
    was_interrupted: bool  # stopped before its end; requests under way then are not counted
    total: Row
    adapters: dict[str, Row]  # in the order of the spec
    errors: dict[str, int]  # code -> failed requests, most frequent first
    error_examples: dict[str, str]  # code -> the first message seen

    def to_json(self) -> dict[str, object]:
        """A dict of plain JSON values; holds no prompts and no key."""
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": _settings_json(self.spec),
            "elapsed_seconds": round(self.elapsed_seconds, 6),
            "was_interrupted": self.was_interrupted,
            "total": self.total.to_json(),
            "adapters": {name: row.to_json() for name, row in self.adapters.items()},
            "errors": self.errors,
            "error_examples": self.error_examples,
        }


def summarize(spec: ClosedLoopSpec, results: Sequence[RequestResult], *, was_interrupted: bool = False) -> Summary:
    """The summary of a run's measured requests."""
    elapsed_seconds = _elapsed_seconds(results)
    errors = [result.error for result in results if result.error is not None]
    return Summary(
        spec=spec,
        elapsed_seconds=elapsed_seconds,
        was_interrupted=was_interrupted,
        total=_row(results, elapsed_seconds),
        adapters={
            name: _row([result for result in results if result.adapter == name], elapsed_seconds)
            for name in dict.fromkeys(spec.adapters)
        },
        errors=dict(Counter(error.code for error in errors).most_common()),
        error_examples={error.code: error.message for error in reversed(errors)},
    )


def _row(results: Sequence[RequestResult], elapsed_seconds: float) -> Row:
    good = [result for result in results if result.is_ok]
    num_output_tokens = sum(result.num_output_tokens for result in good)
    return Row(
        num_ok=len(good),
        num_failed=len(results) - len(good),
        num_output_tokens=num_output_tokens,
        output_tokens_per_second=num_output_tokens / elapsed_seconds if elapsed_seconds else 0.0,
        requests_per_second=len(good) / elapsed_seconds if elapsed_seconds else 0.0,
        ttft_seconds=Distribution.of(result.ttft_seconds for result in good if result.ttft_seconds is not None),
        tpot_seconds=Distribution.of(result.tpot_seconds for result in good if result.tpot_seconds is not None),
        inter_token_seconds=Distribution.of(gap for result in good for gap in result.inter_token_seconds),
        end_to_end_seconds=Distribution.of(result.end_to_end_seconds for result in good),
    )


def _elapsed_seconds(results: Sequence[RequestResult]) -> float:
    if not results:
        return 0.0
    started_seconds = min(result.scheduled_seconds for result in results)
    return max(result.finished_seconds for result in results) - started_seconds


def _settings_json(spec: ClosedLoopSpec) -> dict[str, object]:
    return {
        "target": spec.target,
        "style": spec.style.value,
        "model": spec.model,
        "adapters": list(spec.adapters),
        "num_streams": spec.num_streams,
        "duration_seconds": spec.duration_seconds,
        "num_requests": spec.num_requests,
        "max_tokens": spec.max_tokens,
        "temperature": spec.temperature,
        "num_prompts": len(spec.prompts),
        "seed": spec.seed,
        "num_warmup_requests": spec.num_warmup_requests,
    }
