"""What `heddle top` shows at a glance: speed, first tokens, hits by tier, between two looks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rich.console import Console

from heddle_server.top import Sample, take_sample, view
from live_server import live_server, server_config

COUNTERS: dict[str, Any] = {
    "requests_by_tier": {"device": 6, "host": 3, "disk": 1},
    "adapter_loads": 4,
    "adapter_evictions": {"device": 0, "host": 0},
    "prefix_queries": 1000,
    "prefix_hits": 250,
    "prefix_evictions": 0,
    "preemptions": 0,
    "steps": 100,
    "step_seconds": 2.0,
    "host_seconds": 0.1,
    "segments": 300,
    "computed_tokens": 800,
}
INFINITY = float("inf")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with live_server(server_config(tmp_path_factory.mktemp("top"))) as client:
        yield client


def sample(cache: dict[str, Any], seconds: float, first_tokens: dict[float, float], **counters: Any) -> Sample:
    return Sample(seconds, {**cache, "counters": {**COUNTERS, **counters}}, first_tokens)


def glance(now: Sample, before: Sample | None) -> dict[str, str]:
    """The lines at the top, by their first words."""
    console = Console(file=io.StringIO(), width=160)
    console.print(view("here", now, before))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()[2:6]
    names = ("speed", "first token", "adapters", "prompts")
    return {name: line.removeprefix(name).strip() for name, line in zip(names, lines, strict=True)}


def test_since_the_start_and_between_two_looks(client: httpx.Client) -> None:
    cache = client.get("/v1/cache").json()
    first = sample(cache, 10.0, {0.1: 5, 0.5: 10, INFINITY: 10})
    assert glance(first, None) == {
        "speed": "400 tok/s while computing, 8.0 tokens and 3.0 segments a step",
        "first token": "50% within 100 ms, 95% within 500 ms",
        "adapters": "device 60%, host 30%, disk 10%",
        "prompts": "25% of their tokens cached",
    }
    more: dict[str, Any] = {"steps": 110, "step_seconds": 2.5, "segments": 350, "computed_tokens": 900}
    more |= {"requests_by_tier": {"device": 6, "host": 4, "disk": 1}, "prefix_queries": 1100, "prefix_hits": 350}
    second = sample(cache, 11.0, {0.1: 15, 0.5: 20, INFINITY: 20}, **more)
    assert glance(second, first) == {
        "speed": "200 tok/s while computing, 10.0 tokens and 5.0 segments a step, busy 50%",
        "first token": "50% within 100 ms, 95% within 100 ms",
        "adapters": "device 0%, host 100%, disk 0%",
        "prompts": "100% of their tokens cached",
    }
    assert glance(sample(cache, 12.0, {0.1: 5, 0.5: 10, INFINITY: 10}), first) == glance(first, None), "idle since"
    assert glance(first, second) == glance(first, None), "a new engine"


def test_before_anything_was_computed(client: httpx.Client) -> None:
    cache = client.get("/v1/cache").json()
    none = dict.fromkeys(("steps", "step_seconds", "segments", "computed_tokens", "prefix_queries", "prefix_hits"), 0)
    empty = sample(cache, 1.0, {}, **none, requests_by_tier={"device": 0, "host": 0, "disk": 0})
    assert glance(empty, None) == {
        "speed": "nothing computed yet",
        "first token": "-",
        "adapters": "-",
        "prompts": "-",
    }


def test_first_tokens_beyond_the_histogram_are_not_made_up(client: httpx.Client) -> None:
    slow = sample(client.get("/v1/cache").json(), 1.0, {0.1: 1, INFINITY: 4})
    assert glance(slow, None)["first token"] == "50% within longer than measured, 95% within longer than measured"


def test_first_tokens_are_the_servers_own(client: httpx.Client) -> None:
    assert not any(take_sample(str(client.base_url)).first_tokens.values())
    for _ in range(3):
        assert client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}).status_code == 200
    counted = take_sample(str(client.base_url)).first_tokens
    assert counted[INFINITY] == 3
    assert list(counted.values()) == sorted(counted.values())


def test_a_server_whose_metrics_may_not_be_read_is_shown_without(client: httpx.Client) -> None:
    cache = client.get("/v1/cache").json()
    assert glance(sample(cache, 1.0, {}), None)["first token"] == "-"
