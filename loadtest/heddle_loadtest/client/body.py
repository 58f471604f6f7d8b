"""The HTTP body of a scheduled request: a pure function of request, style and model. Sends nothing."""

from __future__ import annotations

from typing import Any

from heddle_loadtest.client.style import Style
from heddle_loadtest.workload.schedule import ScheduledRequest

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"
STREAM_FIELDS: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def request_path(request: ScheduledRequest) -> str:
    """A question is a chat; token ids are a plain completion, since a chat would wrap them into its template."""
    return CHAT_PATH if isinstance(request.prompt, str) else COMPLETION_PATH


def request_body(request: ScheduledRequest, style: Style, model: str | None) -> dict[str, Any]:
    """What is sent to `request_path(request)`; `model` is the base model's name, or None to leave it to the server."""
    prompt: dict[str, Any] = {"prompt": request.prompt}
    if isinstance(request.prompt, str):
        prompt = {"messages": [{"role": "user", "content": request.prompt}]}
    return {
        **style.adapter_fields(request.adapter, model),
        **prompt,
        **STREAM_FIELDS,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        **({style.ignore_eos_field: True} if request.ignore_eos else {}),
    }
