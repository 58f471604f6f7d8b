"""What `heddle adapters` prints of adapters: a line, a table, or all that is known of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from heddle_server.sizes import format_size
from heddle_server.terminal_text import console, counted, plain, simple_table, time_text

LABEL_COLUMNS = 13


def say_dry_run(report: dict[str, Any]) -> None:
    card, memory = report["card"], report["memory"]
    typer.echo(f"{plain(card['name'])} would be taken: {summary(card)} ({memory['pool_share']:.2%} of it)")
    if not report["is_new_version"]:
        typer.echo(f"it is what {plain(card['reference'])} is already: no new version")
        return
    typer.echo("a new version" if report["name_exists"] else "a new adapter")
    if report["is_stored"]:
        typer.echo(f"the same content is stored as {', '.join(map(plain, report['stored_as']))}")


def summary(card: dict[str, Any]) -> str:
    modules = counted(sum(card["sites"].values()), "module")
    return f"{plain(_method(card))} at {modules}, {format_size(card['size_bytes'])}, takes {_cost(card)}"


def print_table(cards: list[dict[str, Any]], *, is_filtered: bool) -> None:
    if not cards:
        remedy = "give other filters" if is_filtered else "upload one with `heddle adapters push DIR`"
        typer.echo(f"no adapters; {remedy}")
        return
    columns = ("name", "version", "method", "rank", "pool", "tier", "status", "owner", "aliases", "tags", "expires")
    table = simple_table(*columns)
    for card in cards:
        size = card["pool_bytes_estimate"]
        table.add_row(
            plain(card["name"]),
            str(card["version"]),
            plain(card["method"]),
            _rank(card),
            "?" if size is None else format_size(size),
            card["tier"] + (", pinned" if card["pinned"] else ""),
            card["status"],
            plain(card["owner"]) + (", public" if card["visibility"] == "public" else ""),
            plain(_aliases(card)),
            plain(", ".join(card["tags"])),
            time_text(card["expires"]),
        )
    console().print(table)


def print_card(card: dict[str, Any], versions: list[dict[str, Any]]) -> None:
    for label, *values in _facts(card):
        for number, value in enumerate(filter(None, values)):
            typer.echo(f"{'' if number else label:<{LABEL_COLUMNS}}{plain(value)}")
    table = simple_table("version", "aliases", "method", "rank", "tier", "status", "created", "digest")
    for each in reversed(versions):
        aliases, method = plain(", ".join(each["aliases"])), plain(each["method"])
        state = (each["tier"], each["status"], time_text(each["created"]), each["digest"].removeprefix("sha256:")[:12])
        table.add_row(str(each["version"]), aliases, method, _rank(each), *state)
    console().print(table)


def _facts(card: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Labels, each with what is to stand beside it line by line; empty lines are left out."""
    num_tokens = card["num_virtual_tokens"]
    yield "name", card["name"]
    yield "version", f"{card['version']} of {card['num_versions']}"
    yield "description", card["description"]
    yield "tags", ", ".join(card["tags"])
    yield "method", _method(card)
    yield "sites", *_sites(card["sites"])
    yield "acts on", card["positions"]
    yield "tokens", f"puts {counted(num_tokens, 'token')} before every prompt" if num_tokens else ""
    yield "in a mix", {"sum": "adds", "product": "multiplies", "alone": "cannot take part"}[card["combination"]]
    yield "file", format_size(card["size_bytes"])
    yield "cost", _cost(card)
    yield "is", f"{card['status']}, {card['tier']}" + (", pinned" if card["pinned"] else "")
    yield "reason", card["reason"]
    yield "aliases", _aliases(card)
    yield "expires", time_text(card["expires"])
    yield "created", time_text(card["created"])
    yield "owner", f"{card['owner']}, {card['visibility']}"
    yield "digest", card["digest"]


def _sites(sites: Mapping[str, int]) -> Iterator[str]:
    """Those in one place that are equally many in a line: "model.layers.*.mlp.{up_proj,down_proj}, 24 each"."""
    lines: dict[tuple[str, int], list[str]] = {}
    for pattern, count in sites.items():
        place, dot, name = pattern.rpartition(".")
        lines.setdefault((place + dot, count) if dot else (pattern, count), []).append(name if dot else "")
    for (place, count), names in lines.items():
        joined = names[0] if len(names) == 1 else f"{{{','.join(names)}}}"
        number = f", {count:,} each" if len(names) > 1 else f", {count:,}"
        yield place + joined + (number if count > 1 else "")


def _cost(card: dict[str, Any]) -> str:
    size = card["pool_bytes_estimate"]
    if size is None:
        return "an unknown part of the page pool"
    return f"{size:,} bytes of the page pool: {counted(card['pool_pages'], 'page')}"


def _method(card: dict[str, Any]) -> str:
    return f"{card['method']}, rank {card['rank']}" if card["rank"] else str(card["method"])


def _rank(card: dict[str, Any]) -> str:
    """Nothing for a method that has none."""
    return str(card["rank"] or "")


def _aliases(card: dict[str, Any]) -> str:
    return ", ".join(f"{alias}={version}" for alias, version in card["aliases"].items())
