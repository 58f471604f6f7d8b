"""A schedule: what will be asked, of whom, when. Pure data and its JSON lines; draws nothing and sends nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.names import BASE


class ScheduledRequest(Struct, frozen=True, kw_only=True, tag_field="type", tag="request"):
    """One request."""

    id: int  # from 0, in the order of the schedule
    at_seconds: float | None  # when it is due after the run's start; None: when a stream of its closed loop is free
    adapter: str = BASE
    tenant: str = ""  # "" where the workload has no tenants
    prompt: str | list[int]  # a question, or token ids
    num_prompt_tokens: int | None = None  # as the workload wants it; None where nobody counted
    max_tokens: int
    ignore_eos: bool  # whether the target is asked for exactly max_tokens
    temperature: float
    seed: int  # for the target's sampling


class ScheduledUpload(Struct, frozen=True, kw_only=True, tag_field="type", tag="upload"):
    """An adapter to upload."""

    at_seconds: float
    adapter: str


class Schedule(Struct, frozen=True, kw_only=True):
    """All of a run. Requests and uploads are each in the order of their times."""

    requests: tuple[ScheduledRequest, ...]
    uploads: tuple[ScheduledUpload, ...] = ()
    streams: Mapping[str, int] = {}  # tenant -> streams of its closed loop; the others' requests have times
    seconds: float | None = None  # closed loops start no request later, and begin their list again at its end

    @property
    def adapters(self) -> tuple[str, ...]:
        """All that are asked for, in the order of their first request."""
        return tuple(dict.fromkeys(request.adapter for request in self.requests))


def write_schedule(schedule: Schedule, path: Path) -> None:
    """One JSON object a line: a head with streams and seconds, then uploads and requests by their times."""
    encoder = msgspec.json.Encoder()
    head = {"type": "schedule", "streams": schedule.streams, "seconds": schedule.seconds}
    events: list[ScheduledRequest | ScheduledUpload] = [*schedule.uploads, *schedule.requests]
    events.sort(key=_due_seconds)
    path.write_bytes(b"".join(encoder.encode(line) + b"\n" for line in (head, *events)))


def read_schedule(path: Path) -> Schedule:
    """What `write_schedule` wrote. Raises SpecError with the line's number if a line is malformed."""
    head: dict[str, object] = {}
    events: list[ScheduledRequest | ScheduledUpload] = []
    decoder = msgspec.json.Decoder(ScheduledRequest | ScheduledUpload)
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if number == 1:
                head = msgspec.json.decode(line, type=dict[str, object])
            else:
                events.append(decoder.decode(line))
    except OSError as error:
        raise SpecError("schedule", path, error.strerror or "cannot be read", "Name a schedule.jsonl") from error
    except msgspec.MsgspecError as error:
        problem = f"line {number} is malformed: {error}"
        raise SpecError("schedule", path, problem, "Write it again with `heddle-loadtest plan`") from error
    try:
        return msgspec.convert(
            {
                "requests": [event for event in events if isinstance(event, ScheduledRequest)],
                "uploads": [event for event in events if isinstance(event, ScheduledUpload)],
                "streams": head.get("streams", {}),
                "seconds": head.get("seconds"),
            },
            Schedule,
        )
    except msgspec.MsgspecError as error:
        problem = f"line 1 is malformed: {error}"
        raise SpecError("schedule", path, problem, "Write it again with `heddle-loadtest plan`") from error


def _due_seconds(event: ScheduledRequest | ScheduledUpload) -> float:
    return event.at_seconds or 0.0
