"""`heddle-loadtest sustain`: the highest rate at which a target keeps a service level, by bisection."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
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
    from heddle_loadtest.client.target import Target
    from heddle_loadtest.measure.capacity import Probe
    from heddle_loadtest.run.experiment import RunSettings
    from heddle_loadtest.workload.spec import Workload


_OPTION_NAMES = OPTION_NAMES | {name: f"--{name}" for name in ("low", "high", "share", "within", "seconds")}


def sustain(
    spec: Annotated[str, typer.Argument(help="A workload with rates and an `slo`: a YAML file or a ready-made one.")],
    target: TargetUrl,
    low: Annotated[float, typer.Option(help="Requests per second to begin with; doubled until too many.")] = 1.0,
    high: Annotated[float, typer.Option(help="Requests per second never to go beyond.")] = 1000.0,
    share: Annotated[float, typer.Option(help="Of the requests, that must keep the service level.")] = 0.95,
    within: Annotated[float, typer.Option(help="How close to know it, as a share of the rate.")] = 0.1,
    seconds: Annotated[
        str, typer.Option(help="How long each rate is tried: whole periods, where the rate has any.")
    ] = "20s",
    style: StyleName = Style.HEDDLE,
    model: Model = None,
    api_key: ApiKey = None,
    timeout: Timeout = "10m",
    seed: Annotated[int, typer.Option(help="Of the first rate tried; each has one more than the one before.")] = 0,
    variant: Variant = None,
    overrides: Overrides = None,
    adapter_files: AdapterFiles = None,
    json_only: JsonOnly = False,
) -> None:
    """Try rates until the highest that the server sustains is known.

    All rates of the workload change in proportion. A rate is sustained when enough requests keep the `slo`, failed ones
    counting as broken. Exit codes: 0 found, 1 not even the lowest, 2 bad input, 3 it ended before it was found.
    """
    search = None
    try:
        from heddle_loadtest.client.target import Target

        _check(low, high, share, within)
        search = _Search(
            Target(
                url=target,
                style=style,
                model=model,
                api_key=api_key,
                timeout_seconds=read_duration_seconds("timeout_seconds", timeout),
            ),
            _read_workload(spec, variant, overrides or [], read_duration_seconds("seconds", seconds)),
            _settings(spec, seed, adapter_files),
            is_quiet=json_only,
        )
        asyncio.run(search.run(low, high, within, share))
        is_over = True
    except LoadTestError as error:
        say(error, _OPTION_NAMES)
        is_over = False
    except KeyboardInterrupt:
        is_over = False
    if search is None or not search.probes:
        raise typer.Exit(2)
    rate = _report(search.probes, share, high, is_over=is_over, json_only=json_only)
    raise typer.Exit(3 if not is_over else 1 if rate is None else 0)


def _read_workload(spec: str, variant: str | None, overrides: list[str], seconds: float) -> Workload:
    from msgspec.structs import replace

    from heddle_loadtest.workload.spec_file import load_workload

    workload = load_workload(spec, variant=variant, overrides=overrides)
    if workload.slo is None:
        raise SpecError("slo", None, "is missing: what is there to keep?", "Give --set slo.ttft_seconds=1")
    return replace(workload, seconds=seconds, requests=None)


def _settings(spec: str, seed: int, adapter_files: Path | None) -> RunSettings:
    from heddle_loadtest.run.experiment import RunSettings
    from heddle_loadtest.workload.spec_file import folder_of

    return RunSettings(seed=seed, adapter_files=adapter_files, workload_folder=folder_of(spec))


class _Search:
    """The rates tried so far on one target."""

    def __init__(self, target: Target, workload: Workload, settings: RunSettings, *, is_quiet: bool) -> None:
        self.probes: list[Probe] = []
        self._target = target
        self._workload = workload
        self._settings = settings
        self._is_quiet = is_quiet

    async def run(self, low: float, high: float, within: float, share: float) -> None:
        from heddle_loadtest.measure.capacity import next_rate

        while (rate := next_rate(self.probes, low, high, within, share)) is not None:
            if not self._is_quiet:
                typer.echo(f"trying {rate:.2f} requests/s for {self._workload.seconds:.0f} s ...", err=True)
            self.probes.append(await self._probe(rate))

    async def _probe(self, rate: float) -> Probe:
        """One run at one rate."""
        from heddle_loadtest.measure.capacity import Probe
        from heddle_loadtest.measure.goodput import keeps
        from heddle_loadtest.measure.validity import client_reasons
        from heddle_loadtest.run.experiment import run_experiment
        from heddle_loadtest.workload.scale import at_rate

        settings = replace(self._settings, seed=self._settings.seed + len(self.probes))
        experiment = await run_experiment(at_rate(self._workload, rate), self._target, settings)
        results = [result for outcome in experiment.outcomes for result in outcome.results]
        assert self._workload.slo is not None, "checked before"
        return Probe(
            rate=rate,
            num_kept=sum(keeps(result, self._workload.slo) for result in results),
            num_requests=len(results),
            is_valid=not client_reasons(experiment.outcomes),
        )


def _check(low: float, high: float, share: float, within: float) -> None:
    if not 0 < low <= high:
        raise SpecError("low", low, f"must be above 0 and at most --high, which is {high:g}", "Give a lower rate")
    if not 0 < share <= 1:
        raise SpecError("share", share, "must be above 0 and at most 1", "Give a share, for example 0.95")
    if not 0.01 <= within <= 1:
        raise SpecError("within", within, "must be from 0.01 to 1", "Give a share of the rate, for example 0.1")


def _report(probes: list[Probe], share: float, high: float, *, is_over: bool, json_only: bool) -> float | None:
    """The rate that is sustained, told with what it was found by."""
    from heddle_loadtest.measure.capacity import sustained_rate

    rate = sustained_rate(probes, share)
    if not json_only:
        _print(probes, rate, share, high, is_over=is_over)
    line = {
        "sustained_requests_per_second": rate,
        "is_over": is_over,
        "share": share,
        "probes": [
            {
                "rate": probe.rate,
                "num_requests": probe.num_requests,
                "num_kept": probe.num_kept,
                "share_interval": list(probe.share_interval),
                "is_sustained": probe.is_sustained(share),
                "is_valid": probe.is_valid,
            }
            for probe in probes
        ],
    }
    print(json.dumps(line), flush=True)
    return rate


def _print(probes: list[Probe], rate: float | None, share: float, high: float, *, is_over: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("requests/s", "requests", "kept the level", "95 %", "sustained", box=SIMPLE_HEAD)
    for probe in sorted(probes, key=lambda probe: probe.rate):
        low, up = probe.share_interval
        verdict = "yes" if probe.is_sustained(share) else "no" if probe.is_valid else "no, client late"
        cells = (f"{probe.rate:.2f}", str(probe.num_requests), f"{probe.share:.1%}", f"{low:.1%} to {up:.1%}")
        table.add_row(*cells, verdict)
    console = Console(highlight=False)
    console.print(table)
    console.print("not even the lowest rate is sustained" if rate is None else f"sustained: {rate:.2f} requests/s")
    if rate is not None and rate >= high:
        console.print(f"{high:g} was the highest rate allowed (--high): more may be possible")
    if any(not probe.is_valid and not probe.is_sustained(share) for probe in probes):
        console.print("where the client was late, the server may do more than is shown", style="yellow")
    if not is_over:
        console.print("the search ended before its end: more may be possible", style="yellow")
