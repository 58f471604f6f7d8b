"""GET /v1/cache and `heddle top`, which shows it."""

from __future__ import annotations

import io
from collections.abc import Iterator

import httpx
import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

import scripted_engine
from heddle_server.cli import app
from heddle_server.server_address import ServerError
from heddle_server.top import Sample, run_top, take_sample, view
from live_server import live_server, server_config
from test_adapter_api import upload, weights
from test_http_api import CHAT, HELLO, refusal

CACHE = "/v1/cache"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server on whose device are two adapters, one of them of two names, pinned and used twice."""
    with live_server(server_config(tmp_path_factory.mktemp("server"))) as client:
        upload(client, "sql", weights(1.0))
        upload(client, "pirate", weights(2.0), texts={"pinned": "true"})
        upload(client, "copy", weights(2.0))
        for adapter in ("sql", "pirate", "copy"):
            assert client.post(CHAT, json={"messages": HELLO, "adapter": adapter}).status_code == 200
        yield client


def printed(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_what_lies_in_the_pool(client: httpx.Client) -> None:
    cache = client.get(CACHE).json()
    assert (cache["object"], cache["policy"]) == ("cache", "cost")
    pages = cache["pool"].pop("pages")
    assert pages == {"free": 6, "kv": 0, "cached": 0, "adapter": 2, "loading": 0}
    assert cache["pool"] == {
        "num_pages": sum(pages.values()),
        "page_bytes": scripted_engine.PAGE_BYTES,
        "pinned_pages": 1,
        "num_adapters": 2,
        "adapter_used_bytes": 2 * scripted_engine.ADAPTER_BYTES,
        "packing_waste": 0.25,
    }
    assert cache["host"] == {"num_adapters": 0, "bytes": 0, "budget_bytes": 1 << 20}
    assert cache["requests"] == {"running": 0, "waiting": 0}
    assert cache["counters"]["requests_by_tier"]["device"] >= 1
    assert cache["counters"]["computed_tokens"] == 18


def test_adapters_come_most_used_first_with_all_their_names(client: httpx.Client) -> None:
    cache = client.get(CACHE).json()
    pirate, sql = cache["adapters"]
    assert pirate == {
        "digest": client.get("/v1/adapters/pirate").json()["digest"],
        "names": ["copy@1", "pirate@1"],
        "tier": "device",
        "pages": 1,
        "size_bytes": scripted_engine.PAGE_BYTES,
        "references": 0,
        "waiting": 0,
        "pinned": True,
        "uses": 2,
        "idle_seconds": 1.5,
    }
    assert (sql["names"], sql["pinned"], sql["uses"]) == (["sql@1"], False, 1)


def test_the_list_is_bounded(client: httpx.Client) -> None:
    cache = client.get(CACHE, params={"limit": 1}).json()
    assert (len(cache["adapters"]), cache["num_adapters"]) == (1, 2)
    assert client.get(CACHE, params={"limit": 0}).json()["adapters"] == []
    for limit in ("-1", "10001", "many"):
        assert refusal(client.get(CACHE, params={"limit": limit})) == (400, "invalid_request", "limit")


def test_top_shows_it_once(client: httpx.Client) -> None:
    console = Console(file=io.StringIO(), width=160)
    run_top(str(client.base_url), 1.0, once=True, console=console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "0 running, 0 waiting" in shown
    assert "adapter 2" in shown
    assert "packing waste 25.0%" in shown
    assert "copy@1 +1" in shown
    assert "sql@1" in shown


def test_rates_are_those_between_two_looks(client: httpx.Client) -> None:
    first = take_sample(str(client.base_url))
    counters = {**first.cache["counters"], "computed_tokens": first.cache["counters"]["computed_tokens"] + 500}
    second = Sample(first.seconds + 2, {**first.cache, "counters": counters})
    line = next(line for line in printed(view("here", second, first)).splitlines() if "tokens computed" in line)
    assert line.split()[-1] == "250.0"
    new_engine = next(line for line in printed(view("here", first, second)).splitlines() if "tokens computed" in line)
    assert new_engine.split()[-1] == f"{first.cache['counters']['computed_tokens']}"


def test_the_bar_is_the_pool(client: httpx.Client) -> None:
    assert printed(view("here", take_sample(str(client.base_url)), None)).count("█") == 48


def test_the_command_shows_it_too(client: httpx.Client) -> None:
    shown = CliRunner().invoke(app, ["top", "--once", "--server", str(client.base_url)])
    assert shown.exit_code == 0
    assert "sql@1" in shown.stdout
    failed = CliRunner().invoke(app, ["top", "--once", "--server", "127.0.0.1:1"])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("heddle: no heddle server answers")


def test_top_without_a_server_says_so() -> None:
    with pytest.raises(ServerError, match=r"no heddle server answers at http://127\.0\.0\.1:1"):
        run_top("127.0.0.1:1", 1.0, once=True)


def test_top_of_another_server_says_so(client: httpx.Client) -> None:
    with pytest.raises(ServerError, match="There is no GET /elsewhere/v1/cache here"):
        run_top(f"{client.base_url}/elsewhere", 1.0, once=True)


def test_a_name_cannot_move_the_terminals_cursor(client: httpx.Client) -> None:
    sample = take_sample(str(client.base_url))
    adapters = [{**sample.cache["adapters"][0], "names": ["[red]a\x1b[2J"]}]
    shown = printed(view("here\x1b[2J", Sample(0.0, {**sample.cache, "adapters": adapters}), None))
    assert "\x1b[2J" not in shown
    assert "[red]a" in shown


def test_an_engine_that_is_away_is_503(client: httpx.Client) -> None:
    client.post(CHAT, json={"messages": HELLO, "seed": scripted_engine.DIES_AT_ONCE})
    assert refusal(client.get(CACHE))[:2] == (503, "engine_unavailable")
