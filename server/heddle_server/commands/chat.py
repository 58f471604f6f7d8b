"""`heddle chat`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from heddle_server.chat.conversation import BASE, Conversation
from heddle_server.commands.failure import as_one_line
from heddle_server.commands.server_flags import DEFAULT_SERVER, ApiKey, ServerUrl
from heddle_server.server_address import ServerError
from heddle_server.server_client import ServerClient

app = typer.Typer()


@app.command("chat")
def chat_command(
    server: ServerUrl = DEFAULT_SERVER,
    api_key: ApiKey = None,
    adapter: Annotated[str | None, typer.Option("--adapter", metavar="NAME", help="Whom to talk with first.")] = None,
    model: Annotated[str, typer.Option("--model", help="What the request names as its model.")] = BASE,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 for the likeliest words.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Of one answer, at most.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same answer every time.")] = None,
) -> None:
    """Talk with a running server in the terminal.

    Where the input is no terminal, all of it is one question, and its plain answer is all that is printed.
    """
    given = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    with as_one_line(ServerError, status=1):
        conversation = Conversation(ServerClient(server, api_key), model, adapter, system, sampling)
        if sys.stdin.isatty():
            from rich.console import Console

            from heddle_server.chat.terminal import converse

            converse(conversation, Console(markup=False, highlight=False))
        else:
            from heddle_server.chat.terminal import answer_plainly

            answer_plainly(conversation, sys.stdin.read(), _write)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
