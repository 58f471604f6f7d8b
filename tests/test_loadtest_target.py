"""What a target lacks is told before the run; its key never."""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from fake_openai_server import FakeOpenAIServer
from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.client.style import Style
from heddle_loadtest.client.target import CheckedTarget, Target, check_target
from heddle_loadtest.errors import LoadTestError, SpecError, TargetError

KEY = "sk-secret"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAIServer]:
    with FakeOpenAIServer(("tiny", *(f"poet-{index}" for index in range(20)), "clerk")) as server:
        yield server


def check(url: str, adapters: Iterable[str] = (), supplied: Iterable[str] = (), **fields: Any) -> CheckedTarget:
    async def ask() -> CheckedTarget:
        async with ChatClient(Target(url=url, **fields)) as client:
            return await check_target(client, adapters, frozenset(supplied))

    return asyncio.run(ask())


@pytest.mark.parametrize("url", ["http://localhost", "https://example.org:8443/v1", "http://[::1]:8000"])
def test_good_addresses_are_taken(url: str) -> None:
    assert Target(url=url).base_url == url.removesuffix("/v1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", "localhost:8000"),
        ("url", "http://"),
        ("url", "http://host:port"),
        ("url", "http://[::1"),
        ("url", f"http://me:{KEY}@host"),
        ("url", f"ftp://me:{KEY}@host"),
        ("timeout_seconds", float("inf")),
        ("timeout_seconds", 0.0),
        ("api_key", f"{KEY}\n"),
        ("api_key", f"{KEY}\u00e9"),
    ],
)
def test_bad_setting_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(SpecError) as caught:
        Target(**{"url": "http://127.0.0.1:8000"} | {field: value})  # type: ignore[arg-type]
    assert caught.value.field == ("target" if field == "url" else field)
    assert KEY not in str(caught.value)


def test_key_is_not_shown() -> None:
    assert KEY not in repr(Target(url="http://127.0.0.1:8000", api_key=KEY))


def test_what_is_there_is_found(server: FakeOpenAIServer) -> None:
    checked = check(server.url, ["base", "tiny", "clerk", "poet-3@2"])
    assert (checked.model, checked.adapters[-1], len(checked.adapters)) == ("tiny", "clerk", 21)
    assert (checked.missing, checked.warnings) == ((), ())


def test_missing_adapter_is_told_with_the_nearest_names(server: FakeOpenAIServer) -> None:
    with pytest.raises(TargetError, match=r"the target does not list it, nor 1 more .*poet-1.* and 14 more") as caught:
        check(server.url, ["base", "poet-99", "clark"])
    assert (caught.value.field, caught.value.value) == ("adapters", "poet-99")
    with pytest.raises(TargetError, match="It has: clerk"):
        check(server.url, ["clark"])
    assert server.bodies == []


def test_version_of_a_missing_adapter_is_missing(server: FakeOpenAIServer) -> None:
    with pytest.raises(TargetError):
        check(server.url, ["nobody@2"])
    with pytest.raises(TargetError):
        check(server.url, ["clerk@2"], style=Style.VLLM)


def test_supplied_adapter_may_be_missing(server: FakeOpenAIServer) -> None:
    assert check(server.url, ["clerk", "mine"], ["clerk", "mine", "other"]).missing == ("mine",)
    with pytest.raises(TargetError, match="'others'"):
        check(server.url, ["mine", "others"], ["mine"])


def test_missing_model_is_told(server: FakeOpenAIServer) -> None:
    with pytest.raises(TargetError) as caught:
        check(server.url, model="huge")
    assert (caught.value.field, caught.value.value) == ("model", "huge")


@pytest.mark.parametrize("style", Style)
def test_dead_target_is_told(style: Style) -> None:
    with pytest.raises(TargetError, match="no answer from there"):
        check("http://127.0.0.1:1", style=style)


@pytest.mark.parametrize("style", Style)
def test_something_else_is_told(server: FakeOpenAIServer, style: Style) -> None:
    with pytest.raises(TargetError, match="HTTP 404"):
        check(f"{server.url}/elsewhere", style=style)


def test_target_without_models_is_refused() -> None:
    with FakeOpenAIServer(()) as empty, pytest.raises(TargetError, match="lists no models"):
        check(empty.url)


def test_refused_key_is_named_and_not_shown() -> None:
    with FakeOpenAIServer(api_key="right") as locked:
        with pytest.raises(LoadTestError, match="refuses it") as caught:
            check(locked.url, api_key=KEY)
        assert check(locked.url, api_key="right").model == "tiny"
    assert caught.value.field == "api_key"
    assert KEY not in str(caught.value)


def test_lorax_lists_nothing_and_says_so(server: FakeOpenAIServer) -> None:
    checked = check(server.url, ["org/anything"], style=Style.LORAX)
    assert (checked.model, checked.adapters) == ("tiny", ())
    assert "does not list" in checked.warnings[0]


def test_llamacpp_counts_its_adapters(server: FakeOpenAIServer) -> None:
    checked = check(server.url, ["base", "0", "20"], style=Style.LLAMACPP)
    assert checked.adapters == tuple(str(number) for number in range(21))
    with pytest.raises(TargetError):
        check(server.url, ["poet-1"], style=Style.LLAMACPP)
