"""`heddle top`: what a running server holds in memory and how fast it works, again and again."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from heddle_server.adapters_client import ServerError, printable
from heddle_server.options import format_size

NUM_ADAPTERS = 20  # shown, most used first
BAR_CELLS = 48
TIMEOUT_SECONDS = 15.0
_COLOURS = {"adapter": "magenta", "loading": "bright_magenta", "kv": "green", "cached": "cyan", "free": "bright_black"}


@dataclass(frozen=True)
class Sample:
    """One answer of GET /v1/cache."""

    seconds: float  # when it came, on the monotonic clock
    cache: Mapping[str, Any]

    @property
    def counters(self) -> dict[str, float]:
        """By the names they are shown under."""
        counters = self.cache["counters"]
        tiers, evictions = counters["requests_by_tier"], counters["adapter_evictions"]
        return {
            "tokens computed": counters["computed_tokens"],
            "steps": counters["steps"],
            "segments": counters["segments"],
            "adapter found on the device": tiers["device"],
            "adapter found in host memory": tiers["host"],
            "adapter found on disk": tiers["disk"],
            "adapter loads": counters["adapter_loads"],
            "adapter evictions, device": evictions["device"],
            "adapter evictions, host": evictions["host"],
            "prefix tokens found": counters["prefix_hits"],
            "prefix pages given up": counters["prefix_evictions"],
            "preemptions": counters["preemptions"],
        }


def run_top(server_url: str, interval_seconds: float, once: bool, console: Console | None = None) -> None:
    """Shows the server until Ctrl-C, or once; raises `ServerError` where it cannot be asked at all.

    A server that stops answering meanwhile is waited for.
    """
    console = console or Console()
    before, sample = None, take_sample(server_url)
    if once:
        console.print(view(server_url, sample, None))
        return
    with Live(view(server_url, sample, None), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                time.sleep(interval_seconds)
                before, sample = sample, take_sample(server_url)
                live.update(view(server_url, sample, before), refresh=True)
            except ServerError as error:
                live.update(Group(view(server_url, sample, before), Text(str(error), style="red")), refresh=True)
            except KeyboardInterrupt:
                return


def take_sample(server_url: str) -> Sample:
    """Asks the server now; raises `ServerError`."""
    address = server_url if "://" in server_url else f"http://{server_url}"
    url = f"{address.rstrip('/').removesuffix('/v1')}/v1/cache?limit={NUM_ADAPTERS}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            return Sample(time.monotonic(), json.load(response))
    except urllib.error.HTTPError as error:
        raise ServerError(_reason(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise ServerError(
            f"no heddle server answers at {printable(address)} ({printable(reason)}). Start one with "
            "`heddle serve MODEL`, or name it with --server."
        ) from None


def view(server_url: str, sample: Sample, before: Sample | None) -> RenderableType:
    """One screen; rates are those since `before`."""
    cache = sample.cache
    requests = cache["requests"]
    head = Text.assemble(
        ("heddle top  ", "bold"),
        f"{printable(server_url)}   {requests['running']} running, {requests['waiting']} waiting   "
        f"eviction policy: {cache['policy']}",
    )
    return Group(head, Text(), *_pool(cache), Text(), _counter_table(sample, before), Text(), _adapter_table(cache))


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
            str(each["references"]),
            str(each["waiting"]),
            str(each["uses"]),
            f"{each['idle_seconds']:.0f} s",
            "pinned" if each["pinned"] else "",
        )
    if left_out := cache["num_adapters"] - len(cache["adapters"]):
        table.add_row(f"and {left_out} more")
    return table


def _name(adapter: Mapping[str, Any]) -> str:
    names = adapter["names"]
    shown = printable(names[0]) if names else adapter["digest"][:19]  # deleted, and still in use
    return f"{shown} +{len(names) - 1}" if len(names) > 1 else shown


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return printable(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}; is it a heddle server?"
