"""`heddle-loadtest run`: options to a workload and a target, a run, a report. Holds no logic of its own.

What needs aiohttp, numpy or rich is imported when a run starts, so that `--help` answers at once.
Exit codes: 0 done, 1 not one request succeeded, 2 the run could not start, 3 the client was the bottleneck.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from heddle_loadtest.client.style import Style
from heddle_loadtest.commands.options import (
    OPTION_NAMES,
    AdapterFiles,
    ApiKey,
    JsonOnly,
    Model,
    Overrides,
    StyleName,
    TargetUrl,
    Timeout,
    Variant,
    say,
)
from heddle_loadtest.duration import read_duration_seconds
from heddle_loadtest.errors import LoadTestError, SpecError

if TYPE_CHECKING:
    from heddle_loadtest.client.target import CheckedTarget, Target
    from heddle_loadtest.commands.quick_form import QuickForm
    from heddle_loadtest.measure.summary import Summary
    from heddle_loadtest.report.folder import ResultFolder
    from heddle_loadtest.run.experiment import Experiment, RunSettings
    from heddle_loadtest.workload.spec import Workload

_OPTION_NAMES = OPTION_NAMES | {"repeats": "--repeats", "out": "--out"}
_QUICK_OPTION_NAMES = {
    "streams": "--streams",
    "rate": "--rate",
    "duration_seconds": "--duration",
    "seconds": "--duration",
    "requests": "--requests",
    "adapters": "--adapters",
    "adapters.names": "--adapters",
    "adapters.listed": "--adapters",
    "max_tokens": "--max-tokens",
    "temperature": "--temperature",
    "prompts": "--prompt",
    "prompts_file": "--prompts-file",
    "questions": "--prompts-file",
    "warmup": "--warmup",
}


def run(
    target: TargetUrl,
    spec: Annotated[
        str | None, typer.Argument(help="A workload: a YAML file, or the name of a ready-made one.", metavar="SPEC")
    ] = None,
    style: StyleName = Style.HEDDLE,
    model: Model = None,
    api_key: ApiKey = None,
    timeout: Timeout = "10m",
    seed: Annotated[int, typer.Option(help="The same seed asks the same; each repeat has one more.")] = 0,
    repeats: Annotated[int, typer.Option(help="How often, one after the other; a published figure takes 3.")] = 1,
    variant: Variant = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Result folder: schedule, raw results, report.html.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that is in --out.")] = False,
    adapter_files: AdapterFiles = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Write the answers' texts down too.")] = False,
    json_only: JsonOnly = False,
    streams: Annotated[int | None, typer.Option(help="Requests under way at any time: a closed loop; 8.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second, by chance: an open loop.")] = None,
    duration: Annotated[
        str | None,
        typer.Option(help="How long, as 500ms, 5s, 2m or 1h; 10s without --requests."),
    ] = None,
    requests: Annotated[int | None, typer.Option(help="How many requests at most.")] = None,
    adapters: Annotated[
        str | None,
        typer.Option(help="Asked in turn, with commas between; `all` for all the target lists; `base`."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of each answer, at most; 64.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0 is greedy.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to ask; may be repeated.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Requests to each adapter before measuring; 1.")] = None,
) -> None:
    """Put a workload on a server: a SPEC, or the quick form, whose options begin with --streams.

    Prints tables and then one JSON line, the last on standard output. Ctrl-C stops early and still reports; a second
    one ends at once. Exit codes: 0 done, 1 not one request succeeded, 2 the run could not start, 3 the figures are
    invalid because the client could not keep up.
    """
    try:
        from heddle_loadtest.client.target import Target
        from heddle_loadtest.commands.quick_form import QuickForm
        from heddle_loadtest.run.experiment import RunSettings

        whom = Target(
            url=target,
            style=style,
            model=model,
            api_key=api_key,
            timeout_seconds=read_duration_seconds("timeout_seconds", timeout),
        )
        quick = QuickForm(
            streams=streams,
            rate=rate,
            duration_seconds=None if duration is None else read_duration_seconds("duration_seconds", duration),
            requests=requests,
            adapters=adapters,
            max_tokens=max_tokens,
            temperature=temperature,
            prompts=tuple(prompt) if prompt else None,
            prompts_file=prompts_file,
            warmup=warmup,
        )
        workload = _read_workload(spec, variant, overrides or [], quick)
        settings = RunSettings(
            seed=seed,
            num_repeats=repeats,
            adapter_files=adapter_files,
            keep_text=keep_text,
            workload_folder=_folder_of(spec),
        )
        summary = _run_and_report(workload, whom, settings, out, force=force, json_only=json_only)
    except LoadTestError as error:
        say(error, _OPTION_NAMES if spec else _OPTION_NAMES | _QUICK_OPTION_NAMES)
        raise typer.Exit(2) from None
    raise typer.Exit(_exit_code(summary))


def _read_workload(spec: str | None, variant: str | None, overrides: list[str], quick: QuickForm) -> Workload:
    if spec is None:
        if variant is not None:
            raise SpecError("variant", variant, "is of a workload, and none is given", "Name the workload too")
        if overrides:
            raise SpecError("set", overrides[0], "changes a workload, and none is given", "Name the workload too")
        return quick.to_workload()
    from heddle_loadtest.workload.spec_file import load_workload

    quick.check_left_out(spec)
    return load_workload(spec, variant=variant, overrides=overrides)


def _folder_of(spec: str | None) -> Path:
    if spec is None:
        return Path()
    from heddle_loadtest.workload.spec_file import folder_of

    return folder_of(spec)


def _run_and_report(
    workload: Workload, target: Target, settings: RunSettings, out: Path | None, *, force: bool, json_only: bool
) -> Summary:
    from heddle_loadtest.measure.summary import summarize
    from heddle_loadtest.report.folder import ResultFolder
    from heddle_loadtest.report.tables import print_summary

    folder = None if out is None else ResultFolder.create(out, force=force)
    done = asyncio.run(_run(workload, target, settings, folder, is_quiet=json_only))
    summary = summarize(done.workload, done.outcomes)
    if folder is not None:
        folder.write_summary(summary)
        _write_report(folder.path)
    print_summary(summary, json_only=json_only)
    return summary


async def _run(
    workload: Workload, target: Target, settings: RunSettings, folder: ResultFolder | None, *, is_quiet: bool
) -> Experiment:
    from heddle_loadtest.report.environment import describe_environment
    from heddle_loadtest.run.experiment import run_experiment
    from heddle_loadtest.run.progress import RunProgress

    def note(_: Workload, checked: CheckedTarget) -> None:
        for warning in checked.warnings:
            typer.echo(f"warning: {warning}", err=True)
        if folder is not None:
            folder.write_environment(
                describe_environment(
                    target=target.url,
                    style=target.style,
                    model=checked.model,
                    arguments=sys.argv,
                    listed=checked.adapters,
                )
            )

    stop = asyncio.Event()
    with (
        RunProgress(target.url, settings.num_repeats, is_hidden=is_quiet) as progress,
        _stop_on_interrupt(stop, progress.stop),
    ):
        return await run_experiment(
            workload,
            target,
            settings,
            folder,
            on_checked=note,
            on_repeat=progress.warm_up,
            on_start=progress.start,
            on_result=progress.count,
            stop=stop,
        )


def _write_report(path: Path) -> None:
    """What is measured is safe by now: that the page cannot be made ends nothing."""
    from heddle_loadtest.report.write import write_report

    try:
        write_report(path)
    except (LoadTestError, OSError) as error:
        typer.echo(f"warning: the page is not made: {error}. Try `heddle-loadtest report {path}`", err=True)


def _exit_code(summary: Summary) -> int:
    if not summary.total.num_ok:
        return 1
    return 0 if summary.is_valid else 3


@contextmanager
def _stop_on_interrupt(stop: asyncio.Event, tidy_up: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C sets `stop`; a second one ends the process at once."""
    loop = asyncio.get_running_loop()

    def end(signal_number: int, frame: FrameType | None) -> None:
        tidy_up()
        os._exit(128 + signal_number)  # an exception would be shown as one by whichever task it hits

    def request_stop(signal_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, end)
        loop.call_soon_threadsafe(stop.set)

    previous_handler = signal.signal(signal.SIGINT, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
