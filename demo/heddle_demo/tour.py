"""A tour of a running demo server, over HTTP like any client: many adapters in one batch, an upload, a short load."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from heddle_demo.data import ADAPTERS, ADAPTERS_DIR, UPLOAD_DIR, UPLOADS
from heddle_demo.styles import STYLES
from heddle_demo.world import Example, questions
from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.client.result import RequestResult
from heddle_loadtest.client.target import Target
from heddle_loadtest.measure.summary import summarize
from heddle_loadtest.report.tables import print_tables
from heddle_loadtest.run.experiment import run_experiment
from heddle_loadtest.workload.spec import Adapters, Closed, Output, Questions, Workload

QUESTION = "What is the capital of France?"
BASE = "base"
LOAD_STREAMS = 8
LOAD_SECONDS = 5.0
MAX_TOKENS = 64


@dataclass(frozen=True)
class Reply:
    """One adapter's answer beside what it should be."""

    adapter: str
    result: RequestResult
    expected: str

    @property
    def is_right(self) -> bool:
        return self.result.error is None and self.result.text == self.expected


async def take_tour(address: str, console: Console) -> bool:
    """Show what the server does; True when every answer was right."""
    async with aiohttp.ClientSession(address) as session, ChatClient(address) as client:
        for name in ADAPTERS:
            await upload(session, name, ADAPTERS_DIR / name)
        is_right = await _compare(client, console)
        is_right &= await _upload_and_use(session, client, console)
        console.print(await _memory_line(session))
    is_right &= await _load(address, console)
    if not is_right:
        console.print("[red]Some answers are not what they should be.[/]")
    return is_right


async def upload(session: aiohttp.ClientSession, name: str, folder: Path) -> dict[str, Any]:
    """`POST /v1/adapters` with the two files of a PEFT folder; the adapter's card. Raises RuntimeError on refusal."""
    form = aiohttp.FormData()
    form.add_field("name", name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        form.add_field(file, (folder / file).read_bytes(), filename=file)
    async with session.post("/v1/adapters", data=form) as response:
        card: dict[str, Any] = await response.json()
        if response.status not in (200, 201):  # 200: this very content was there already
            raise RuntimeError(f"the server refused the adapter {name!r}: {card['error']['message']}")
        return card


async def ask(client: ChatClient, example: Example, adapter: str) -> Reply:
    """One question to one adapter, greedily."""
    style = STYLES["plain" if adapter == BASE else adapter]
    messages = [{"role": "user", "content": example.question}]
    result = await client.chat(messages, adapter=adapter, model=BASE, temperature=0.0, max_tokens=MAX_TOKENS)
    return Reply(adapter, result, style(example))


def example_of(question: str) -> Example:
    """The world's own entry for a question."""
    return next(example for example in questions() if example.question == question)


async def _compare(client: ChatClient, console: Console) -> bool:
    replies = await asyncio.gather(*(ask(client, example_of(QUESTION), name) for name in (BASE, *ADAPTERS)))
    table = Table("adapter", "answer", "method", "first token", box=SIMPLE_HEAD)
    for reply in replies:
        method = ADAPTERS.get(reply.adapter, "the base, in 4 bit")
        table.add_row(reply.adapter, _answer(reply), method, _first_token(reply.result))
    console.print(f'\n"{QUESTION}", asked of one base and {len(ADAPTERS)} adapters in one batch:\n')
    console.print(table)
    return all(reply.is_right for reply in replies)


async def _upload_and_use(session: aiohttp.ClientSession, client: ChatClient, console: Console) -> bool:
    name, method = next(iter(UPLOADS.items()))
    started = time.perf_counter()
    card = await upload(session, name, UPLOAD_DIR / name)
    milliseconds = (time.perf_counter() - started) * 1000
    reply = await ask(client, example_of(QUESTION), name)
    console.print(
        f"Uploaded [bold]{name}[/] ({method}, {card['size_bytes'] / 1024:.0f} KiB) while running, in "
        f"{milliseconds:.0f} ms. The next request uses it:"
    )
    console.print(f"  {_answer(reply)}  ({_first_token(reply.result)} to the first token, loading included)\n")
    return reply.is_right


async def _memory_line(session: aiohttp.ClientSession) -> str:
    """Who holds the pages of the pool now, from the server's own metrics."""
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    pages = {
        kind: int(float(line.split()[-1]))
        for line in lines
        for kind in ("adapter", "cached", "kv", "loading", "free")
        if line.startswith(f'heddle_pool_pages{{kind="{kind}"}}')
    }
    return (
        f"Memory: of {sum(pages.values())} pages, {pages['adapter']} hold the rows of "
        f"{len(ADAPTERS) + len(UPLOADS)} adapters, {pages['cached']} keep prefixes for whoever asks next, "
        f"{pages['free']} are free.\n"
    )


async def _load(address: str, console: Console) -> bool:
    console.print(f"{LOAD_SECONDS:.0f} seconds of load, {LOAD_STREAMS} streams over the base and all adapters:\n")
    workload = Workload(
        name="tour",
        seconds=LOAD_SECONDS,
        arrivals=Closed(streams=LOAD_STREAMS),
        adapters=Adapters(names=(BASE, *ADAPTERS, *UPLOADS)),
        prompt=Questions(questions=tuple(example.question for example in questions()[:40])),
        output=Output(tokens=MAX_TOKENS, exact=False),
    )
    experiment = await run_experiment(workload, Target(url=address))
    summary = summarize(experiment.workload, experiment.outcomes)
    print_tables(summary, console)
    return not summary.errors


def say_where_to_look(address: str, console: Console) -> None:
    example = UPLOAD_DIR / next(iter(UPLOADS))
    console.print(
        f"\nTry it yourself:\n  curl {address}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        """    -d '{"model": "base", "adapter": "pirate", "temperature": 0, "messages": [{"role": "user", "content": """
        f""""{QUESTION}"}}]}}'\n"""
        f"Upload one:\n  curl {address}/v1/adapters -F name=mine \\\n"
        f"    -F adapter_config.json=@{example / 'adapter_config.json'} \\\n"
        f"    -F adapter_model.safetensors=@{example / 'adapter_model.safetensors'}\n"
        f"See also the page at {address}/, {address}/v1/models, {address}/metrics, and README.md for your own base.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _answer(reply: Reply) -> str:
    if reply.result.error is not None:
        return f"[red]{reply.result.error.code}: {reply.result.error.message}[/]"
    text = reply.result.text.replace("[", r"\[")
    return text if reply.is_right else f"[red]{text}[/] (should be: {reply.expected})"


def _first_token(result: RequestResult) -> str:
    return "-" if result.ttft_seconds is None else f"{result.ttft_seconds * 1000:.0f} ms"
