"""`--fail-if`: how much worse than A a run B may be, as people write it, and what a comparison says to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from heddle_loadtest.errors import SpecError
from heddle_loadtest.measure.compare import Comparison
from heddle_loadtest.measure.sample import METRICS, SHARES

_FIELD = "fail_if"
_FORM = re.compile(r"(?P<metric>\w+)\s*(?P<side>[<>])\s*(?P<percent>[+-]?\d+(\.\d+)?)\s*%")


@dataclass(frozen=True, slots=True)
class Condition:
    """A limit of the change from A to B."""

    text: str
    metric: str
    is_above: bool  # whether it fails above the limit, or below it
    limit: float  # of b / a - 1; of b - a for a share

    def is_beyond(self, change: float) -> bool:
        """Whether this change is on the wrong side of the limit."""
        return change > self.limit if self.is_above else change < self.limit


class Answer(StrEnum):
    """What a comparison says to a condition."""

    HOLDS = "holds"
    FAILS = "fails"
    NOT_SHOWN = "not shown"  # beyond the limit, but chance may explain that: more repeats are needed


@dataclass(frozen=True, slots=True)
class ConditionResult:
    """A condition with its answer."""

    condition: Condition
    answer: Answer
    sentence: str

    def to_json(self) -> dict[str, str]:
        """The fields by name."""
        return {"condition": self.condition.text, "answer": self.answer.value, "sentence": self.sentence}


def parse_fail_if(text: str) -> Condition:
    """Reads "ttft_p99>+10%", or for a share, in points, "error_rate>+1%". Raises SpecError."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise SpecError(_FIELD, text, "is no condition", "Write it as ttft_p99>+10% or output_tokens_per_second<-5%")
    if match["metric"] not in METRICS:
        raise SpecError(_FIELD, text, f"there is no metric {match['metric']!r}", f"Metrics: {', '.join(METRICS)}")
    return Condition(text.strip(), match["metric"], match["side"] == ">", float(match["percent"]) / 100)


def parse_conditions(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Reads several, each text one or more with commas between. Raises SpecError."""
    return tuple(parse_fail_if(part) for text in texts for part in text.split(","))


def judge(comparison: Comparison, condition: Condition) -> ConditionResult:
    """The answer to a condition. A metric that only A has fails it; raises SpecError if A lacks it."""
    change = comparison.metrics[condition.metric]
    if change.a is None or (change.change is None and change.b is not None):
        raise SpecError(
            _FIELD, condition.text, f"{condition.metric} was not measured in A", "Choose a metric that A has"
        )
    if change.change is None:
        return ConditionResult(condition, Answer.FAILS, f"{condition.metric} was not measured in B at all.")
    unit = " points" if condition.metric in SHARES else " %"
    changed = f"{condition.metric} changed by {change.change:+.1%}".removesuffix("%") + unit
    if not condition.is_beyond(change.change):
        return ConditionResult(condition, Answer.HOLDS, f"{changed}, within the limit.")
    if not change.is_significant:
        sentence = f"{changed}, beyond the limit, but chance may explain it: more repeats are needed."
        return ConditionResult(condition, Answer.NOT_SHOWN, sentence)
    return ConditionResult(condition, Answer.FAILS, f"{changed}, beyond the limit.")
