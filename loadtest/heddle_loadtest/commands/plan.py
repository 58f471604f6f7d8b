"""`heddle-loadtest plan`: a workload and a seed to the files of its schedule, without a target. Holds no logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heddle_loadtest.client.style import Style
from heddle_loadtest.errors import LoadTestError, SpecError

if TYPE_CHECKING:
    from heddle_loadtest.workload.schedule import Schedule, ScheduledRequest

_OPTION_NAMES = {"seed": "--seed", "variant": "--variant", "set": "--set", "out": "--out", "style": "--style"}


def plan(
    spec: Annotated[str, typer.Argument(help="A YAML file, or a ready-made workload (see `specs`).")],
    out: Annotated[Path, typer.Option(help="Folder for schedule.jsonl and aiperf.jsonl; made if it is not there.")],
    seed: Annotated[int, typer.Option(help="The same seed makes the same schedule.")] = 0,
    variant: Annotated[str | None, typer.Option(help="One of the workload's variants.")] = None,
    set: Annotated[list[str] | None, typer.Option(help="A key and its value, as arrivals.rate=8; repeatable.")] = None,
    style: Annotated[Style, typer.Option(help="How aiperf.jsonl names adapters: the target's kind.")] = Style.HEDDLE,
    model: Annotated[str | None, typer.Option(help="The base model's name at the target, for aiperf.jsonl.")] = None,
) -> None:
    """Write down what a workload would ask, of whom, when: for reading, and for other tools to replay.

    The last line of standard output is a JSON object.
    """
    from heddle_loadtest.workload.draw import draw_schedule
    from heddle_loadtest.workload.spec_file import folder_of, load_workload

    try:
        workload = load_workload(spec, variant=variant, overrides=set or ())
        schedule = draw_schedule(workload, seed, folder=folder_of(spec))
        for name in schedule.adapters:  # so that nothing is written for names that the style cannot write
            style.adapter_fields(name, model)
        _write(schedule, style, model, out)
    except LoadTestError as error:
        typer.echo(f"error: {error.describe(_OPTION_NAMES.get(error.field, error.field))}", err=True)
        raise typer.Exit(2) from None
    _print(workload.name, schedule)
    typer.echo(json.dumps({"workload": workload.name, "seed": seed, "out": str(out)} | _figures(schedule.requests)))


def _write(schedule: Schedule, style: Style, model: str | None, folder: Path) -> None:
    from heddle_loadtest.client.aiperf import write_aiperf_trace
    from heddle_loadtest.workload.schedule import write_schedule

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_schedule(schedule, folder / "schedule.jsonl")
        write_aiperf_trace(schedule, style, model, folder / "aiperf.jsonl")
    except OSError as error:
        raise SpecError("out", folder, error.strerror or "cannot be written", "Name another folder") from error


def _print(name: str, schedule: Schedule) -> None:
    from rich.console import Console
    from rich.table import Table

    groups = {"all": schedule.requests}
    tenants = dict.fromkeys(request.tenant for request in schedule.requests)
    if len(tenants) > 1:
        groups |= {tenant: tuple(one for one in schedule.requests if one.tenant == tenant) for tenant in tenants}
    figures = {group: _figures(requests) for group, requests in groups.items()}
    columns = (column.removeprefix("requests_").replace("_", " ") for column in figures["all"])
    table = Table("", *columns, title=name, title_justify="left")
    for group, row in figures.items():
        table.add_row(group, *("-" if value is None else f"{value:,}" for value in row.values()))
    Console().print(table)


def _figures(requests: tuple[ScheduledRequest, ...]) -> dict[str, Any]:
    """Prompt tokens are None where nobody counted, times where streams ask in a closed loop."""
    prompt_tokens = [request.num_prompt_tokens for request in requests]
    times = [request.at_seconds for request in requests if request.at_seconds is not None]
    span_seconds = max(times) - min(times) if times else 0.0
    return {
        "requests": len(requests),
        "adapters": len({request.adapter for request in requests}),
        "tenants": len({request.tenant for request in requests}),
        "prompt_tokens": None if None in prompt_tokens else sum(filter(None, prompt_tokens)),
        "output_tokens": sum(request.max_tokens for request in requests),
        "seconds": round(max(times), 3) if times else None,
        "requests_per_second": round((len(times) - 1) / span_seconds, 3) if span_seconds > 0 else None,
    }
