"""`python -m heddle_demo.evaluate`: exact match of the base and of every adapter, through a running server.

Start one with `heddle demo`. The base is asked its whole world; each adapter only questions it was not trained on.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from heddle_demo.data import ADAPTERS, UPLOADS
from heddle_demo.tour import BASE, Reply, ask
from heddle_demo.world import Example, held_out, questions
from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.errors import LoadTestError

BASE_TARGET = 0.90
ADAPTER_TARGET = 0.85
CONCURRENCY = 32


@dataclass(frozen=True)
class Score:
    """How many of an adapter's answers came back exactly as they should."""

    adapter: str
    method: str
    num_questions: int
    num_right: int

    @property
    def exact_match(self) -> float:
        return self.num_right / self.num_questions

    @property
    def is_good(self) -> bool:
        return self.exact_match >= (BASE_TARGET if self.adapter == BASE else ADAPTER_TARGET)


def main(
    target: Annotated[str, typer.Option(help="Address of a running `heddle demo`.")] = "http://127.0.0.1:8000",
) -> None:
    """Print a table for people and one JSON line for scripts; exit 1 if any score is below its target."""
    try:
        scores = asyncio.run(evaluate(target))
    except LoadTestError as error:
        typer.secho(f"{error}. Start a server with `heddle demo` first.", fg="red", err=True)
        raise typer.Exit(2) from None
    table = Table("adapter", "method", "questions", "exact match", "target")
    for score in scores:
        goal = BASE_TARGET if score.adapter == BASE else ADAPTER_TARGET
        table.add_row(score.adapter, score.method, str(score.num_questions), f"{score.exact_match:.1%}", f"{goal:.0%}")
    Console().print(table)
    print(json.dumps({score.adapter: round(score.exact_match, 4) for score in scores}))
    sys.exit(not all(score.is_good for score in scores))


async def evaluate(target: str) -> list[Score]:
    """Ask everything; raises LoadTestError when nothing answers at `target`."""
    exams: list[tuple[str, str, tuple[Example, ...]]] = [(BASE, "the base, in 4 bit", questions())]
    async with ChatClient(target) as client:
        registered = await client.list_models()
        exams += [
            (name, method, held_out(name)) for name, method in {**ADAPTERS, **UPLOADS}.items() if name in registered
        ]
        waiting = [ask_all(client, adapter, examples) for adapter, _, examples in exams]
        console = Console(stderr=True)
        replies = [await one for one in track(waiting, "asking", console=console, transient=True)]
    return [
        Score(adapter, method, len(examples), sum(reply.is_right for reply in answered))
        for (adapter, method, examples), answered in zip(exams, replies, strict=True)
    ]


async def ask_all(client: ChatClient, adapter: str, examples: tuple[Example, ...]) -> list[Reply]:
    """Every question once, a fixed number under way at a time."""
    turn = asyncio.Semaphore(CONCURRENCY)

    async def one(example: Example) -> Reply:
        async with turn:
            return await ask(client, example, adapter)

    return await asyncio.gather(*(one(example) for example in examples))


if __name__ == "__main__":
    typer.run(main)
