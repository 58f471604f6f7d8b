"""The description of the API against the server that it describes: what it says is so, and nothing is left unsaid."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import schemathesis.engine
from fastapi.routing import APIRoute
from schemathesis.engine import events
from schemathesis.engine.recorder import CheckNode

import scripted_engine
from byte_tokenizer import save_tokenizer
from heddle_server.api.access import ACCESS
from heddle_server.api.app import ROUTERS, api_document
from heddle_server.api.errors import KINDS
from heddle_server.api.operations import OPERATIONS
from heddle_server.api_page import page
from heddle_server.key_store import SCOPES
from live_server import live_server, server_config
from tenant_keys import client_of, make_key
from test_adapter_api import ADAPTERS, VALIDATE, upload, weights
from test_http_api import CHAT, HELLO
from test_tool_calls import CALL, TEMPLATE, TOOL

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
METHODS = ("get", "put", "post", "delete", "patch")
PAGE = Path(__file__).parent.parent / "docs" / "api.md"
CONTEXT = 4096  # tokens: what is generated is rarely longer

REFUSED = {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 403, 404, 409, 413, 422]}}
EXCEPTIONS: list[dict[str, Any]] = [
    {
        # What no schema says: rules between fields, tokens that this base has, how many of them fit, characters that
        # can be printed, and that 3.0 is no whole number here.
        "include-operation-id": [
            *("create_chat_completion", "create_completion", "create_response", "tokenize", "detokenize"),
            *("change_adapter", "set_alias"),
        ],
        "checks": REFUSED,
    },
    {
        # What the store says: a version that has an alias stays, and so does the base.
        "include-operation-id": ["delete_adapter", "delete_model"],
        "checks": REFUSED,
    },
    {
        # Files that are no adapter's.
        "include-operation-id": ["upload_adapter"],
        "checks": REFUSED,
    },
    {
        # The same; and an adapter may be called validate, which other methods are about.
        "include-operation-id": ["validate_adapter"],
        "checks": {
            "unsupported_method": {"enabled": False},
            "allow_header_conformance": {"enabled": False},
            **REFUSED,
        },
    },
    {
        # Where the server has keys, only what is described is open: another method on the same path wants a key first.
        "include-operation-id": ["live", "ready", "health", "version"],
        "checks": {"unsupported_method": {"enabled": False}},
    },
]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return api_document()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("server"), max_model_len=CONTEXT)) as client:
        store_examples(client)
        yield client


@pytest.fixture(scope="module")
def described(document: dict[str, Any]) -> Any:
    """The document as schemathesis reads it."""
    return schemathesis.openapi.from_dict(document)


def store_examples(client: httpx.Client, **said: str) -> None:
    """The adapter that the document's examples speak of."""
    for fill in (1.0, 2.0, 3.0):
        assert upload(client, "sql", weights(fill), texts=said).status_code == 201
    assert client.put(f"{ADAPTERS}/sql/aliases/prod", json={"version": 3}).status_code == 200


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield path, method, item[method]


def checked(described: Any, response: httpx.Response, path: str) -> Any:
    """A reply's JSON, or its text; fails where the reply is not as its operation describes it."""
    response.request.read()  # of a form httpx keeps no copy, and the check wants one
    described[path][response.request.method].validate_response(response)
    is_json = response.headers["content-type"] == "application/json"
    return response.json() if is_json else response.text


def test_the_document_is_served_as_it_is(client: httpx.Client, document: dict[str, Any]) -> None:
    response = client.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == document


def test_every_route_is_described_and_nothing_else(document: dict[str, Any]) -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    names = [route.name for route in routes if route.include_in_schema]
    assert len(names) > 20
    assert sorted(names) == sorted(OPERATIONS)
    assert sorted(names) == sorted(operation["operationId"] for _, _, operation in operations(document))


def test_every_operation_says_which_scope_it_needs(document: dict[str, Any]) -> None:
    needed = {
        (re.sub(r":\w+}", "}", path), method.lower()): needs
        for path, methods in ACCESS.items()
        for method, needs in methods.items()
    }
    for path, method, operation in operations(document):
        needs = needed[path, method]
        assert operation.get("security") == ([{"ApiKey": [needs]}] if needs in SCOPES else None), path
        assert ("401" in operation["responses"]) == (needs in SCOPES)


def test_every_error_is_in_the_envelope_with_its_codes(document: dict[str, Any]) -> None:
    codes: dict[str, set[str]] = {}
    for path, _, operation in operations(document):
        assert operation["summary"]
        assert operation["description"]
        assert operation["tags"]
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                envelope, own = response["content"]["application/json"]["schema"]["allOf"]
                assert envelope == {"$ref": "#/components/schemas/ErrorReply"}, path
                codes.setdefault(status, set()).update(own["properties"]["error"]["properties"]["code"]["enum"])
    assert "HTTPValidationError" not in document["components"]["schemas"]
    table: dict[str, set[str]] = {"404": {"unknown_route"}}
    for kind in KINDS.values():
        table.setdefault(str(kind.status), set()).add(kind.code)
    never = {"403": {"forbidden", "route_closed"}, "404": {"not_served"}}  # no route that is described tells them
    assert codes == {status: told - never.get(status, set()) for status, told in table.items()}


def test_every_operation_has_an_example(document: dict[str, Any]) -> None:
    def has_one(operation: dict[str, Any]) -> bool:
        places = [*operation.get("parameters", ())]
        for body in (operation.get("requestBody", {}), operation["responses"].get("200", {})):
            places += body.get("content", {}).values()
        return any("example" in place for place in places)

    without = [operation["operationId"] for *_, operation in operations(document) if not has_one(operation)]
    assert without == ["upload_adapter", "validate_adapter"]  # files; their descriptions have a command


def test_every_object_of_a_reply_is_closed(document: dict[str, Any]) -> None:
    """So that the other tests find what a reply has and the document has not."""
    for name, schema in document["components"]["schemas"].items():
        if "properties" in schema:
            assert schema["additionalProperties"] is False, name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"adapter": "sql"},
        {"adapter": [{"name": "sql@1", "scale": 0.5}, "sql@2"]},
        {"adapter_id": "sql@prod", "n": 2, "logprobs": True, "top_logprobs": 2},
        {"max_tokens": 2},
        {"seed": scripted_engine.ADAPTER_DAMAGED},
    ],
)
def test_chats_are_as_described(client: httpx.Client, described: Any, fields: dict[str, Any]) -> None:
    checked(described, client.post(CHAT, json={"messages": HELLO, **fields}), CHAT)
    options: dict[str, Any]
    for options in ({}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        body = {"messages": HELLO, "stream": True, "stream_options": options, **fields}
        assert "data: " in checked(described, client.post(CHAT, json=body), CHAT)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"adapter": "sql"},
        {"echo": True, "logprobs": 2},
        {"prompt": ["a", "b"], "n": 2, "logprobs": 0, "max_tokens": 1},
        {"seed": scripted_engine.ADAPTER_DAMAGED},
    ],
)
def test_completions_are_as_described(client: httpx.Client, described: Any, fields: dict[str, Any]) -> None:
    checked(described, client.post(COMPLETIONS, json={"prompt": "Hello", **fields}), COMPLETIONS)
    body = {"prompt": "Hello", "stream": True, "stream_options": {"include_usage": True}, **fields}
    assert "data: " in checked(described, client.post(COMPLETIONS, json=body), COMPLETIONS)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"adapter": "sql", "include": ["message.output_text.logprobs"], "top_logprobs": 2, "metadata": {"a": "b"}},
        {"max_output_tokens": 2, "reasoning": {}, "text": {"format": {"type": "text"}}, "instructions": "Be brief."},
        {"seed": scripted_engine.ADAPTER_DAMAGED},
    ],
)
def test_responses_are_as_described(client: httpx.Client, described: Any, fields: dict[str, Any]) -> None:
    checked(described, client.post(RESPONSES, json={"input": "Hello", **fields}), RESPONSES)
    streamed = client.post(RESPONSES, json={"input": "Hello", "stream": True, **fields})
    assert "event: " in checked(described, streamed, RESPONSES)


def test_calls_and_reasoning_are_as_described(tmp_path: Path, described: Any) -> None:
    said = f"<think>Hm.</think>\n\nYes. {CALL}"
    save_tokenizer(tmp_path / "model", TEMPLATE)
    tools = {"tools": [TOOL], "messages": [{"role": "user", "content": said}]}
    items = {"tools": [{"type": "function", "name": "f"}], "input": said}
    with live_server(server_config(tmp_path, max_model_len=CONTEXT)) as client:
        message = checked(described, client.post(CHAT, json=tools), CHAT)["choices"][0]["message"]
        assert {"tool_calls", "reasoning_content"} <= message.keys()
        chunks = checked(described, client.post(CHAT, json={**tools, "stream": True}), CHAT)
        assert "tool_calls" in chunks
        assert "reasoning_content" in chunks
        output = checked(described, client.post(RESPONSES, json=items), RESPONSES)["output"]
        assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
        told = checked(described, client.post(RESPONSES, json={**items, "stream": True}), RESPONSES)
        assert "response.function_call_arguments.done" in told
        assert "response.reasoning_text.done" in told


def test_what_is_told_of_adapters_is_as_described(client: httpx.Client, described: Any) -> None:
    mine = weights(4.0)
    uploads = {None: mine, "mine": mine, "sql": weights(3.0)}
    for name, content in uploads.items():
        reply = checked(described, upload(client, name, content, path=VALIDATE), VALIDATE)
        assert reply["is_stored"] == (name == "sql")
    texts = {"alias": "best", "tags": "a,b", "ttl_seconds": "1000", "visibility": "public"}
    assert checked(described, upload(client, "mine", mine, texts=texts), ADAPTERS)["is_new_version"]
    assert not checked(described, upload(client, "mine", mine), ADAPTERS)["is_new_version"]
    one, versions, aliases = (
        f"{ADAPTERS}/{{name}}",
        f"{ADAPTERS}/{{name}}/versions",
        f"{ADAPTERS}/{{name}}/aliases/{{alias}}",
    )
    checked(described, client.get(ADAPTERS, params={"limit": 1}), ADAPTERS)
    checked(described, client.get(ADAPTERS, params={"q": "nothing"}), ADAPTERS)
    checked(described, client.get(f"{ADAPTERS}/sql@1"), one)
    checked(described, client.get(f"{ADAPTERS}/sql/versions"), versions)
    checked(described, client.patch(f"{ADAPTERS}/mine", json={"description": "Mine.", "pinned": False}), one)
    assert (
        checked(described, client.put(f"{ADAPTERS}/sql/aliases/new", json={"version": 1}), aliases)["previous"] is None
    )
    assert checked(described, client.put(f"{ADAPTERS}/sql/aliases/new", json={"target": "2"}), aliases)["previous"]
    checked(described, client.delete(f"{ADAPTERS}/sql/aliases/new"), aliases)
    checked(described, client.get("/v1/models"), "/v1/models")
    checked(described, client.get("/v1/models/mine"), "/v1/models/{name}")
    assert checked(described, client.get("/v1/cache"), "/v1/cache")["adapters"]
    checked(described, client.delete(f"{ADAPTERS}/mine@1"), one)
    checked(described, client.delete(f"{ADAPTERS}/mine@best"), one)
    checked(described, upload(client, "mine", mine), ADAPTERS)
    checked(described, client.delete("/v1/models/mine"), "/v1/models/{name}")


def test_what_the_server_tells_of_itself_is_as_described(client: httpx.Client, described: Any) -> None:
    for path in ("/livez", "/readyz", "/health", "/version", "/metrics"):
        checked(described, client.get(path), path)
    checked(described, client.post("/tokenize", json={"messages": HELLO, "return_token_strs": True}), "/tokenize")
    checked(described, client.post("/detokenize", json={"tokens": [72]}), "/detokenize")


def test_every_part_of_an_upload_is_described(client: httpx.Client, document: dict[str, Any]) -> None:
    refused = client.post(ADAPTERS, files={"nonsense": b""}).json()["error"]["message"]
    parts = set(re.findall(r"[a-z]\w*(?:\.\w+)?", refused.partition("An upload has the parts")[2])) - {
        "and",
        "may",
        "have",
    }
    for path in (ADAPTERS, VALIDATE):
        form = document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert parts == set(form["properties"])


def test_a_405_names_the_methods_of_all_routes(client: httpx.Client) -> None:
    allowed = {path: client.options(path).headers["allow"] for path in (ADAPTERS, f"{ADAPTERS}/sql", "/v1/models/sql")}
    assert allowed == {
        ADAPTERS: "GET, POST",
        f"{ADAPTERS}/sql": "DELETE, GET, PATCH",
        "/v1/models/sql": "DELETE, GET",
    }
    assert client.patch(f"{ADAPTERS}/sql/versions").status_code == 405
    assert client.get(f"{ADAPTERS}/sql/aliases/prod").status_code == 405


@pytest.mark.timeout(90)
def test_generated_requests_without_keys(tmp_path: Path, document: dict[str, Any]) -> None:
    described_without = copy.deepcopy(document)
    for _, _, operation in operations(described_without):
        operation.pop("security", None)  # as the document says, a server without keys asks for none
    with live_server(server_config(tmp_path, max_model_len=CONTEXT, max_upload_bytes=1 << 16)) as client:
        store_examples(client)
        found = problems(described_without, str(client.base_url))
    assert not found, "\n".join(found)


@pytest.mark.timeout(90)
def test_generated_requests_with_keys(tmp_path: Path, document: dict[str, Any]) -> None:
    config = server_config(tmp_path, max_model_len=CONTEXT, max_upload_bytes=1 << 16)
    library, key = make_key(config.store_path, "library", *SCOPES), make_key(config.store_path, "ops", *SCOPES)
    with live_server(config) as client:
        with client_of(client, library) as owner:
            store_examples(owner, visibility="public")  # which others cannot delete
        found = problems(document, str(client.base_url), auth={"openapi": {"ApiKey": {"bearer": key}}})
    assert not found, "\n".join(found)


def problems(document: dict[str, Any], address: str, **settings: Any) -> list[str]:
    """What schemathesis finds wrong with a server's answers to requests right and wrong, with settings of its own."""
    config = schemathesis.Config.from_dict(
        {
            "base-url": address,
            "seed": 6,
            "generation": {"database": "none", "max-examples": 8},
            "phases": {"stateful": {"enabled": False}},  # the document has no links to follow
            "checks": {"negative_data_rejection": {"expected-statuses": ["4xx"]}},  # 413 is not among its own
            "operations": EXCEPTIONS,
            **settings,
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    found: list[str] = []
    num_checks = 0
    for event in schemathesis.engine.from_schema(schema).execute():
        assert not isinstance(event, events.FatalError), event.exception
        if isinstance(event, events.NonFatalError):
            found.append(f"{event.label}: {event.info.format()}")
        if isinstance(event, events.ScenarioFinished):
            checks = [check for checks in event.recorder.checks.values() for check in checks]
            num_checks += len(checks)
            found += [_problem(event.recorder.label, check) for check in checks if check.failure_info is not None]
    assert num_checks > 1000
    return found


def _problem(operation: str, check: CheckNode) -> str:
    assert check.failure_info is not None
    return f"{operation}: {check.name}: {check.failure_info.failure.message}\n{check.failure_info.code_sample}"


def test_the_page_is_the_document() -> None:
    """`python -m heddle_server.api_page > docs/api.md` writes it again."""
    assert PAGE.read_text() == page()
    command = [sys.executable, "-m", "heddle_server.api_page"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == page()


def test_the_page_says_all_that_the_document_says(document: dict[str, Any]) -> None:
    text = PAGE.read_text()
    for path, method, _ in operations(document):
        assert f"### `{method.upper()} {path}`" in text
    for name, schema in document["components"]["schemas"].items():
        section = text.partition(f"### {name}\n")[2].partition("\n### ")[0]
        for field in schema["properties"]:
            assert f"| `{field}`" in section, (name, field)
    for error, kind in KINDS.items():
        assert error is Exception or f"| `{kind.code}` | {kind.status} |" in text
    headings = [heading.lower() for heading in re.findall(r"^##+ (\w+)$", text, re.MULTILINE)]
    assert len(headings) == len(set(headings)), "two headings, one address"
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= set(headings)
