"""The result folder of a run: which file is called what, in which order they come, how they are read back.

OUT/
  workload.yaml      the workload as run
  environment.json   where and how it ran
  repeat-0/
    schedule.jsonl   what will be asked, written before the first request
    aiperf.jsonl     the same for aiperf (`--custom-dataset-type mooncake_trace`)
    requests.jsonl   what each request came to
    metrics.jsonl    the target's /metrics through the run
    outcome.json     the rest of the repeat
  summary.json       written last: a folder that has it is whole
  report.html, *.png made from the others, and again with `heddle-loadtest report`
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heddle_loadtest.errors import SpecError
from heddle_loadtest.report.plots import PLOTS
from heddle_loadtest.report.raw_files import (
    OutcomeHead,
    head_of,
    read_bytes,
    read_json,
    read_requests,
    read_scrapes,
    write_json,
    write_requests,
    write_scrapes,
    write_text,
)
from heddle_loadtest.report.stored_run import StoredRun
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.schedule import Schedule, write_schedule
from heddle_loadtest.workload.spec import Workload

if TYPE_CHECKING:
    from heddle_loadtest.client.style import Style
    from heddle_loadtest.measure.summary import Summary

PAGE = "report.html"
_SUMMARY, _WORKLOAD, _ENVIRONMENT = "summary.json", "workload.yaml", "environment.json"
_REPEATS = "repeat-*"


class ResultFolder:
    """A folder that a run's files go to."""

    def __init__(self, path: Path, *, holds_old_run: bool = False) -> None:
        """`path` exists; `create` makes it."""
        self.path = path
        self._holds_old_run = holds_old_run

    @classmethod
    def create(cls, path: Path, *, force: bool = False) -> ResultFolder:
        """Makes the folder. One that holds anything is refused; with `force` an older run in it is replaced.

        It goes when the first new file comes: a run that cannot start takes nothing away. Raises SpecError if the
        folder is not empty (with `force`: and holds no run), or cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_empty = not any(path.iterdir())
        except OSError as error:
            raise SpecError("out", path, error.strerror or "cannot be made", "Give another folder") from error
        if not is_empty:
            _check_replaceable(path, force)
        return cls(path, holds_old_run=not is_empty)

    def repeat_path(self, repeat: int) -> Path:
        """The folder of a repeat, from 0; made if it is not there."""
        path = self.path / f"repeat-{repeat}"
        path.mkdir(exist_ok=True)
        return path

    def write_workload(self, workload: Workload) -> None:
        """The workload as run: with its variant, its overrides and the adapters that the target lists."""
        from heddle_loadtest.workload.spec_file import dump_workload

        self._make_room()
        write_text(dump_workload(workload), self.path / _WORKLOAD)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """What `environment.describe` found."""
        self._make_room()
        write_json(environment, self.path / _ENVIRONMENT)

    def write_schedule(self, repeat: int, schedule: Schedule, style: Style, model: str | None) -> None:
        """Both forms of the schedule, before its first request is sent."""
        from heddle_loadtest.client.aiperf import write_aiperf_trace

        write_schedule(schedule, self.repeat_path(repeat) / "schedule.jsonl")
        write_aiperf_trace(schedule, style, model, self.repeat_path(repeat) / "aiperf.jsonl")

    def write_outcome(self, repeat: int, outcome: Outcome, *, keep_text: bool = False) -> None:
        """The raw results of a repeat; answers' texts only with `keep_text`."""
        path = self.repeat_path(repeat)
        write_requests(outcome, path / "requests.jsonl", keep_text=keep_text)
        write_scrapes(outcome, path / "metrics.jsonl")
        write_json(head_of(outcome), path / "outcome.json")

    def write_summary(self, summary: Summary) -> None:
        """The summary, after everything else that was measured: it makes the folder whole."""
        write_json(summary.to_json(), self.path / _SUMMARY)

    def _make_room(self) -> None:
        if self._holds_old_run:
            _remove_run(self.path)
            self._holds_old_run = False


def read_run(path: Path) -> StoredRun:
    """The run in a result folder.

    Raises SpecError, with file and line, if anything is missing or malformed, or if the run did not end.
    """
    if not (path / _SUMMARY).is_file():
        problem = "has no summary.json: the run did not end" if path.is_dir() else "is no folder"
        remedy = "Run it again, or make the summary of the repeats it has with `heddle-loadtest report`"
        raise SpecError("folder", path, problem, remedy if path.is_dir() else "Name a result folder")
    return StoredRun(
        name=path.resolve().name,
        workload=read_workload(path),
        environment=read_json(path / _ENVIRONMENT, dict[str, Any]),
        outcomes=read_outcomes(path),
        summary=_read_summary(path),
    )


def _read_summary(path: Path) -> dict[str, Any]:
    from heddle_loadtest.measure.summary import SCHEMA_VERSION

    summary = read_json(path / _SUMMARY, dict[str, Any])
    if (found := summary.get("schema_version")) != SCHEMA_VERSION:
        problem = f"has schema version {found}, and this program reads {SCHEMA_VERSION}"
        raise SpecError("folder", path / _SUMMARY, problem, "Make it again with `heddle-loadtest report`")
    return summary


def read_workload(path: Path) -> Workload:
    """The workload in a result folder."""
    from heddle_loadtest.workload.spec_file import load_workload

    read_bytes(path / _WORKLOAD)  # so that a missing file is reported as this folder's
    return load_workload(str(path / _WORKLOAD))


def read_outcomes(path: Path) -> tuple[Outcome, ...]:
    """The repeats that are whole, in order, each on a clock that starts at 0; a folder without any is an error."""
    folders = sorted(path.glob(_REPEATS), key=lambda folder: (len(folder.name), folder.name))
    whole = [folder for folder in folders if (folder / "outcome.json").is_file()]
    if not whole:
        raise SpecError("folder", path, "holds no finished repeat", "Name a folder that `heddle-loadtest run` wrote")
    return tuple(_read_outcome(folder) for folder in whole)


def _read_outcome(path: Path) -> Outcome:
    head = read_json(path / "outcome.json", OutcomeHead)
    return Outcome(
        seed=head.seed,
        started_at=head.started_at,
        started_seconds=0.0,
        ended_seconds=head.elapsed_seconds,
        was_interrupted=head.was_interrupted,
        results=read_requests(path / "requests.jsonl"),
        uploads=head.uploads,
        scrapes=read_scrapes(path / "metrics.jsonl"),
        health=head.health,
    )


def _check_replaceable(path: Path, force: bool) -> None:
    if not force:
        raise SpecError("out", path, "is not empty", "Give another name, or --force to replace its run")
    if not any((path / name).is_file() for name in (_WORKLOAD, _ENVIRONMENT)):  # never someone's home folder
        raise SpecError("out", path, "is not empty and holds no run to replace", "Give another name")


def _remove_run(path: Path) -> None:
    plots = (f"{plot.name}.png" for plot in PLOTS)
    for name in (_SUMMARY, PAGE, *plots, _ENVIRONMENT, _WORKLOAD):  # the summary first: no half run is whole
        (path / name).unlink(missing_ok=True)
    for folder in path.glob(_REPEATS):
        shutil.rmtree(folder)
