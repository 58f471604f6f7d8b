"""openai-js and Vercel's AI SDK against `heddle serve`: pinned packages, real answers of the demo's base."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client_packages import CLIENTS, node_packages
from clients_server import ANSWER, PIRATE, clients_server, is_city
from documented import snippets
from heddle_demo.data import ADAPTERS

MIN_NODE = 20
RUN_SECONDS = 60
USAGE = {"prompt_tokens": 12, "completion_tokens": 12, "total_tokens": 24}

Ask = Callable[[str], Any]


def why_not() -> str | None:
    """What is missing here to run JavaScript clients."""
    if shutil.which("npm") is None or (node := shutil.which("node")) is None:
        return "needs node and npm"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return None if int(version.removeprefix("v").split(".")[0]) >= MIN_NODE else f"node is {version}; needs v{MIN_NODE}"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with clients_server(tmp_path_factory.mktemp("server")) as server:
        yield server.address


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder whose modules find the packages."""
    folder = tmp_path_factory.mktemp("scripts")
    assert request.config.cache is not None
    (folder / "node_modules").symlink_to(node_packages(request.config.cache.mkdir("clients")))
    for script in (CLIENTS / "js").glob("*.mjs"):
        shutil.copy(script, folder)
    return folder


def run_node(script: Path, *arguments: str) -> str:
    """What it prints."""
    process = subprocess.run(["node", script, *arguments], capture_output=True, text=True, timeout=RUN_SECONDS)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def openai_js(address: str, scripts: Path) -> Ask:
    return lambda case: json.loads(run_node(scripts / "openai.mjs", address, case))


@pytest.fixture(scope="module")
def ai_sdk(address: str, scripts: Path) -> Ask:
    return lambda case: json.loads(run_node(scripts / "ai_sdk.mjs", address, case))


def test_chat(openai_js: Ask) -> None:
    reply = openai_js("whole")
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert USAGE.items() <= reply["usage"].items()


def test_adapters_by_field_and_by_model(openai_js: Ask) -> None:
    assert openai_js("adapters") == [[PIRATE, "pirate"]] * 2


def test_a_stream_with_usage(openai_js: Ask) -> None:
    *chunks, last = openai_js("stream")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ANSWER
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert USAGE.items() <= last["usage"].items()


def test_the_stream_helper(openai_js: Ask) -> None:
    helped = openai_js("helper")
    assert helped["text"] == helped["reply"]["choices"][0]["message"]["content"] == ANSWER
    assert helped["usage"] == USAGE


def test_choices_and_logprobs(openai_js: Ask) -> None:
    choices = openai_js("choices")
    assert [choice["index"] for choice in choices] == [0, 1]
    for choice in choices:
        told = choice["logprobs"]["content"]
        assert "".join(token["token"] for token in told) == choice["message"]["content"]
        assert [len(token["top_logprobs"]) for token in told] == [2, 2, 2]


def test_json_by_a_schema(openai_js: Ask) -> None:
    choice = openai_js("parsed")
    assert choice["finish_reason"] == "stop"
    assert is_city(choice["message"]["parsed"])


def test_a_forced_tool(openai_js: Ask) -> None:
    choice = openai_js("forcedTool")
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert call["function"]["name"] == "look_up"
    assert is_city(call["function"]["parsed_arguments"])


def test_a_forced_tool_streamed(openai_js: Ask) -> None:
    streamed = openai_js("streamedTool")
    (done,), choice = streamed["done"], streamed["choice"]
    assert is_city(done["parsed_arguments"])
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == done["arguments"]


def test_tools_that_the_client_runs(openai_js: Ask) -> None:
    """And what its runner has written down is understood as the start of the next conversation."""
    ran = openai_js("ranTools")
    (given,) = ran["calls"]
    assert is_city(given)
    _, asking, result = ran["messages"]
    assert (result["role"], result["content"]) == ("tool", "It is Paris.")
    assert result["tool_call_id"] == asking["tool_calls"][0]["id"]
    assert ran["reply"]["finish_reason"] == "stop"


def test_a_parsed_answer_may_be_sent_back(openai_js: Ask) -> None:
    assert openai_js("sentBack")["choices"][0]["finish_reason"] == "stop"


def test_completions_with_echo(openai_js: Ask) -> None:
    (choice,) = openai_js("completion")["choices"]
    assert choice["text"].startswith("a")
    assert [len(told) for told in choice["logprobs"].values()] == [3] * 4
    assert choice["logprobs"]["token_logprobs"][0] is None


def test_error_classes(openai_js: Ask) -> None:
    told = {"type": "invalid_request_error", "hasRequestId": True}
    missing = {"class": "NotFoundError", "status": 404, **told}
    bad = {"class": "BadRequestError", "status": 400, **told}
    assert openai_js("errors") == {
        "adapter": {**missing, "code": "adapter_not_found", "param": "adapter"},
        "model": {**missing, "code": "model_not_found", "param": "model"},
        "field": {**bad, "code": "invalid_request", "param": "temperature"},
        "context": {**bad, "code": "context_length_exceeded", "param": "max_completion_tokens"},
    }


def test_models(openai_js: Ask) -> None:
    models = openai_js("models")
    assert models["names"] == ["base", *sorted(ADAPTERS)]
    assert (models["pirate"]["id"], models["pirate"]["parent"]) == ("pirate", "base")


def test_a_stream_that_is_left_frees_its_request(openai_js: Ask) -> None:
    assert openai_js("aborted") == {"isFreed": True, "isCounted": True}


def test_ai_sdk_text(ai_sdk: Ask) -> None:
    for generated in ai_sdk("generated"):
        assert (generated["text"], generated["finishReason"]) == (PIRATE, "stop")
        assert (generated["usage"]["inputTokens"], generated["usage"]["outputTokens"]) == (12, 21)


def test_ai_sdk_stream(ai_sdk: Ask) -> None:
    streamed = ai_sdk("streamed")
    assert len(streamed["pieces"]) > 10
    assert "".join(streamed["pieces"]) == PIRATE
    assert (streamed["usage"]["totalTokens"], streamed["finishReason"]) == (33, "stop")


def test_ai_sdk_object(ai_sdk: Ask) -> None:
    assert is_city(ai_sdk("object"))


def test_ai_sdk_tools(ai_sdk: Ask) -> None:
    called, answered = ai_sdk("tools")
    assert (called["finishReason"], answered["finishReason"]) == ("tool-calls", "stop")
    assert is_city(called["toolCalls"][0]["input"])
    assert called["toolResults"][0]["output"] == "It is Paris."
    assert answered["toolCalls"] == []


def test_ai_sdk_streamed_tool(ai_sdk: Ask) -> None:
    streamed = ai_sdk("streamedTool")
    assert [part for part in streamed["parts"] if part.startswith("tool-")] == [
        "tool-input-start",
        "tool-input-delta",
        "tool-input-end",
        "tool-call",
        "tool-result",
    ]
    assert is_city(streamed["toolCalls"][0]["input"])


def test_ai_sdk_errors(ai_sdk: Ask) -> None:
    assert ai_sdk("refused") == {
        "isApiCallError": True,
        "statusCode": 404,
        "message": "Model 'pirat' does not exist. Did you mean 'pirate'?",
        "isRetryable": False,
    }


@pytest.mark.parametrize("title", ["openai for JavaScript", "Vercel AI SDK"])
def test_the_documented_snippets(title: str, address: str, scripts: Path) -> None:
    for snippet in snippets(title):
        script = scripts / "documented.mjs"
        script.write_text(snippet.at(address))
        assert run_node(script) == snippet.output
