"""`heddle adapters`: push, list, show, alias, pin and remove the adapters of a running server, and make new ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heddle_server.adapter_text import print_card, print_table, say_dry_run, summary
from heddle_server.commands.adapter_folder import check_folder
from heddle_server.commands.combine import combine_command
from heddle_server.commands.convert import convert_command
from heddle_server.commands.merge import merge_command
from heddle_server.commands.server_flags import DEFAULT_SERVER, ApiKey, ServerUrl
from heddle_server.terminal_text import console, counted, plain

if TYPE_CHECKING:
    from heddle_server.adapters_client import AdaptersClient

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
    check_folder(folder)
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
        say_dry_run(reply)
    else:
        outcome = "pushed" if reply["is_new_version"] else "nothing new: this is the content of"
        typer.echo(f"{outcome} {plain(reply['reference'])}: {summary(reply)}")


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
        print_table(cards, is_filtered=bool(filters))


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
        print_card(card, versions)


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
            everything = f"{reference} with {counted(card['num_versions'], 'version')}"
            typer.confirm(f"Delete {card['reference'] if '@' in reference else everything}?", abort=True)
        gone = client.delete(reference)
    numbers = ", ".join(str(version["version"]) for version in gone["versions"])
    typer.echo(f"deleted {reference} (version {numbers})")
    if gone["draining"]:
        typer.echo(f"{counted(gone['draining'], 'running request')} will finish on it")


app.command("combine")(combine_command)
app.command("convert")(convert_command)
app.command("merge")(merge_command)


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


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2))
