"""Several workloads on several servers, in turn, each into a result folder of its own.

Every round runs each of them once, every other round backwards: what drifts hits all alike. Round r draws its requests
with seed r for all, so that every server gets the same requests and none finds an earlier round's in its prefix cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heddle_demo.bench.failure import BenchFailed
from heddle_loadtest.client.style import Style
from heddle_loadtest.client.target import CheckedTarget, Target
from heddle_loadtest.measure.summary import Summary, summarize
from heddle_loadtest.report.environment import describe_environment
from heddle_loadtest.report.folder import ResultFolder
from heddle_loadtest.run.experiment import RunSettings, run_experiment
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.schedule import Schedule
from heddle_loadtest.workload.spec import Workload

NUM_ROUNDS = 3  # fewer make no figure that may be published

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One workload on one server."""

    workload: Workload
    address: str
    path: Path  # of its result folder, below the others'

    @property
    def name(self) -> str:
        return "/".join(self.path.parts[-2:])


async def measure_in_turn(cells: Sequence[Cell], num_rounds: int, say: Say) -> list[Summary]:
    """The summaries of the cells, in their order. Raises BenchFailed if any request of any of them failed."""
    runs = [_Run(cell) for cell in cells]
    for number in range(num_rounds):
        for run in runs if number % 2 == 0 else reversed(runs):
            say(f"round {number + 1} of {num_rounds}: {run.cell.name}")
            await run.measure(number)
    return [run.finish() for run in runs]


class _Run:
    """A cell's rounds, as the repeats of one run."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self._folder = ResultFolder.create(cell.path, force=True)
        self._outcomes: list[Outcome] = []

    async def measure(self, number: int) -> None:
        repeat = _Repeat(self._folder, number)
        target = Target(url=self.cell.address, style=Style.HEDDLE)
        experiment = await run_experiment(
            self.cell.workload, target, RunSettings(seed=number), repeat, on_checked=self._describe
        )
        self._outcomes.extend(experiment.outcomes)

    def finish(self) -> Summary:
        summary = summarize(self.cell.workload, self._outcomes)
        self._folder.write_summary(summary)
        if summary.total.num_ok == 0:
            raise BenchFailed(f"{self.cell.name}: not one request was answered: {summary.error_examples}")
        return summary

    def _describe(self, workload: Workload, checked: CheckedTarget) -> None:
        environment = describe_environment(
            target=self.cell.name,  # the address is another each time
            style=Style.HEDDLE,
            model=checked.model,
            arguments=sys.argv,
            listed=checked.adapters,
        )
        self._folder.write_environment(environment)


class _Repeat:
    """A round's place in a result folder: what a run of one repeat calls its first."""

    def __init__(self, folder: ResultFolder, number: int) -> None:
        self._folder = folder
        self._number = number

    def write_workload(self, workload: Workload) -> None:
        self._folder.write_workload(workload)

    def write_schedule(self, repeat: int, schedule: Schedule, style: Style, model: str | None) -> None:
        self._folder.write_schedule(self._number + repeat, schedule, style, model)

    def write_outcome(self, repeat: int, outcome: Outcome, *, keep_text: bool) -> None:
        self._folder.write_outcome(self._number + repeat, outcome, keep_text=keep_text)
