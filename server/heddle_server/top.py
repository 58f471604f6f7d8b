"""`heddle top`: what a running server holds in memory and how fast it works, again and again."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from heddle_server.server_address import ServerError, printable
from heddle_server.server_client import ServerClient
from heddle_server.sizes import format_size

NUM_ADAPTERS = 20  # shown, most used first
BAR_CELLS = 48
TIMEOUT_SECONDS = 15.0
NOT_TOLD = "What the server does for all its tenants it tells keys with the scope admin only."
TTFT_METRIC = "heddle_time_to_first_token_seconds"
_COLOURS = {"adapter": "magenta", "loading": "bright_magenta", "kv": "green", "cached": "cyan", "free": "bright_black"}


@dataclass(frozen=True)
class Sample:
    """One answer of GET /v1/cache, and of /metrics."""

    seconds: float  # when it came, on the monotonic clock
    cache: Mapping[str, Any]
    # Requests whose first token took at most so many seconds, by the bound; nothing where /metrics may not be read.
    first_tokens: Mapping[float, float] = field(default_factory=dict)

    @property
    def counts_work(self) -> bool:
        """Whether the server tells this key how much all its tenants have it do."""
        return self.cache["counters"] is not None

    @property
    def counters(self) -> dict[str, float]:
        """By the names they are shown under; only where it `counts_work`."""
        counters = self.cache["counters"]
        tiers, evictions = counters["requests_by_tier"], counters["adapter_evictions"]
        return {
            "tokens computed": counters["computed_tokens"],
            "steps": counters["steps"],
            "step seconds": counters["step_seconds"],
            "segments": counters["segments"],
            "adapter found on the device": tiers["device"],
            "adapter found in host memory": tiers["host"],
            "adapter found on disk": tiers["disk"],
            "adapter loads": counters["adapter_loads"],
            "adapter evictions, device": evictions["device"],
            "adapter evictions, host": evictions["host"],
            "prefix tokens asked": counters["prefix_queries"],
            "prefix tokens found": counters["prefix_hits"],
            "prefix pages given up": counters["prefix_evictions"],
            "preemptions": counters["preemptions"],
        }


def run_top(
    server_url: str, interval_seconds: float, once: bool, console: Console | None = None, *, api_key: str | None = None
) -> None:
    """Shows the server until Ctrl-C, or once; raises `ServerError` where it cannot be asked at all.

    A server that stops answering meanwhile is waited for.
    """
    console = console or Console()
    before, sample = None, take_sample(server_url, api_key)
    if once:
        console.print(view(server_url, sample, None))
        return
    with Live(view(server_url, sample, None), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                time.sleep(interval_seconds)
                before, sample = sample, take_sample(server_url, api_key)
                live.update(view(server_url, sample, before), refresh=True)
            except ServerError as error:
                live.update(Group(view(server_url, sample, before), Text(str(error), style="red")), refresh=True)
            except KeyboardInterrupt:
                return


def take_sample(server_url: str, api_key: str | None = None) -> Sample:
    """Asks the server now; raises `ServerError`."""
    client = ServerClient(server_url, api_key, timeout_seconds=TIMEOUT_SECONDS)
    cache = client.get(f"/v1/cache?limit={NUM_ADAPTERS}")
    try:
        first_tokens = _histogram(client.get_text("/metrics"), TTFT_METRIC)
    except ServerError:  # this key may not read them; the rest is worth showing
        first_tokens = {}
    return Sample(time.monotonic(), cache, first_tokens)


def _histogram(metrics: str, name: str) -> dict[float, float]:
    """Of Prometheus' text: how many were at most so many seconds, by the bound."""
    found = re.findall(rf'^{name}_bucket{{le="([^"]+)"}} (\S+)$', metrics, re.MULTILINE)
    return {float(bound): float(count) for bound, count in found}


def view(server_url: str, sample: Sample, before: Sample | None) -> RenderableType:
    """One screen; rates are those since `before`."""
    cache = sample.cache
    words = [printable(server_url), f"eviction policy: {cache['policy']}"]
    if not sample.counts_work:
        return Group(_head(words), Text(), *_pool(cache), Text(), _adapter_table(cache), Text(), Text(NOT_TOLD))
    requests = cache["requests"]
    words.insert(1, f"{requests['running']} running, {requests['waiting']} waiting")
    glance, counters = _glance(sample, before), _counter_table(sample, before)
    return Group(_head(words), Text(), glance, Text(), *_pool(cache), Text(), counters, Text(), _adapter_table(cache))


def _head(words: Sequence[str]) -> Text:
    return Text.assemble(("heddle top  ", "bold"), "   ".join(words))


def _glance(sample: Sample, before: Sample | None) -> Table:
    """What decides how it feels to be served: between two looks, or since the start where nothing happened between."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_row("speed", _speed(sample, before))
    table.add_row("first token", _first_token(sample, before))
    tiers = ("adapter found on the device", "adapter found in host memory", "adapter found on disk")
    table.add_row("adapters", _shares(sample, before, dict(zip(tiers, ("device", "host", "disk"), strict=True))))
    table.add_row("prompts", _prefix_share(sample, before))
    return table


def _speed(sample: Sample, before: Sample | None) -> str:
    seconds, steps = _added(sample, before, "step seconds"), _added(sample, before, "steps")
    tokens = _added(sample, before, "tokens computed")
    if not seconds:
        return "nothing computed yet"
    words = f"{tokens / seconds:,.0f} tok/s while computing, {tokens / steps:.1f} tokens and "
    words += f"{_added(sample, before, 'segments') / steps:.1f} segments a step"
    if before is not None and _goes_on(sample, before):
        words += f", busy {min(1.0, seconds / (sample.seconds - before.seconds)):.0%}"
    return words


def _first_token(sample: Sample, before: Sample | None) -> str:
    earlier = before.first_tokens if before is not None and _goes_on(sample, before) else {}
    counts = {bound: count - earlier.get(bound, 0) for bound, count in sample.first_tokens.items()}
    if not counts or not max(counts.values()):
        counts = dict(sample.first_tokens)
    if not counts or not max(counts.values()):
        return "-"
    return ", ".join(f"{share:.0%} within {_bound(counts, share)}" for share in (0.5, 0.95))


def _bound(counts: Mapping[float, float], share: float) -> str:
    """The histogram's first bound below which so large a share lies."""
    wanted = share * max(counts.values())
    seconds = min(bound for bound, count in counts.items() if count >= wanted)
    return "longer than measured" if math.isinf(seconds) else f"{seconds * 1000:.0f} ms"


def _shares(sample: Sample, before: Sample | None, names: Mapping[str, str]) -> str:
    added = {name: _added(sample, before, counter) for counter, name in names.items()}
    total = sum(added.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in added.items()) if total else "-"


def _prefix_share(sample: Sample, before: Sample | None) -> str:
    asked = _added(sample, before, "prefix tokens asked")
    return f"{_added(sample, before, 'prefix tokens found') / asked:.0%} of their tokens cached" if asked else "-"


def _added(sample: Sample, before: Sample | None, name: str) -> float:
    """Since `before`, or since the start where nothing was computed in between."""
    if before is None or not _goes_on(sample, before):
        return sample.counters[name]
    return sample.counters[name] - before.counters[name]


def _goes_on(sample: Sample, before: Sample) -> bool:
    """Whether the same engine has worked in between. Counters of a new engine begin anew."""
    return sample.counters["steps"] > before.counters["steps"]


def _pool(cache: Mapping[str, Any]) -> Iterator[RenderableType]:
    pool, host = cache["pool"], cache["host"]
    yield _bar(pool["pages"])
    numbers = Text()
    for kind, colour in _COLOURS.items():
        numbers.append(f"{kind} {pool['pages'][kind]}  ", style=colour)
    yield numbers
    yield Text(
        f"pool {format_size(pool['num_pages'] * pool['page_bytes'])} in {pool['num_pages']} pages; "
        f"{pool['num_adapters']} adapters, {pool['pinned_pages']} pages pinned, "
        f"packing waste {pool['packing_waste']:.1%}"
    )
    yield Text(
        f"host {format_size(host['bytes'])} of {format_size(host['budget_bytes'])}; {host['num_adapters']} adapters"
    )


def _bar(pages: Mapping[str, int]) -> Text:
    num_pages = max(1, sum(pages.values()))
    bar, num_told, num_drawn = Text(), 0, 0
    for kind, colour in _COLOURS.items():
        num_told += pages[kind]
        end = round(num_told / num_pages * BAR_CELLS)
        bar.append("█" * (end - num_drawn), style=colour)
        num_drawn = end
    return bar


def _counter_table(sample: Sample, before: Sample | None) -> Table:
    table = Table("since the engine started", box=None, pad_edge=False)
    table.add_column("total", justify="right")
    table.add_column("per second", justify="right")
    for name, total in sample.counters.items():
        table.add_row(name, f"{total:,.0f}", _rate(name, sample, before))
    return table


def _rate(name: str, sample: Sample, before: Sample | None) -> str:
    if before is None:
        return ""
    added = sample.counters[name] - before.counters[name]
    # Counters of a new engine begin anew.
    return f"{added / (sample.seconds - before.seconds):,.1f}" if added >= 0 else ""


def _adapter_table(cache: Mapping[str, Any]) -> Table:
    table = Table("adapter", "tier", box=None, pad_edge=False)
    for heading in ("pages", "size", "running", "waiting", "uses", "idle"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for each in cache["adapters"]:
        table.add_row(
            Text(_name(each)),
            each["tier"],
            str(each["pages"]),
            format_size(each["size_bytes"]),
            *("-" if each[use] is None else str(each[use]) for use in ("references", "waiting", "uses")),
            "-" if each["idle_seconds"] is None else f"{each['idle_seconds']:.0f} s",
            "pinned" if each["pinned"] else "",
        )
    if left_out := cache["num_adapters"] - len(cache["adapters"]):
        table.add_row(f"and {left_out} more")
    return table


def _name(adapter: Mapping[str, Any]) -> str:
    names = adapter["names"]
    shown = printable(names[0]) if names else adapter["digest"][:19]  # deleted, and still in use
    return f"{shown} +{len(names) - 1}" if len(names) > 1 else shown
