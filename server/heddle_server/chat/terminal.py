"""A conversation at a terminal: answers as they come, commands that begin with a slash, Ctrl-C for an answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from urllib.parse import quote

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heddle_server.chat.conversation import BASE, Conversation, Figures
from heddle_server.server_address import ServerError, printable

NUM_LISTED = 1000
HELP = "/adapter NAME speaks to another one, /adapters lists them, /new forgets what was said, /exit ends."


def converse(conversation: Conversation, console: Console, read_line: Callable[[str], str] = input) -> None:
    """Until /exit or the end of the input. Errors are shown, and the conversation goes on."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrows and history for `input`
    console.print(Text(f"{conversation.client.address}. {HELP}", style="dim"))
    while True:
        try:
            line = read_line(f"{printable(conversation.adapter or BASE)}> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(Text("\n/exit ends.", style="dim"))
            continue
        try:
            if line == "/exit":
                return
            if line.startswith("/"):
                _obey(line, conversation, console)
            elif line:
                _show_answer(line, conversation, console)
        except ServerError as error:
            console.print(Text(str(error), style="red"))


def answer_plainly(conversation: Conversation, question: str, write: Callable[[str], object]) -> None:
    """One question, and nothing but its answer; raises `ServerError`."""
    for piece in conversation.ask(question):
        if isinstance(piece, str):
            write(piece)
    write("\n")


def _obey(line: str, conversation: Conversation, console: Console) -> None:
    command, _, argument = line.partition(" ")
    match command, argument.strip():
        case "/adapter", name:
            conversation.adapter = None if name in ("", BASE) else name
        case "/adapters", part:
            console.print(_adapters(conversation, part))
        case "/new", "":
            conversation.start_anew()
        case _:
            console.print(Text(HELP, style="dim"))


def _show_answer(question: str, conversation: Conversation, console: Console) -> None:
    """Ctrl-C stops the answer: its connection is closed, so the server stops too."""
    try:
        with closing(conversation.ask(question)) as pieces:
            for piece in pieces:
                if isinstance(piece, str):
                    console.print(Text(_shown(piece)), end="", soft_wrap=True)
                else:
                    console.print(Text(f"\n{_figures(piece)}", style="dim"))
    except KeyboardInterrupt:
        console.print(Text("\nstopped", style="dim"))


def _figures(figures: Figures) -> str:
    words = [f"first token after {figures.ttft_seconds * 1000:.0f} ms"]
    if figures.tokens_per_second is not None:
        words.append(f"{figures.tokens_per_second:.1f} tok/s")
    if figures.tier == "device":
        words.append("the adapter was on the device")
    elif figures.tier is not None:
        source = {"host": "host memory", "disk": "disk"}[figures.tier]
        words.append(f"the adapter came from {source} in {figures.load_milliseconds or 0:.0f} ms")
    return ", ".join(words)


def _adapters(conversation: Conversation, part: str) -> Table:
    filters = f"&q={quote(part)}" if part else ""
    table = Table("adapter", "method", "rank", "tier", box=SIMPLE_HEAD)
    page = conversation.client.get(f"/v1/adapters?limit={NUM_LISTED}{filters}")
    for card in page["data"]:
        cells = (card["name"], card["method"], card["rank"] or "", card["tier"])
        table.add_row(*(Text(printable(cell)) for cell in cells))
    if page["has_more"]:
        table.add_row("and more; /adapters PART lists those with PART in their name")
    return table


def _shown(text: str) -> str:
    """Lines and tabs stay; what would move the cursor or change its colours does not."""
    return "".join(character if character in "\n\t" else printable(character) for character in text)
