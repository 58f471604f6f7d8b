"""The flags of commands that start a server, or ask what one would be: made from `ServeOptions`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from heddle_server.commands.failure import as_one_line
from heddle_server.config import ConfigError, own_type
from heddle_server.options import ServeOptions, flag_of, hints, is_size, load_options, plain_type, written

CONFIG_FLAG, CONFIG_VARIABLE = "--config", "HEDDLE_CONFIG"
_METAVARS = {int: "<int>", float: "<float>", Path: "<path>", str: "<str>"}

Command = Callable[..., None]


def with_serve_options(*names: str) -> Callable[[Command], Command]:
    """Gives a typer command the flags of these settings, or of all; it receives `ServeOptions` as `options`.

    Every setting can come from the environment or the file as well. Settings that cannot be served end the command
    with status 2 and one line, not a traceback.
    """
    fields = names or tuple(ServeOptions.model_fields)

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(typer_context: typer.Context, config_file: Path | None, **arguments: Any) -> None:
            typed = {name: arguments.pop(name) for name in fields}
            flags = {name: value for name, value in typed.items() if _is_typed(typer_context, name)}
            with as_one_line(ConfigError, status=2):
                command(**arguments, options=load_options(flags, config_file))

        own_hints = get_type_hints(command, include_extras=True)
        own = [each for each in inspect.signature(command).parameters.values() if each.name != "options"]
        parameters = [
            _parameter("typer_context", typer.Context),
            *(each.replace(annotation=own_hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in own),
            _parameter("config_file", ConfigFile, default=None),
            *(_flag(name) for name in fields),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        CONFIG_FLAG, metavar="FILE", envvar=CONFIG_VARIABLE, show_envvar=False, help="TOML file of settings, by name."
    ),
]


def _flag(name: str) -> inspect.Parameter:
    """What was typed is checked with what stands in the environment and the file, in one place: here it is text."""
    field, hint = ServeOptions.model_fields[name], hints()[name]
    flag = flag_of(name)
    if plain_type(hint) is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=field.description)
        return _parameter(name, Annotated[bool, option], field.default)
    option = typer.Option(flag, metavar=_metavar(hint), help=field.description)
    return _parameter(name, Annotated[str | None, option], written(name))


def _metavar(hint: Any) -> str:
    kind = plain_type(hint)
    if kind is None:
        return f"<{'|'.join(get_args(own_type(hint)))}>"
    return "SIZE" if is_size(hint) else _METAVARS[kind]


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
