"""A schedule as aiperf's `mooncake_trace` with payload, so that a third party replays it. Sends nothing.

One JSON object a line: `payload`, the very body that our client sends, and `timestamp`, milliseconds after the run's
start. aiperf (0.13, aiperf/dataset/loader/models.py) takes whole and broken milliseconds but keeps time to one; a line
of a closed loop has no timestamp, so that aiperf's own request rate or concurrency paces it.

    aiperf profile --custom-dataset-type mooncake_trace --input-file aiperf.jsonl --fixed-schedule --streaming …

Uploads are left out: aiperf only asks. Chats need `--endpoint-type chat`, token ids `--endpoint-type completions`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from heddle_loadtest.client.body import request_body
from heddle_loadtest.client.style import Style
from heddle_loadtest.workload.schedule import Schedule, ScheduledRequest


def write_aiperf_trace(schedule: Schedule, style: Style, model: str | None, path: Path) -> None:
    """One line a request, in the order of the schedule; `model` is the base model's name at the target."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for request in schedule.requests:
            file.write(encoder.encode(_line(request, style, model)) + b"\n")


def _line(request: ScheduledRequest, style: Style, model: str | None) -> dict[str, Any]:
    payload = {"payload": request_body(request, style, model)}
    if request.at_seconds is None:
        return payload
    return {"timestamp": round(request.at_seconds * 1000, 3), **payload}
