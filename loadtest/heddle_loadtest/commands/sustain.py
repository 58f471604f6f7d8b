"""`heddle-loadtest sustain`: the highest rate at which a target keeps a service level, by bisection."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heddle_loadtest.client.style import Style
from heddle_loadtest.duration import read_duration_seconds
from heddle_loadtest.errors import LoadTestError, SpecError

if TYPE_CHECKING:
    from heddle_loadtest.client.target import Target
    from heddle_loadtest.measure.capacity import Probe
    from heddle_loadtest.workload.spec import Workload


def sustain(
    spec: Annotated[str, typer.Argument(help="A workload with rates and an `slo`: a YAML file or a ready-made one.")],
    target: Annotated[str, typer.Option(help="Base URL of the server, for example http://127.0.0.1:8000.")],
    low: Annotated[float, typer.Option(help="Requests per second to begin with; doubled until too many.")] = 1.0,
    high: Annotated[float, typer.Option(help="Requests per second never to go beyond.")] = 1000.0,
    share: Annotated[float, typer.Option(help="Of the requests, that must keep the service level.")] = 0.95,
    within: Annotated[float, typer.Option(help="How close to know it, as a share of the rate.")] = 0.1,
    seconds: Annotated[str, typer.Option(help="How long each rate is tried.")] = "20s",
    style: Annotated[Style, typer.Option(help="How the server wants its adapters named.")] = Style.HEDDLE,
    model: Annotated[str | None, typer.Option(help="The base model; the first the target lists if not given.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.", envvar="HEDDLE_API_KEY")] = None,
    seed: Annotated[int, typer.Option(help="Of the first rate tried; each has one more than the one before.")] = 0,
    variant: Annotated[str | None, typer.Option(help="A variant that the workload names.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A key of the workload, as slo.ttft_seconds=1; may be repeated.")
    ] = None,
    json_only: Annotated[bool, typer.Option("--json-only", help="Print the JSON line alone.")] = False,
) -> None:
    """Try rates until the highest that the server sustains is known.

    All rates of the workload change in proportion. A rate is sustained when enough requests keep the `slo`, failed ones
    counting as broken. Exit codes: 0 found, 1 not even the lowest, 2 bad input.
    """
    try:
        from heddle_loadtest.client.target import Target
        from heddle_loadtest.measure.capacity import sustained_rate
        from heddle_loadtest.workload.spec_file import folder_of, load_workload

        _check(low, high, share, within)
        workload = load_workload(spec, variant=variant, overrides=overrides or [])
        if workload.slo is None:
            raise SpecError("slo", None, "is missing: what is there to keep?", "Give --set slo.ttft_seconds=1")
        whom = Target(url=target, style=style, model=model, api_key=api_key)
        search = _Search(whom, workload, folder_of(spec), read_duration_seconds("seconds", seconds), seed, json_only)
        probes = asyncio.run(search.run(low, high, within, share))
    except LoadTestError as error:
        typer.echo(f"error: {error.describe(error.field)}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    rate = sustained_rate(probes, share)
    _print(probes, rate, share, high, json_only=json_only)
    raise typer.Exit(1 if rate is None else 0)


class _Search:
    """The rates tried so far on one target."""

    def __init__(
        self, target: Target, workload: Workload, folder: Path, seconds: float, seed: int, is_quiet: bool
    ) -> None:
        self._target = target
        self._workload = workload
        self._folder = folder
        self._seconds = seconds
        self._seed = seed
        self._is_quiet = is_quiet

    async def run(self, low: float, high: float, within: float, share: float) -> list[Probe]:
        from heddle_loadtest.measure.capacity import next_rate

        probes: list[Probe] = []
        while (rate := next_rate(probes, low, high, within, share)) is not None:
            if not self._is_quiet:
                typer.echo(f"trying {rate:.2f} requests/s for {self._seconds:.0f} s ...", err=True)
            probes.append(await self._probe(rate, self._seed + len(probes)))
        return probes

    async def _probe(self, rate: float, seed: int) -> Probe:
        """One run at one rate. A longer list than the server can answer is part of what is measured."""
        from msgspec.structs import replace

        from heddle_loadtest.measure.capacity import Probe
        from heddle_loadtest.measure.summary import summarize
        from heddle_loadtest.run.experiment import RunSettings, run_experiment
        from heddle_loadtest.workload.scale import at_rate

        workload = replace(at_rate(self._workload, rate), seconds=self._seconds, requests=None)
        settings = RunSettings(seed=seed, workload_folder=self._folder)
        experiment = await run_experiment(workload, self._target, settings)
        summary = summarize(experiment.workload, experiment.outcomes)
        goodput = summary.total.goodput
        return Probe(
            rate=rate,
            num_kept=goodput.num_kept if goodput else 0,
            num_requests=goodput.num_requests if goodput else 0,
            is_valid=summary.is_valid,
        )


def _check(low: float, high: float, share: float, within: float) -> None:
    if not 0 < low <= high:
        raise SpecError("low", low, f"must be above 0 and at most --high, which is {high:g}", "Give a lower rate")
    if not 0 < share <= 1:
        raise SpecError("share", share, "must be above 0 and at most 1", "Give a share, for example 0.95")
    if not 0.01 <= within <= 1:
        raise SpecError("within", within, "must be from 0.01 to 1", "Give a share of the rate, for example 0.1")


def _print(probes: list[Probe], rate: float | None, share: float, high: float, *, json_only: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    if not json_only:
        table = Table("requests/s", "requests", "kept the level", "95 %", "sustained", box=SIMPLE_HEAD)
        for probe in sorted(probes, key=lambda probe: probe.rate):
            low, up = probe.share_interval
            verdict = "yes" if probe.is_sustained(share) else "no" if probe.is_valid else "no, client late"
            cells = (f"{probe.rate:.2f}", str(probe.num_requests), f"{probe.share:.1%}", f"{low:.1%} to {up:.1%}")
            table.add_row(*cells, verdict)
        console = Console()
        console.print(table)
        console.print("not even the lowest rate is sustained" if rate is None else f"sustained: {rate:.2f} requests/s")
        if rate is not None and rate >= high:
            console.print(f"{high:g} was the highest rate allowed (--high): more may be possible")
    line = {
        "sustained_requests_per_second": rate,
        "share": share,
        "probes": [
            {
                "rate": probe.rate,
                "num_requests": probe.num_requests,
                "num_kept": probe.num_kept,
                "share_interval": list(probe.share_interval),
                "is_valid": probe.is_valid,
            }
            for probe in probes
        ],
    }
    print(json.dumps(line), flush=True)
