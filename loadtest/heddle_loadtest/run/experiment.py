"""Runs a workload on a target, repeat by repeat: draws, checks, warms up, measures, writes down.

Knows no terminal, no signals and no statistics.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from heddle_loadtest.client.chat_client import ChatClient
from heddle_loadtest.client.target import CheckedTarget, Target, check_api_key, check_target
from heddle_loadtest.errors import SpecError, TargetError
from heddle_loadtest.run.adapter_supply import AdapterSupply
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.run.runner import OnResult, OnStart, run_schedule, run_until
from heddle_loadtest.run.warm_up import warm_up
from heddle_loadtest.workload.draw import cold_adapters, draw_schedule, with_listed
from heddle_loadtest.workload.schedule import Schedule
from heddle_loadtest.workload.spec import Workload

if TYPE_CHECKING:
    from heddle_loadtest.client.style import Style


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run is told beside workload and target."""

    seed: int = 0  # of the first repeat; each has one more than the one before
    num_repeats: int = 1
    adapter_files: Path | None = None  # a folder in PEFT's form for each adapter that may be uploaded
    keep_text: bool = False  # whether results hold the answers' texts
    workload_folder: Path = Path()  # what the workload's trace files are relative to

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SpecError("seed", self.seed, "must be 0 or more", "Give a number from 0 up")
        if self.num_repeats < 1:
            raise SpecError("repeats", self.num_repeats, "must be 1 or more", "Give a number from 1 up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What a run came to."""

    workload: Workload  # with the listed adapters spelt out
    target: CheckedTarget
    outcomes: tuple[Outcome, ...]  # one a repeat; fewer than asked for if the run was stopped


class Store(Protocol):
    """Where a run is written down: `report.folder.ResultFolder`, which this module need not know."""

    def write_workload(self, workload: Workload) -> None: ...

    def write_schedule(self, repeat: int, schedule: Schedule, style: Style, model: str | None) -> None: ...

    def write_outcome(self, repeat: int, outcome: Outcome, *, keep_text: bool) -> None: ...


async def run_experiment(
    workload: Workload,
    target: Target,
    settings: RunSettings | None = None,
    folder: Store | None = None,
    *,
    on_checked: Callable[[Workload, CheckedTarget], None] | None = None,
    on_repeat: Callable[[int], None] | None = None,
    on_start: OnStart | None = None,
    on_result: OnResult | None = None,
    stop: asyncio.Event | None = None,
) -> Experiment:
    """Runs `workload` as often as the settings say, one repeat after the other.

    `on_checked` is called once, before the first request; `on_repeat` before each repeat's warm-up; `on_start` when
    measuring begins; `on_result` for each measured result. With `stop` set the run ends early, and no repeat follows.
    Raises SpecError or TargetError before the first request if the target lacks anything that the workload asks for.
    """
    settings, stop = settings or RunSettings(), stop or asyncio.Event()
    supply = AdapterSupply(settings.adapter_files, target.style)
    tenant_keys = read_tenant_keys(workload)
    outcomes: list[Outcome] = []
    async with ChatClient(target) as client:
        workload = await _spell_out(workload, client)
        schedules = [
            draw_schedule(workload, settings.seed + repeat, folder=settings.workload_folder)
            for repeat in range(settings.num_repeats)
        ]
        checked = await _check(client, schedules, supply)
        if on_checked is not None:
            on_checked(workload, checked)
        if folder is not None:
            folder.write_workload(workload)
            for repeat, schedule in enumerate(schedules):
                folder.write_schedule(repeat, schedule, target.style, checked.model)
        await run_until(stop, supply.upload(client, checked.missing))
    target = dataclasses.replace(target, model=checked.model)
    for repeat, schedule in enumerate(schedules):
        if stop.is_set() and outcomes:
            break
        if on_repeat is not None:
            on_repeat(repeat)
        async with ChatClient(target) as client:
            await run_until(stop, warm_up(client, schedule, workload.warmup, cold_adapters(workload), tenant_keys))
        outcome = await run_schedule(
            schedule,
            target,
            seed=settings.seed + repeat,
            tenant_keys=tenant_keys,
            adapter_files=supply.path,
            keep_text=settings.keep_text,
            begins_again=workload.requests is None,
            on_start=on_start,
            on_result=on_result,
            stop=stop,
        )
        outcomes.append(outcome)
        async with ChatClient(target) as client:
            await _take_away(client, outcome)
        if folder is not None:
            folder.write_outcome(repeat, outcome, keep_text=settings.keep_text)
    return Experiment(workload=workload, target=checked, outcomes=tuple(outcomes))


def read_tenant_keys(workload: Workload) -> Mapping[str, str]:
    """The API keys of tenants that have their own. Raises SpecError if a variable that should hold one is not set."""
    keys = {}
    for name, tenant in workload.tenants.items():
        if tenant.api_key_env is not None:
            key = os.environ.get(tenant.api_key_env)
            if not key:
                problem = "is not set in the environment"
                raise SpecError(f"tenants.{name}.api_key_env", tenant.api_key_env, problem, "Export the tenant's key")
            check_api_key(f"tenants.{name}.api_key_env", key)
            keys[name] = key
    return keys


async def _spell_out(workload: Workload, client: ChatClient) -> Workload:
    all_adapters = (workload.adapters, *(tenant.adapters for tenant in workload.tenants.values()))
    if not any(adapters is not None and adapters.listed for adapters in all_adapters):
        return workload
    if not client.target.style.lists_adapters:
        problem = f"cannot be had from a {client.target.style} server, which does not list its adapters"
        raise SpecError("adapters.listed", None, problem, "Name the adapters")
    return with_listed(workload, (await check_target(client, ())).adapters)


async def _check(client: ChatClient, schedules: Sequence[Schedule], supply: AdapterSupply) -> CheckedTarget:
    uploads = {upload.adapter for schedule in schedules for upload in schedule.uploads}
    supply.check_uploads(uploads)
    await _check_not_there(client, uploads)
    asked_for = dict.fromkeys(adapter for schedule in schedules for adapter in schedule.adapters)
    style = client.target.style
    if not style.takes_token_ids and any(not isinstance(request.prompt, str) for request in schedules[0].requests):
        raise SpecError("prompt", None, f"is of token ids, which {style} does not take", "Use `kind: words`")
    return await check_target(client, [name for name in asked_for if name not in uploads], supply.names)


async def _check_not_there(client: ChatClient, uploads: Collection[str]) -> None:
    there = sorted(set(uploads) & set(await client.list_models())) if uploads else []
    if there:
        problem = "is on the target already, and the workload uploads it while it runs"
        raise TargetError("uploads", there[0], problem, "Delete it there, or give `adapters.name` another pattern")


async def _take_away(client: ChatClient, outcome: Outcome) -> None:
    """What was uploaded on the way, so that the next run finds the target as this one did."""
    for upload in outcome.uploads:
        if upload.error is None:
            await client.pages.delete(upload.adapter)
