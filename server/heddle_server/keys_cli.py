"""`heddle keys`: make, list and revoke API keys, and limit what a tenant may use.

It works on the store's folder, not through a server: whoever may write there is the operator. A server that runs over
the same store sees every change with its next request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from heddle_adapters.errors import StoreUnusable
from heddle_server.adapters_cli import parse_duration
from heddle_server.audit_log import AuditLog
from heddle_server.commands.failure import as_one_line
from heddle_server.key_store import MAX_LABEL_CHARS, SCOPES, ApiKey, KeyStore, NoSuchKey, Scope, TenantLimits, is_tenant
from heddle_server.options import ServeOptions
from heddle_server.serve_flags import with_serve_options
from heddle_server.sizes import format_size, parse_size
from heddle_server.terminal_text import console, simple_table, time_text

NO_LIMIT = "none"
MIN_RATE, MAX_RATE = 0.001, 1e9  # requests a second
MAX_LIFE_SECONDS = 100 * 366 * 86_400

app = typer.Typer(
    name="keys",
    help="Create, list and revoke API keys, and limit tenants.",
    no_args_is_help=True,
)


@dataclass(frozen=True)
class Bound:
    """What a limit becomes; None lifts it."""

    value: int | float | None


def parse_tenant(text: str) -> str:
    if not is_tenant(text):
        raise typer.BadParameter(
            f"{text!r} is no tenant's name; it has 1 to 64 small letters, digits, '.', '_' and '-', and begins with a "
            "letter or digit."
        )
    return text


def parse_scope(text: str) -> Scope:
    for scope in SCOPES:
        if text == scope:
            return scope
    raise typer.BadParameter(f"{text!r} is no scope; there are {', '.join(SCOPES)}.")


def parse_label(text: str) -> str:
    if len(text) > MAX_LABEL_CHARS or not text.isprintable():
        raise typer.BadParameter(f"a label has at most {MAX_LABEL_CHARS} printable characters.")
    return text


def parse_count(text: str) -> Bound:
    """A whole number of 0 or more, or none."""
    if text == NO_LIMIT:
        return Bound(None)
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise typer.BadParameter(f"{text!r} is no limit; give a whole number, or {NO_LIMIT} to lift it.")
    return Bound(int(text))


def parse_rate(text: str) -> Bound:
    """A number of at least one in a quarter of an hour, or none."""
    if text == NO_LIMIT:
        return Bound(None)
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not MIN_RATE <= rate <= MAX_RATE:
        raise typer.BadParameter(
            f"{text!r} is no rate; give a number from {MIN_RATE:g} to {MAX_RATE:g}, such as 5 or 0.5, or {NO_LIMIT}."
        )
    return Bound(rate)


def parse_bytes(text: str) -> Bound:
    """A size, or none."""
    if text == NO_LIMIT:
        return Bound(None)
    try:
        return Bound(parse_size(text))
    except ValueError as error:
        raise typer.BadParameter(f"{error} {NO_LIMIT} lifts the limit.") from None


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Tenant = Annotated[str, typer.Argument(metavar="TENANT", parser=parse_tenant, help="For example a team's name.")]


def _limit(flag: str, parser: Callable[[str], Bound], metavar: str, help: str) -> Any:
    return typer.Option(flag, parser=parser, metavar=metavar, help=help)


@app.command("create")
@with_serve_options("store")
def create_command(
    tenant: Annotated[
        str,
        typer.Option("--tenant", metavar="TENANT", parser=parse_tenant, help="Whose key it is, e.g. a team's name."),
    ],
    scope: Annotated[
        list[str],
        typer.Option("--scope", metavar="SCOPE", help=f"May be given more than once: {', '.join(SCOPES)}."),
    ],
    label: Annotated[str, typer.Option("--label", parser=parse_label, metavar="TEXT", help="What it is for.")] = "",
    expires: Annotated[
        int | None,
        typer.Option("--expires", parser=parse_duration, metavar="TIME", help="For how long it counts: 12h, 90d, ..."),
    ] = None,
    as_json: Json = False,
    *,
    options: ServeOptions,
) -> None:
    """Make a key and print it: the only time that anybody sees it."""
    scopes = {parse_scope(each) for each in scope}
    if expires == 0:
        raise typer.BadParameter(
            "a key that expires at once is of no use; leave --expires out for one that never does."
        )
    if expires is not None and expires > MAX_LIFE_SECONDS:
        raise typer.BadParameter("a key may count for 100 years at most; leave --expires out for one that always does.")
    with _keys(options, must_exist=False) as keys:
        is_first = not keys.has_keys
        key, text = keys.create(tenant, scopes, label, None if expires is None else int(time.time()) + expires)
    if as_json:
        typer.echo(json.dumps({**_described(key), "key": text}, indent=2))
        return
    typer.echo(text)
    typer.echo("This is the key. It is shown only now, and not kept: copy it to where it is needed.", err=True)
    typer.echo(f"It counts for the server of the store {_store_path(options)}.", err=True)
    if is_first:
        typer.echo("It is the first: from now on this store's server answers nobody without a key.", err=True)


@app.command("ls")
@with_serve_options("store")
def list_command(as_json: Json = False, *, options: ServeOptions) -> None:
    """List the keys, without their secrets."""
    with _keys(options) as keys:
        found = keys.all()
    if as_json:
        typer.echo(json.dumps([_described(key) for key in found], indent=2))
    elif not found:
        typer.echo("no keys; make one with `heddle keys create`")
    else:
        _print_keys(found)


@app.command("revoke")
@with_serve_options("store")
def revoke_command(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `heddle keys ls` shows it.")],
    *,
    options: ServeOptions,
) -> None:
    """Make a key worthless, at once and for ever."""
    with _keys(options) as keys:
        key = keys.revoke(key_id)
        num_left = sum(each.status(time.time()) == "active" for each in keys.all())
    typer.echo(f"revoked {key.key_id} of {key.tenant}" + (f", {key.label}" if key.label else ""))
    if not num_left:
        typer.echo("no key is left, and the server stays closed: `heddle keys create` makes another one")


@app.command("limit")
@with_serve_options("store")
def limit_command(
    tenant: Tenant,
    adapters: Annotated[Bound | None, _limit("--adapters", parse_count, "N", "Names that it may have.")] = None,
    stored_bytes: Annotated[Bound | None, _limit("--bytes", parse_bytes, "SIZE", "What these take on disk.")] = None,
    pinned_bytes: Annotated[
        Bound | None, _limit("--pinned-bytes", parse_bytes, "SIZE", "What it may pin in the page pool.")
    ] = None,
    requests_per_second: Annotated[
        Bound | None, _limit("--requests-per-second", parse_rate, "R", "Answers that it may ask for in a second.")
    ] = None,
    queued_tokens: Annotated[
        Bound | None, _limit("--queued-tokens", parse_count, "N", "Tokens of its prompts that may wait at once.")
    ] = None,
    as_json: Json = False,
    *,
    options: ServeOptions,
) -> None:
    """Limit what a tenant may use, or show its limits; `none` lifts one."""
    asked = {
        "adapters": adapters,
        "stored_bytes": stored_bytes,
        "pinned_bytes": pinned_bytes,
        "requests_per_second": requests_per_second,
        "queued_tokens": queued_tokens,
    }
    bounds: dict[str, Any] = {name: bound.value for name, bound in asked.items() if bound is not None}
    with _keys(options) as keys:
        limits = keys.change_limits(tenant, bounds) if bounds else keys.limits_of(tenant)
    if as_json:
        typer.echo(json.dumps({"tenant": tenant, **asdict(limits)}, indent=2))
    else:
        _print_limits(tenant, limits)


@contextmanager
def _keys(options: ServeOptions, *, must_exist: bool = True) -> Iterator[KeyStore]:
    """The keys of a server's store; errors end the command with one line."""
    path = _store_path(options)
    with (
        as_one_line(StoreUnusable, NoSuchKey, status=1),
        KeyStore(path, AuditLog(path), must_exist=must_exist) as keys,
    ):
        yield keys


def _store_path(options: ServeOptions) -> Path:
    return options.store.expanduser().resolve()


def _described(key: ApiKey) -> dict[str, object]:
    return {
        "id": key.key_id,
        "tenant": key.tenant,
        "scopes": sorted(key.scopes),
        "label": key.label,
        "created": key.created_unix_seconds,
        "expires": key.expires_unix_seconds,
        "revoked": key.revoked_unix_seconds,
        "status": key.status(time.time()),
    }


def _print_keys(keys: Sequence[ApiKey]) -> None:
    table = simple_table("id", "tenant", "scopes", "status", "created", "expires", "label")
    for key in keys:
        times = (time_text(key.created_unix_seconds), time_text(key.expires_unix_seconds))
        table.add_row(key.key_id, key.tenant, ", ".join(sorted(key.scopes)), key.status(time.time()), *times, key.label)
    console().print(table)


def _print_limits(tenant: str, limits: TenantLimits) -> None:
    sizes = {"on disk": limits.stored_bytes, "pinned in the page pool": limits.pinned_bytes}
    counts = {
        "adapters": limits.adapters,
        "requests a second": limits.requests_per_second,
        "queued prompt tokens": limits.queued_tokens,
    }
    shown = {
        **{name: "no limit" if value is None else f"{value:g}" for name, value in counts.items()},
        **{name: "no limit" if value is None else format_size(value) for name, value in sizes.items()},
    }
    width = max(map(len, shown))
    typer.echo(f"{tenant} may use")
    for name, value in shown.items():
        typer.echo(f"  {name:<{width}}  {value}")
