"""The quick form of `heddle-loadtest run`: a workload out of a few options, without a file. Knows no command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.names import BASE
from heddle_loadtest.workload.prompts import read_questions
from heddle_loadtest.workload.spec import Adapters, Arrivals, Closed, Output, Poisson, Questions, Workload
from heddle_loadtest.workload.spec_error import convert

_ALL = "all"  # the base and every adapter that the target lists
_DEFAULT_SECONDS = 10.0
_DEFAULT_STREAMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickForm:
    """The options as they were given; None is what was left out."""

    streams: int | None = None
    rate: float | None = None
    duration_seconds: float | None = None
    requests: int | None = None
    adapters: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    prompts: tuple[str, ...] | None = None
    prompts_file: Path | None = None
    warmup: int | None = None

    def check_left_out(self, spec: str) -> None:
        """Raises SpecError if anything was given, beside a workload that says it already."""
        for field, (option, key) in _SAID_BY_WORKLOADS.items():
            value = getattr(self, field)
            if value is not None:
                shown = ", ".join(value) if isinstance(value, tuple) else value
                raise SpecError(option, shown, f"contradicts the workload {spec!r}", f"Use --set {key} with a workload")

    def to_workload(self) -> Workload:
        """Closed loop, or Poisson arrivals with a rate. Raises SpecError, which names the field, for a bad value."""
        self._check_numbers()
        seconds = self.duration_seconds
        if seconds is None and self.requests is None:
            seconds = _DEFAULT_SECONDS
        workload = Workload(
            name="quick",
            about="options of the command line",
            requests=self.requests,
            seconds=seconds,
            arrivals=self._arrivals(),
            adapters=_read_adapters(self.adapters or BASE),
            prompt=Questions(questions=self._questions()),
            output=Output(tokens=64 if self.max_tokens is None else self.max_tokens, exact=False),
            temperature=self.temperature or 0.0,
            warmup=1 if self.warmup is None else self.warmup,
        )
        return convert(msgspec.to_builtins(workload), Workload)  # which holds it to the limits of a spec

    def _arrivals(self) -> Arrivals:
        if self.rate is None:
            return Closed(streams=self.streams or _DEFAULT_STREAMS)
        if self.streams is not None:
            raise SpecError(
                "rate", self.rate, "is of an open loop and --streams of a closed one", "Give one of the two"
            )
        return Poisson(rate=self.rate)

    def _questions(self) -> tuple[str, ...]:
        if self.prompts and self.prompts_file:
            raise SpecError("prompts_file", self.prompts_file, "comes on top of --prompt", "Give one of the two")
        if self.prompts_file is not None:
            return read_questions(self.prompts_file)
        questions = self.prompts or ()
        if not all(question.strip() for question in questions):
            raise SpecError("prompts", ", ".join(questions), "one is empty", "Give one or more, none of them empty")
        return questions

    def _check_numbers(self) -> None:
        for field, minimum in {"streams": 1, "requests": 1, "max_tokens": 1, "temperature": 0, "warmup": 0}.items():
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value >= minimum):
                raise SpecError(field, value, f"must be {minimum} or more", f"Give a number from {minimum} up")
        for field, unit in {"rate": "requests per second", "duration_seconds": "seconds"}.items():
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SpecError(field, value, "must be more than 0", f"Give a positive number of {unit}")


_SAID_BY_WORKLOADS = {  # field -> its option, and what --set takes in its place
    "streams": ("--streams", "arrivals.streams=N"),
    "rate": ("--rate", "arrivals.rate=R"),
    "duration_seconds": ("--duration", "seconds=S"),
    "requests": ("--requests", "requests=N"),
    "adapters": ("--adapters", "adapters.names=[A,B]"),
    "max_tokens": ("--max-tokens", "output.tokens=N"),
    "temperature": ("--temperature", "temperature=T"),
    "prompts": ("--prompt", "prompt.questions=[Q]"),
    "prompts_file": ("--prompts-file", "prompt.questions=[Q]"),
    "warmup": ("--warmup", "warmup=N"),
}


def _read_adapters(text: str) -> Adapters:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise SpecError("adapters", text, "one is empty", "Give one or more, none of them empty")
    return Adapters(listed=True) if names == (_ALL,) else Adapters(names=names)
