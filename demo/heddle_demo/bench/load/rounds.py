"""Several workloads on several servers, in turn, each into a result folder of its own.

Every round runs each of them once, every other round backwards: what drifts hits all alike. Seeds differ by round and
workload, and are the same for all servers: all get the same requests, and no prefix cache knows any of them.
"""

from __future__ import annotations

import sys
from collections import Counter
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
MAX_ROUNDS = 1000

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
    """The summaries of the cells, in their order. Raises BenchFailed as soon as one gets no answer at all."""
    runs = [_Run(cell, first_seed) for cell, first_seed in zip(cells, _first_seeds(cells), strict=True)]
    for number in range(num_rounds):
        for run in runs if number % 2 == 0 else reversed(runs):
            say(f"round {number + 1} of {num_rounds}: {run.cell.name}")
            await run.measure(number)
    return [run.finish() for run in runs]


def _first_seeds(cells: Sequence[Cell]) -> list[int]:
    """By the cell's place among those on its server."""
    places = Counter[str]()
    seeds = []
    for cell in cells:
        seeds.append(places[cell.address] * MAX_ROUNDS)
        places[cell.address] += 1
    return seeds


class _Run:
    """A cell's rounds, as the repeats of one run."""

    def __init__(self, cell: Cell, first_seed: int) -> None:
        self.cell = cell
        self._first_seed = first_seed
        self._folder = ResultFolder.create(cell.path, force=True)
        self._outcomes: list[Outcome] = []

    async def measure(self, number: int) -> None:
        repeat = _Repeat(self._folder, number)
        target = Target(url=self.cell.address, style=Style.HEDDLE)
        experiment = await run_experiment(
            self.cell.workload, target, RunSettings(seed=self._first_seed + number), repeat, on_checked=self._describe
        )
        self._outcomes.extend(experiment.outcomes)
        errors = [result.error for outcome in experiment.outcomes for result in outcome.results]
        if all(errors):
            raise BenchFailed(f"{self.cell.name}: not one request was answered: {errors[0]}")

    def finish(self) -> Summary:
        summary = summarize(self.cell.workload, self._outcomes)
        self._folder.write_summary(summary)
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
