"""`heddle adapters`: push, list, show, alias, pin and remove the adapters of a running server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heddle_server.commands.server_flags import DEFAULT_SERVER, ApiKey, ServerUrl
from heddle_server.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from heddle_server.adapters_client import AdaptersClient

PIPED_COLUMNS = 200  # of a table that no terminal limits

app = typer.Typer(
    name="adapters",
    help="Push, list, show, alias, pin and remove a server's adapters.",
    no_args_is_help=True,
)

_DURATION = re.compile(r"(?P<number>\d{1,12})(?P<unit>[smhdw]?)")
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def parse_duration(text: str) -> int:
    """Seconds of "90", "30m", "12h", "7d" or "2w"."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no time; write for example 30m, 12h or 7d.")
    return int(match["number"]) * _UNIT_SECONDS[match["unit"]]


Visibility = Annotated[
    str | None, typer.Option("--visibility", metavar="private|public", help="public: every tenant may use it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print what the server says, as JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name, perhaps with its namespace: team/sql.")]


@app.command("push")
def push_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="Folder that save_pretrained wrote.")
    ],
    name: Annotated[str | None, typer.Option("--name", help="Its name (default: the folder's).")] = None,
    alias: Annotated[str | None, typer.Option("--alias", help="Alias to move to the new version.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="May be given more than once.")] = None,
    description: Annotated[str | None, typer.Option("--description", help="What it is for.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it on the device.")] = False,
    ttl: Annotated[
        int | None,
        typer.Option("--ttl", parser=parse_duration, metavar="TIME", help="Delete it after 12h, 7d, ...; 0: never."),
    ] = None,
    visibility: Visibility = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it and say what memory it would take; store nothing.")
    ] = False,
    as_json: Json = False,
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Upload the adapter in DIR, or a new version of it."""
    _check_folder(folder)
    _check_tags(tag or [])
    said = {
        "name": name or folder.resolve().name,
        "alias": alias,
        "tags": ",".join(tag) if tag else None,
        "description": description,
        "pinned": "true" if pin else None,
        "ttl_seconds": None if ttl is None else str(ttl),
        "visibility": visibility,
    }
    texts = {part: text for part, text in said.items() if text is not None}
    with _client(server, api_key) as client, _progress(folder) as on_sent:
        reply = client.push(folder, texts, is_dry_run=dry_run, on_sent=on_sent)
    if as_json:
        _print_json(reply)
    elif dry_run:
        _say_dry_run(reply)
    else:
        outcome = "pushed" if reply["is_new_version"] else "nothing new: this is the content of"
        typer.echo(f"{outcome} {_plain(reply['reference'])}: {_summary(reply)}")


@app.command("ls")
def list_command(
    part: Annotated[str | None, typer.Option("-q", "--query", help="Part of the name.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="With this tag.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Of this method, for example LoRA.")] = None,
    status: Annotated[str | None, typer.Option("--status", help="ready or quarantined.")] = None,
    tier: Annotated[str | None, typer.Option("--tier", help="On the device, in host memory (host) or on disk.")] = None,
    pinned: Annotated[bool | None, typer.Option("--pinned/--not-pinned", help="Kept on the device, or not.")] = None,
    visibility: Visibility = None,
    as_json: Json = False,
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """List your adapters and the public ones, all or those that pass the filters."""
    asked = {"q": part, "tag": tag, "method": method, "status": status, "tier": tier, "visibility": visibility}
    filters = {key: value for key, value in asked.items() if value is not None}
    if pinned is not None:
        filters["pinned"] = str(pinned).lower()
    with _client(server, api_key) as client:
        cards = list(client.cards(filters))
    if as_json:
        _print_json(cards)
    else:
        _print_table(cards, is_filtered=bool(filters))


@app.command("show")
def show_command(
    reference: Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME@3, NAME@prod or NAME@sha256:...")],
    as_json: Json = False,
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Show one adapter, and its versions."""
    with _client(server, api_key) as client:
        card = client.card(reference)
        versions = client.versions(card["name"])
    if as_json:
        _print_json({**card, "versions": versions})
    else:
        _print_card(card, versions)


@app.command("alias")
def alias_command(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="For example prod.")],
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="Version number, another alias, or sha256:...")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Make the alias mean nothing.")] = False,
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Make NAME@ALIAS mean another version from now on."""
    if remove == (target is not None):
        raise typer.BadParameter("give either a TARGET or --remove.")
    with _client(server, api_key) as client:
        if target is None:
            removed = client.remove_alias(name, alias)
            typer.echo(f"{name}@{alias} is gone; it meant version {removed['version']}")
            return
        now = client.set_alias(name, alias, target)
    before = now["previous"]
    if before and before["version"] == now["version"]:
        typer.echo(f"{name}@{alias} means version {now['version']} already")
        return
    typer.echo(f"{name}@{alias} now means version {now['version']}" + ("" if before else "; it is new"))
    if before:
        typer.echo(
            f"it meant version {before['version']}; back: heddle adapters alias {name} {alias} {before['version']}"
        )


@app.command("pin")
def pin_command(
    name: Name,
    unpin: Annotated[bool, typer.Option("--unpin", help="Let it give way again.")] = False,
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Keep an adapter's newest version on the device."""
    with _client(server, api_key) as client:
        client.change(name, pinned=not unpin)
    typer.echo(f"{name} may give way to others again" if unpin else f"{name} stays on the device")


@app.command("publish")
def publish_command(
    name: Name,
    undo: Annotated[bool, typer.Option("--undo", help="Make it private again.")] = False,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="TENANT", help="Whose it is (default: your key's tenant's).")
    ] = None,
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Let every tenant of the server use an adapter; needs a key with the scope admin."""
    with _client(server, api_key) as client:
        client.change(name, owner=owner, visibility="private" if undo else "public")
    typer.echo(
        f"{name} is private: only its owner can use it" if undo else f"{name} is public: every tenant can use it"
    )


@app.command("rm")
def remove_command(
    reference: Annotated[str, typer.Argument(metavar="REF", help="NAME for all its versions, or NAME@3 for one.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Delete an adapter or one version; running requests finish on it."""
    with _client(server, api_key) as client:
        if not yes:
            card = client.card(reference)
            everything = f"{reference} with {_count(card['num_versions'], 'version')}"
            typer.confirm(f"Delete {card['reference'] if '@' in reference else everything}?", abort=True)
        gone = client.delete(reference)
    numbers = ", ".join(str(version["version"]) for version in gone["versions"])
    typer.echo(f"deleted {reference} (version {numbers})")
    if gone["draining"]:
        typer.echo(f"{_count(gone['draining'], 'running request')} will finish on it")


@contextmanager
def _client(server: str, api_key: str | None) -> Iterator[AdaptersClient]:
    """A client whose errors end the command with status 1 and one line."""
    from heddle_server.adapters_client import AdaptersClient
    from heddle_server.server_address import ServerError

    try:
        yield AdaptersClient(server, api_key)
    except ServerError as error:
        typer.secho(f"heddle: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


def _check_folder(folder: Path) -> None:
    from heddle_server.adapters_client import FILES

    for file in FILES:
        if not (folder / file).is_file():
            is_pickle = (folder / file).with_suffix(".bin").exists()
            remedy = (
                "a .bin file is not read: save the adapter with safe_serialization=True"
                if is_pickle
                else "give the folder that PEFT's save_pretrained wrote"
            )
            raise typer.BadParameter(f"{folder} has no {file}; {remedy}.")


def _check_tags(tags: list[str]) -> None:
    for tag in tags:
        if "," in tag:
            raise typer.BadParameter(f"a tag has no comma: {tag!r}. Give --tag more than once.")


@contextmanager
def _progress(folder: Path) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal while the files in `folder` are sent; what it yields counts the bytes."""
    from rich.progress import Progress

    from heddle_server.adapters_client import FILES

    terminal = console(stderr=True)
    with Progress(transient=True, console=terminal, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("uploading", total=sum((folder / file).stat().st_size for file in FILES))
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _say_dry_run(report: dict[str, Any]) -> None:
    card, memory = report["card"], report["memory"]
    pages = f"{_count(memory['pages'], 'page')}, {memory['pool_share']:.2%} of it"
    typer.echo(f"{_plain(card['name'])} would be taken: {_summary(card)} ({pages})")
    if not report["is_new_version"]:
        typer.echo(f"it is what {_plain(card['reference'])} is already: no new version")
        return
    typer.echo("a new version" if report["name_exists"] else "a new adapter")
    if report["is_stored"]:
        typer.echo(f"the same content is stored as {', '.join(map(_plain, report['stored_as']))}")


def _summary(card: dict[str, Any]) -> str:
    return f"{_plain(_method(card))}, {format_size(card['size_bytes'])}, takes {_pool_size(card)} of the page pool"


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2))


def _print_table(cards: list[dict[str, Any]], *, is_filtered: bool) -> None:
    if not cards:
        remedy = "give other filters" if is_filtered else "upload one with `heddle adapters push DIR`"
        typer.echo(f"no adapters; {remedy}")
        return
    columns = ("name", "version", "method", "rank", "pool", "tier", "status", "owner", "aliases", "tags", "expires")
    table = simple_table(*columns)
    for card in cards:
        table.add_row(
            _plain(card["name"]),
            str(card["version"]),
            _plain(card["method"]),
            _rank(card),
            _pool_size(card),
            card["tier"] + (", pinned" if card["pinned"] else ""),
            card["status"],
            _plain(card["owner"]) + (", public" if card["visibility"] == "public" else ""),
            _plain(_aliases(card)),
            _plain(", ".join(card["tags"])),
            time_text(card["expires"]),
        )
    console().print(table)


def _print_card(card: dict[str, Any], versions: list[dict[str, Any]]) -> None:
    lines = {
        "name": card["name"],
        "version": f"{card['version']} of {card['num_versions']}",
        "description": card["description"],
        "tags": ", ".join(card["tags"]),
        "method": _method(card),
        "in a mix": {"sum": "adds", "product": "multiplies", "alone": "cannot take part"}[card["combination"]],
        "size": f"{format_size(card['size_bytes'])} uploaded, {_pool_size(card)} of the page pool",
        "is": f"{card['status']}, {card['tier']}" + (", pinned" if card["pinned"] else ""),
        "reason": card["reason"],
        "aliases": _aliases(card),
        "expires": time_text(card["expires"]),
        "created": time_text(card["created"]),
        "owner": f"{card['owner']}, {card['visibility']}",
        "digest": card["digest"],
    }
    width = max(map(len, lines))
    for label, value in lines.items():
        if value:
            typer.echo(f"{label:<{width}}  {_plain(value)}")
    table = simple_table("version", "aliases", "method", "rank", "tier", "status", "created", "digest")
    for each in reversed(versions):
        aliases, method = _plain(", ".join(each["aliases"])), _plain(each["method"])
        state = (each["tier"], each["status"], time_text(each["created"]), each["digest"].removeprefix("sha256:")[:12])
        table.add_row(str(each["version"]), aliases, method, _rank(each), *state)
    console().print(table)


def simple_table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, box=SIMPLE_HEAD)


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    terminal = Console(stderr=stderr, markup=False, highlight=False)
    if not terminal.is_terminal:
        terminal.width = PIPED_COLUMNS
    return terminal


def _plain(text: object) -> str:
    from heddle_server.server_address import printable

    return printable(text)


def _method(card: dict[str, Any]) -> str:
    return f"{card['method']}, rank {card['rank']}" if card["rank"] else str(card["method"])


def _rank(card: dict[str, Any]) -> str:
    """Nothing for a method that has none."""
    return str(card["rank"] or "")


def _aliases(card: dict[str, Any]) -> str:
    return ", ".join(f"{alias}={version}" for alias, version in card["aliases"].items())


def _pool_size(card: dict[str, Any]) -> str:
    return format_size(card["pool_bytes_estimate"]) if card["pool_bytes_estimate"] is not None else "?"


def time_text(unix_seconds: int | None) -> str:
    """Local time, to the minute; nothing for never."""
    if unix_seconds is None:
        return ""
    return datetime.fromtimestamp(unix_seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
