"""`heddle-loadtest`: options to a spec, a run, a report. Holds no logic of its own.

What needs aiohttp or rich is imported when a run starts, so that `--help` answers at once.
Exit codes: 0 done, 1 not one request succeeded, 2 the run could not start.
"""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from heddle_loadtest.duration import parse_duration_seconds
from heddle_loadtest.errors import LoadTestError, SpecError
from heddle_loadtest.spec import ClosedLoopSpec
from heddle_loadtest.style import BASE, AdapterStyle
from heddle_loadtest.workload import BUILTIN_PROMPTS, read_prompts

if TYPE_CHECKING:
    from heddle_loadtest.summary import Summary

_DEFAULT_DURATION_SECONDS = 10.0
_OPTION_NAMES = {  # field of a LoadTestError -> option, where it is not simply --field
    "num_streams": "--streams",
    "duration_seconds": "--duration",
    "num_requests": "--requests",
    "max_tokens": "--max-tokens",
    "prompts": "--prompt",
    "prompts_file": "--prompts-file",
    "num_warmup_requests": "--warmup",
    "timeout_seconds": "--timeout",
    "api_key": "--api-key",
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Put load on any OpenAI-compatible server and see what its users would feel."""


@app.command()
def run(
    target: Annotated[str, typer.Option(help="Base URL of the server, for example http://127.0.0.1:8000.")],
    streams: Annotated[int, typer.Option(help="Requests in flight at any time.")] = 8,
    duration: Annotated[
        str | None, typer.Option(help="How long, as 500ms, 5s, 2m or 1h; 10s unless --requests is given.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="How many requests, instead of or besides --duration.")] = None,
    adapters: Annotated[
        str, typer.Option(help="Adapters to ask in turn, with commas between; `all` for all the target lists.")
    ] = BASE,
    style: Annotated[
        AdapterStyle, typer.Option(help="heddle: an `adapter` field; openai: the adapter's name as `model`.")
    ] = AdapterStyle.HEDDLE,
    model: Annotated[str | None, typer.Option(help="The base model; the first the target lists if not given.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to ask; may be repeated.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed asks the same questions.")] = 0,
    warmup: Annotated[int, typer.Option(help="Requests to each adapter before measuring.")] = 1,
    timeout: Annotated[str, typer.Option(help="Time for one request, from start to end.")] = "10m",
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.", envvar="HEDDLE_API_KEY")] = None,
    json_only: Annotated[bool, typer.Option("--json-only", help="Print the JSON line alone.")] = False,
) -> None:
    """Closed loop: each stream sends a request, waits for the whole answer, sends the next.

    Prints tables and then one JSON line, the last on standard output. Ctrl-C stops early and still reports.
    """
    try:
        duration_seconds = None if duration is None else _parse_duration("duration_seconds", duration)
        if duration_seconds is None and requests is None:
            duration_seconds = _DEFAULT_DURATION_SECONDS
        spec = ClosedLoopSpec(
            target=target,
            num_streams=streams,
            duration_seconds=duration_seconds,
            num_requests=requests,
            adapters=tuple(name.strip() for name in adapters.split(",")),
            style=style,
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            prompts=_choose_prompts(prompt, prompts_file),
            seed=seed,
            num_warmup_requests=warmup,
            timeout_seconds=_parse_duration("timeout_seconds", timeout),
            api_key=api_key,
        )
        summary = asyncio.run(_run(spec, json_only=json_only))
    except LoadTestError as error:
        typer.echo(f"error: {error.describe(_OPTION_NAMES.get(error.field, f'--{error.field}'))}", err=True)
        raise typer.Exit(2) from None
    _report(summary, json_only=json_only)
    raise typer.Exit(0 if summary.total.num_ok else 1)


async def _run(spec: ClosedLoopSpec, *, json_only: bool) -> "Summary":
    from heddle_loadtest.progress import RunProgress
    from heddle_loadtest.runner import run_closed_loop

    stop = asyncio.Event()
    with _stop_on_interrupt(stop), RunProgress(spec, is_hidden=json_only) as progress:
        return await run_closed_loop(spec, on_start=progress.start, on_result=progress.count, stop=stop)


@contextmanager
def _stop_on_interrupt(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`; a second one interrupts at once."""
    loop = asyncio.get_running_loop()

    def request_stop(signal_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        loop.call_soon_threadsafe(stop.set)

    previous_handler = signal.signal(signal.SIGINT, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def _report(summary: "Summary", *, json_only: bool) -> None:
    from heddle_loadtest.report import print_summary

    print_summary(summary, json_only=json_only)


def _parse_duration(field: str, text: str) -> float:
    try:
        return parse_duration_seconds(text)
    except ValueError:
        raise SpecError(field, text, "is no duration", "Write it as 500ms, 5s, 2m or 1h") from None


def _choose_prompts(prompts: list[str] | None, prompts_file: Path | None) -> tuple[str, ...]:
    if prompts and prompts_file:
        raise SpecError("prompts_file", prompts_file, "comes on top of --prompt", "Give one of the two")
    if prompts_file is not None:
        return read_prompts(prompts_file)
    return tuple(prompts) if prompts else BUILTIN_PROMPTS


def main() -> None:
    """The `heddle-loadtest` command."""
    app()
