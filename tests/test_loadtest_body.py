"""Bodies as each server's own documentation writes them."""

from typing import Any

import pytest

from heddle_loadtest.client.body import request_body, request_path
from heddle_loadtest.client.style import Style
from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.schedule import ScheduledRequest


def request(adapter: str, prompt: str | list[int] = "Why?", *, ignore_eos: bool = False) -> ScheduledRequest:
    return ScheduledRequest(
        id=0, at_seconds=0.0, adapter=adapter, prompt=prompt, max_tokens=9, ignore_eos=ignore_eos, temperature=0.5,
        seed=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("style", "adapter", "selecting"),
    [
        (Style.HEDDLE, "sql", {"model": "tiny", "adapter": "sql"}),
        (Style.HEDDLE, "base", {"model": "tiny"}),
        (Style.HEDDLE, "tiny", {"model": "tiny"}),
        (Style.VLLM, "sql", {"model": "sql"}),
        (Style.VLLM, "base", {"model": "tiny"}),
        (Style.SGLANG, "sql", {"model": "tiny:sql"}),
        (Style.SGLANG, "base", {"model": "tiny"}),
        (Style.LORAX, "org/sql", {"model": "org/sql"}),
        (Style.LORAX, "base", {"model": ""}),
        (Style.LLAMACPP, "1", {"model": "tiny", "lora": [{"id": 1, "scale": 1.0}]}),
        (Style.LLAMACPP, "base", {"model": "tiny", "lora": [{"id": 0, "scale": 0.0}]}),
    ],
)
def test_adapter_is_named_as_the_server_wants_it(style: Style, adapter: str, selecting: dict[str, Any]) -> None:
    assert request_body(request(adapter), style, "tiny") == selecting | {
        "messages": [{"role": "user", "content": "Why?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 4,
    }


@pytest.mark.parametrize("style", Style)
def test_exact_lengths_are_asked_for_in_the_servers_words(style: Style) -> None:
    body = request_body(request("0", ignore_eos=True), style, "tiny")
    asked = {name: body[name] for name in body if name.startswith("ignore")}
    assert asked == ({"ignore_eos_token": True} if style is Style.LORAX else {"ignore_eos": True})


def test_token_ids_go_to_plain_completions() -> None:
    chat, plain = request("sql"), request("sql", [4, 5])
    assert (request_path(chat), request_path(plain)) == ("/v1/chat/completions", "/v1/completions")
    body = request_body(plain, Style.HEDDLE, None)
    assert (body["prompt"], body["adapter"], "messages" in body, "model" in body) == ([4, 5], "sql", False, False)


def test_llamacpp_has_no_names() -> None:
    with pytest.raises(SpecError, match="adapters 'sql': is no number"):
        request_body(request("sql"), Style.LLAMACPP, "tiny")
