"""The numbers of a group of requests: one adapter's, one tenant's, all. Decides no grouping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.measure.distribution import Distribution
from heddle_loadtest.measure.ending import Ending, ending_of
from heddle_loadtest.measure.goodput import Goodput, goodput_of, wilson_interval
from heddle_loadtest.workload.spec import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Latencies, tokens and rates are those of the requests that succeeded. A distribution of nothing is None."""

    num_ok: int
    num_failed: int
    num_abandoned: int  # neither ok nor failed: the run was stopped while they were under way
    num_output_tokens: int
    output_tokens_per_second: float
    requests_per_second: float
    ttft_seconds: Distribution | None
    tpot_seconds: Distribution | None
    inter_token_seconds: Distribution | None
    end_to_end_seconds: Distribution | None
    goodput: Goodput | None  # None if the workload sets no service level

    @property
    def error_rate(self) -> float | None:
        """Failed requests as a share of those that ended; None if none did."""
        num_ended = self.num_ok + self.num_failed
        return self.num_failed / num_ended if num_ended else None

    @property
    def error_rate_interval(self) -> tuple[float, float]:
        """95 %, Wilson's; 0 to 1 if no request ended."""
        return wilson_interval(self.num_failed, self.num_ok + self.num_failed)

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
            "error_rate": None if self.error_rate is None else round(self.error_rate, 6),
            "error_rate_interval": [round(bound, 6) for bound in self.error_rate_interval],
            "num_abandoned": self.num_abandoned,
            "num_output_tokens": self.num_output_tokens,
            "output_tokens_per_second": round(self.output_tokens_per_second, 3),
            "requests_per_second": round(self.requests_per_second, 3),
            **{name: values.to_json() if values else None for name, values in distributions.items()},
            "goodput": self.goodput.to_json() if self.goodput else None,
        }


def row_of(results: Sequence[RequestResult], elapsed_seconds: float, slo: Slo | None) -> Row:
    """The numbers of `results`, which ended within `elapsed_seconds`."""
    endings = [ending_of(result) for result in results]
    good = [result for result, ending in zip(results, endings, strict=True) if ending is Ending.OK]
    num_output_tokens = sum(result.num_output_tokens for result in good)
    return Row(
        num_ok=len(good),
        num_failed=endings.count(Ending.FAILED),
        num_abandoned=endings.count(Ending.ABANDONED),
        num_output_tokens=num_output_tokens,
        output_tokens_per_second=num_output_tokens / elapsed_seconds if elapsed_seconds else 0.0,
        requests_per_second=len(good) / elapsed_seconds if elapsed_seconds else 0.0,
        ttft_seconds=Distribution.of(result.ttft_seconds for result in good if result.ttft_seconds is not None),
        tpot_seconds=Distribution.of(result.tpot_seconds for result in good if result.tpot_seconds is not None),
        inter_token_seconds=Distribution.of(gap for result in good for gap in result.inter_token_seconds),
        end_to_end_seconds=Distribution.of(result.end_to_end_seconds for result in good),
        goodput=goodput_of(results, elapsed_seconds, slo) if slo is not None else None,
    )
