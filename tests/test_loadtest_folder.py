"""The result folder: what is written is what is read, what is broken is named by file and line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.client.style import Style
from heddle_loadtest.errors import SpecError
from heddle_loadtest.measure.summary import summarize
from heddle_loadtest.report.folder import ResultFolder, read_outcomes, read_run
from heddle_loadtest.report.raw_files import on_own_clock
from heddle_loadtest.run.outcome import Outcome, UploadResult
from heddle_loadtest.workload.draw import draw_schedule
from heddle_loadtest.workload.schedule import read_schedule
from loadtest_runs import ENVIRONMENT, WORKLOAD, make_repeat
from loadtest_samples import make_outcome, make_result


@pytest.fixture
def outcomes() -> tuple[Outcome, ...]:
    return tuple(make_repeat(seed, 60) for seed in range(2))


@pytest.fixture
def path(tmp_path: Path, outcomes: tuple[Outcome, ...]) -> Path:
    """A whole folder."""
    folder = ResultFolder.create(tmp_path / "a-run")
    folder.write_workload(WORKLOAD)
    folder.write_environment(ENVIRONMENT)
    for repeat, outcome in enumerate(outcomes):
        folder.write_outcome(repeat, outcome, keep_text=True)
    folder.write_summary(summarize(WORKLOAD, outcomes))
    return folder.path


def test_a_run_is_read_as_it_was_written(path: Path, outcomes: tuple[Outcome, ...]) -> None:
    run = read_run(path)
    assert run.outcomes == tuple(on_own_clock(outcome) for outcome in outcomes)
    assert (run.name, run.workload, run.environment) == ("a-run", WORKLOAD, ENVIRONMENT)
    assert run.summary == json.loads((path / "summary.json").read_text())
    assert run.summary == json.loads(json.dumps(summarize(WORKLOAD, outcomes).to_json()))


def test_times_in_the_files_count_from_the_start_and_keep_every_latency(
    path: Path, outcomes: tuple[Outcome, ...]
) -> None:
    first = json.loads((path / "repeat-0/requests.jsonl").read_text().splitlines()[0])
    assert 0 <= first["scheduled_seconds"] < 5  # the run started at 1000 on the clock
    for stored, outcome in zip(read_outcomes(path), outcomes, strict=True):
        assert stored.started_seconds == 0
        for before, after in zip(outcome.results, stored.results, strict=True):
            assert after.ttft_seconds == pytest.approx(before.ttft_seconds, abs=2e-9)
            assert after.end_to_end_seconds == pytest.approx(before.end_to_end_seconds, abs=2e-9)
            assert after.inter_token_seconds == pytest.approx(before.inter_token_seconds, abs=3e-9)


def test_answers_are_kept_only_on_request(tmp_path: Path) -> None:
    result = make_result(0.0, 1.0, error=RequestError("x", "said so"))
    outcome = make_outcome([msgspec.structs.replace(result, text="a secret")])
    ResultFolder(tmp_path).write_outcome(0, outcome)
    assert all("a secret" not in file.read_text() for file in tmp_path.rglob("*.json*"))
    (stored,) = read_outcomes(tmp_path)
    assert stored.results == (msgspec.structs.replace(result, text=""),)


def test_scrapes_hold_what_changed_and_come_back_whole(tmp_path: Path) -> None:
    scrapes = [
        {"still": 1.0, "moves": 1.0, "goes": 5.0, "odd": float("inf")},
        {"still": 1.0, "moves": 2.0, "odd": float("-inf")},
        {"still": 1.0, "moves": 2.0, "goes": 6.0, "odd": 0.5},
        {},
    ]
    outcome = make_outcome([make_result(0.0, 1.0)], started=0.0, scrapes=scrapes)
    ResultFolder(tmp_path).write_outcome(0, outcome)
    assert [dict(scrape.samples) for scrape in read_outcomes(tmp_path)[0].scrapes] == scrapes
    lines = [json.loads(line) for line in (tmp_path / "repeat-0/metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"at_seconds": 1.0, "samples": {"moves": 2.0, "odd": "-inf"}, "gone": ["goes"]}
    assert lines[2]["samples"] == {"goes": 6.0, "odd": 0.5}


def test_uploads_and_health_come_back(tmp_path: Path) -> None:
    upload = UploadResult(
        adapter="new", scheduled_seconds=11.5, finished_seconds=12.0, http_status=507, error="no room"
    )
    outcome = make_outcome(
        [], started=10.0, ended=15.0, cpu_share=0.25, loop_lag=(0.001, 0.002), uploads=(upload,), was_interrupted=True
    )
    ResultFolder(tmp_path).write_outcome(0, outcome)
    (stored,) = read_outcomes(tmp_path)
    assert (stored.ended_seconds, stored.was_interrupted, stored.health) == (5.0, True, outcome.health)
    assert stored.uploads == (msgspec.structs.replace(upload, scheduled_seconds=1.5, finished_seconds=2.0),)


def test_both_forms_of_the_schedule_lie_in_the_repeats_folder(tmp_path: Path) -> None:
    schedule = draw_schedule(WORKLOAD, 3)
    ResultFolder(tmp_path).write_schedule(3, schedule, Style.HEDDLE, "tiny")
    assert read_schedule(tmp_path / "repeat-3/schedule.jsonl") == schedule
    assert len((tmp_path / "repeat-3/aiperf.jsonl").read_text().splitlines()) == len(schedule.requests)


def test_ten_repeats_come_back_in_order(tmp_path: Path) -> None:
    for repeat in range(11):
        ResultFolder(tmp_path).write_outcome(repeat, make_outcome([], seed=repeat))
    assert [outcome.seed for outcome in read_outcomes(tmp_path)] == list(range(11))


def test_a_folder_with_anything_in_it_is_refused(tmp_path: Path, path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.png").touch()
    with pytest.raises(SpecError, match=r"^out .*is not empty\. .*--force"):
        ResultFolder.create(path)
    for force in (False, True):
        with pytest.raises(SpecError, match="is not empty"):
            ResultFolder.create(tmp_path / "other", force=force)
    assert (tmp_path / "other" / "holiday.png").exists()


def test_force_replaces_a_run_and_leaves_other_files(path: Path) -> None:
    for name in ("notes.txt", "holiday.png", "latency.png", "report.html"):
        (path / name).touch()
    folder = ResultFolder.create(path, force=True)
    assert (path / "summary.json").exists(), "a run that cannot start takes nothing away"
    folder.write_environment({})
    assert {file.name for file in path.iterdir()} == {"notes.txt", "holiday.png", "environment.json"}


def test_a_folder_that_cannot_be_made_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match=r"^out .*Give another folder"):
        ResultFolder.create(tmp_path / "file" / "run")


def test_what_did_not_end_is_not_whole(path: Path) -> None:
    (path / "summary.json").unlink()
    with pytest.raises(SpecError, match="the run did not end"):
        read_run(path)
    (path / "repeat-1/outcome.json").unlink()  # the last file of a repeat
    assert len(read_outcomes(path)) == 1


def test_what_is_broken_is_named_by_file_and_line(path: Path) -> None:
    file = path / "repeat-1/requests.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for broken in (lines[4][: len(lines[4]) // 2] + b"\n", b"\xff\xfe\n", b"null\n", b'{"id": 1}\n'):
        file.write_bytes(b"".join([*lines[:4], broken, *lines[5:]]))
        with pytest.raises(SpecError, match=r"repeat-1/requests\.jsonl.*line 5"):
            read_run(path)


@pytest.mark.parametrize(
    "name", ["workload.yaml", "environment.json", "repeat-0/requests.jsonl", "repeat-0/metrics.jsonl"]
)
def test_what_is_missing_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(SpecError, match=name):
        read_run(path)


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "repeat-0/outcome.json"])
def test_malformed_documents_are_named(path: Path, name: str) -> None:
    (path / name).write_text("[1, 2")
    with pytest.raises(SpecError, match=f"{name}.*is malformed"):
        read_run(path)


def test_a_summary_of_another_version_can_be_made_again(path: Path) -> None:
    (path / "summary.json").write_text('{"schema_version": 1}')
    with pytest.raises(SpecError, match=r"schema version 1, and this program reads 2\. .*heddle-loadtest report"):
        read_run(path)
    ResultFolder(path).write_summary(summarize(WORKLOAD, read_outcomes(path)))
    assert read_run(path).summary["schema_version"] == 2


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="holds no finished repeat"):
        read_outcomes(tmp_path)


def test_ten_thousand_long_answers_take_seconds(tmp_path: Path) -> None:
    chunks = [index * 0.0123456789 for index in range(1, 65)]
    outcome = make_outcome([make_result(0.0, *chunks)] * 10_000)
    before = time.process_time()
    ResultFolder(tmp_path).write_outcome(0, outcome)
    (stored,) = read_outcomes(tmp_path)
    assert time.process_time() - before < 10
    assert len(stored.results) == 10_000
