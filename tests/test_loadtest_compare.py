"""Comparisons of runs whose difference is known, conditions as people write them, and the command over folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer
from msgspec.structs import replace
from typer.testing import CliRunner

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.commands.compare import compare as compare_command
from heddle_loadtest.commands.compare import verdict_line
from heddle_loadtest.errors import SpecError
from heddle_loadtest.measure import bootstrap
from heddle_loadtest.measure.compare import Comparison, Verdict, compare
from heddle_loadtest.measure.conditions import Answer, judge, parse_conditions, parse_fail_if
from heddle_loadtest.measure.sample import METRICS
from heddle_loadtest.measure.summary import summarize
from heddle_loadtest.report.folder import ResultFolder
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Poisson, Slo, Workload
from loadtest_samples import OPEN_LOOP, make_outcome, make_result

WORKLOAD = replace(OPEN_LOOP, slo=Slo(ttft_seconds=1.0))
ERROR = RequestError("queue_full", "later")


@dataclass(frozen=True)
class Run:
    outcomes: Sequence[Outcome]
    name: str = "run"
    workload: Workload = WORKLOAD


def make_run(
    slower: float = 1.0, *, source: int = 0, num_requests: int = 200, fail_every: int = 0, **fields: object
) -> Run:
    """Three repeats of four-token answers; `slower` stretches every time after a request is due."""
    random = np.random.default_rng(source)
    outcomes = []
    for seed in range(3):
        results = []
        for index in range(num_requests):
            due = index * 0.1
            ticks = np.cumsum([random.lognormal(-1.0, 0.3), *random.lognormal(-3.0, 0.3, size=3)]) * slower
            error = ERROR if fail_every and index % fail_every == 0 else None
            results.append(make_result(due, *(float(due + tick) for tick in ticks), error=error))
        outcomes.append(make_outcome(results, seed=seed))
    return Run(outcomes, **fields)  # type: ignore[arg-type]


def test_slower_run_is_worse() -> None:
    comparison = compare(make_run(source=1), make_run(1.5, source=2))
    change = comparison.metrics["ttft_p50"]
    assert change.change == pytest.approx(0.5, abs=0.1)
    assert change.interval is not None
    assert change.interval.low < 0.5 < change.interval.high
    for metric in ("ttft_p50", "ttft_p90", "tpot_p50", "e2e_p50", "e2e_p99"):
        assert comparison.metrics[metric].verdict is Verdict.WORSE
    assert verdict_line(comparison).startswith("B is worse in ttft_p50")


def test_faster_run_is_better() -> None:
    comparison = compare(make_run(source=1), make_run(0.5, source=2))
    assert comparison.metrics["ttft_p50"].verdict is Verdict.BETTER
    assert comparison.metrics["e2e_p99"].verdict is Verdict.BETTER


def test_no_difference_is_mostly_seen_as_none() -> None:
    """Of 20 pairs of like runs, about 1 may seem to differ by chance in any one metric."""
    verdicts = [
        compare(make_run(source=2 * pair, num_requests=50), make_run(source=2 * pair + 1, num_requests=50))
        for pair in range(20)
    ]
    for metric in ("ttft_p50", "e2e_p90"):
        num_seen = sum(each.metrics[metric].is_significant for each in verdicts)
        assert num_seen <= 4  # more than that has a chance below 1 % at 5 % each


def test_identical_targets_whose_runs_differ_are_mostly_seen_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 pairs of three repeats; each repeat is faster or slower as a whole by a tenth or so."""
    monkeypatch.setattr(bootstrap, "_NUM_REPLICATES", (300, 300))
    random = np.random.default_rng(1)

    def run() -> Run:
        outcomes = []
        for seed in range(3):
            first, later = random.lognormal(random.normal(0.0, 0.1, size=2), 0.1, size=(34, 2)).T
            ends = np.cumsum(first + later)
            times = zip(ends - later - first, ends - later, ends, strict=True)
            results = [
                make_result(*map(float, each), error=ERROR if random.random() < 0.02 else None) for each in times
            ]
            outcomes.append(make_outcome(results, seed=seed))
        return Run(outcomes)

    comparisons = [compare(run(), run()) for _ in range(100)]
    seen = {name: sum(each.metrics[name].is_significant for each in comparisons) for name in METRICS}
    assert max(seen.values()) <= 10, seen
    assert all(each.metrics["ttft_p90"].interval is not None for each in comparisons)


def test_one_repeat_shows_nothing() -> None:
    one, three, slow = (Run(make_run(slower, source=1).outcomes[:count]) for slower, count in ((1, 1), (1, 3), (9, 1)))
    for a, b in ((one, slow), (three, slow), (slow, three)):
        comparison = compare(a, b)
        assert not any(change.is_significant for change in comparison.metrics.values())
        assert comparison.metrics["ttft_p50"].interval is not None
    assert judge(compare(three, slow), parse_fail_if("ttft_p50>+10%")).answer is Answer.NOT_SHOWN
    (warning,) = (warning for warning in compare(three, slow).warnings if "repeats:" in warning)
    assert warning.startswith("B has 1 of 3 repeats: nobody knows how its runs differ, so that no difference is shown")


def test_throughput_and_goodput_are_better_when_there_is_more() -> None:
    slow = [make_outcome([make_result(i * 0.2, i * 0.2 + 1.1) for i in range(100)], seed=s) for s in range(3)]
    fast = [make_outcome([make_result(i * 0.1, i * 0.1 + 0.1) for i in range(100)], seed=s) for s in range(3)]
    comparison = compare(Run(slow), Run(fast))
    for metric in ("output_tokens_per_second", "requests_per_second", "goodput"):
        assert comparison.metrics[metric].verdict is Verdict.BETTER
    assert comparison.metrics["goodput"].change == pytest.approx(1.0)  # points, not a ratio to nothing
    assert compare(Run(fast), Run(slow)).metrics["requests_per_second"].verdict is Verdict.WORSE


def test_errors_differ_in_points() -> None:
    comparison = compare(make_run(source=1), make_run(source=2, fail_every=10))
    change = comparison.metrics["error_rate"]
    assert change.change == pytest.approx(0.1)
    assert change.verdict is Verdict.WORSE
    assert change.to_json()["difference"] == pytest.approx(0.1)
    assert compare(make_run(source=1), make_run(source=2)).metrics["error_rate"].verdict is Verdict.NO_DIFFERENCE_SHOWN


def test_ratio_and_its_interval_in_json() -> None:
    document = json.loads(json.dumps(compare(make_run(source=1), make_run(2.0, source=2)).to_json(), allow_nan=False))
    entry = document["metrics"]["ttft_p50"]
    assert set(document["metrics"]) == set(METRICS)
    assert entry["ratio"] == pytest.approx(entry["b"] / entry["a"], rel=1e-4)
    assert entry["ratio_interval"][0] < entry["ratio"] < entry["ratio_interval"][1]
    assert entry["verdict"] == "worse"


def test_what_one_of_the_two_lacks_is_not_compared() -> None:
    failed = Run([make_outcome([make_result(0.0, error=ERROR)] * 5, seed=seed) for seed in range(3)])
    comparison = compare(make_run(), failed)
    assert comparison.metrics["ttft_p50"].verdict is Verdict.NOT_MEASURED
    assert comparison.metrics["error_rate"].verdict is Verdict.WORSE
    assert comparison.metrics["error_rate"].change == pytest.approx(1.0)
    assert compare(failed, make_run()).metrics["requests_per_second"].verdict is Verdict.NOT_MEASURED


def test_good_runs_of_the_same_schedule_raise_no_warning() -> None:
    renamed = replace(WORKLOAD, name="other", about="the same under another name")
    assert compare(make_run(), make_run(workload=renamed)).warnings == ()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda run: Run(run.outcomes, workload=replace(WORKLOAD, arrivals=Poisson(rate=2.0))), "different workloads"),
        (lambda run: Run(run.outcomes, workload=replace(WORKLOAD, slo=Slo(ttft_seconds=9.0))), "service levels"),
        (lambda run: Run([replace(each, seed=9) for each in run.outcomes]), "different seeds"),
        (lambda run: Run(run.outcomes[:2]), "B has 2 of 3 repeats"),
        (lambda run: Run([replace(each, was_interrupted=True) for each in run.outcomes]), "B was interrupted"),
        (
            lambda run: Run([make_outcome(each.results, seed=each.seed, cpu_share=1.0) for each in run.outcomes]),
            "B is invalid",
        ),
    ],
)
def test_warnings(other: Callable[[Run], Run], words: str) -> None:
    run = make_run(num_requests=20)
    assert any(words in warning for warning in compare(run, other(run)).warnings)


# Conditions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "metric", "is_above", "limit"),
    [
        ("ttft_p99>+10%", "ttft_p99", True, 0.1),
        (" output_tokens_per_second < -5 % ", "output_tokens_per_second", False, -0.05),
        ("error_rate>1.5%", "error_rate", True, 0.015),
    ],
)
def test_conditions_as_people_write_them(text: str, metric: str, is_above: bool, limit: float) -> None:
    condition = parse_fail_if(text)
    assert (condition.metric, condition.is_above) == (metric, is_above)
    assert condition.limit == pytest.approx(limit)


def test_several_conditions() -> None:
    found = parse_conditions(["ttft_p50>+1%, ttft_p99>+2%", "e2e_p50>+3%"])
    assert [condition.metric for condition in found] == ["ttft_p50", "ttft_p99", "e2e_p50"]


@pytest.mark.parametrize("text", ["", "ttft_p99", "ttft_p99>10", "ttft_p99=10%", "ttft_p99>%", "ttft_p99>>1%", ">1%"])
def test_no_condition(text: str) -> None:
    with pytest.raises(SpecError, match="is no condition"):
        parse_fail_if(text)


def test_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(SpecError, match="no metric 'latency'") as caught:
        parse_fail_if("latency>+10%")
    assert all(metric in str(caught.value) for metric in METRICS)


@pytest.fixture(scope="module")
def worse() -> Comparison:
    """B half as slow again, with a tenth of its requests failed."""
    return compare(make_run(source=1), make_run(1.5, source=2, fail_every=10))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("ttft_p50>+10%", Answer.FAILS),
        ("ttft_p50>+90%", Answer.HOLDS),
        ("ttft_p50<-10%", Answer.HOLDS),
        ("error_rate>+5%", Answer.FAILS),
        ("error_rate>+20%", Answer.HOLDS),
    ],
)
def test_answers(worse: Comparison, text: str, answer: Answer) -> None:
    result = judge(worse, parse_fail_if(text))
    assert result.answer is answer
    assert result.to_json()["condition"] == text


def test_change_that_chance_explains_is_not_shown() -> None:
    """Two requests, one of them slow: far beyond the limit, but nobody can say."""
    quick = [make_outcome([make_result(0.0, 0.1), make_result(1.0, 1.3)], seed=seed) for seed in range(3)]
    mixed = [make_outcome([make_result(0.0, 0.1), make_result(1.0, 1.5)], seed=seed) for seed in range(3)]
    result = judge(compare(Run(quick), Run(mixed)), parse_fail_if("ttft_p50>+10%"))
    assert result.answer is Answer.NOT_SHOWN
    assert "more repeats are needed" in result.sentence


def test_metric_that_only_a_has_fails() -> None:
    failed = Run([make_outcome([make_result(0.0, error=ERROR)] * 5, seed=seed) for seed in range(3)])
    assert judge(compare(make_run(), failed), parse_fail_if("ttft_p50>+10%")).answer is Answer.FAILS


def test_metric_that_a_lacks_is_an_error() -> None:
    without_slo = make_run(workload=OPEN_LOOP)
    with pytest.raises(SpecError, match="goodput was not measured in A"):
        judge(compare(without_slo, without_slo), parse_fail_if("goodput<-5%"))


# The command ---------------------------------------------------------------------------------------------------------


app = typer.Typer()
app.command()(compare_command)


def store(run: Run, path: Path) -> str:
    folder = ResultFolder.create(path)
    folder.write_workload(run.workload)
    folder.write_environment({})
    for repeat, outcome in enumerate(run.outcomes):
        folder.write_outcome(repeat, outcome)
    folder.write_summary(summarize(run.workload, run.outcomes))
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("runs")
    return store(make_run(source=1), root / "before"), store(make_run(1.5, source=2), root / "after")


def test_command_prints_a_verdict_and_one_json_line(folders: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, list(folders))
    assert result.exit_code == 0
    *_, verdict, line = result.stdout.splitlines()
    document = json.loads(line)
    assert (document["a"], document["b"], document["has_failed"]) == ("before", "after", False)
    assert document["metrics"]["ttft_p50"]["verdict"] == "worse"
    assert "ttft_p50, ms" in result.stdout
    assert "B is worse in ttft_p50" in result.stdout.split("{")[0]
    assert verdict


def test_command_gives_the_same_numbers_as_the_runs_in_memory(folders: tuple[str, str]) -> None:
    document = json.loads(CliRunner().invoke(app, [*folders, "--json-only"]).stdout)
    expected = compare(make_run(source=1), make_run(1.5, source=2)).metrics["ttft_p90"]
    assert document["metrics"]["ttft_p90"]["ratio"] == pytest.approx(expected.to_json()["ratio"], rel=1e-3)


def test_command_fails_if_a_condition_does(folders: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, [*folders, "--fail-if", "ttft_p50>+10%,ttft_p50>+500%"])
    assert result.exit_code == 1
    assert "ttft_p50>+10% fails" in result.stdout
    conditions = json.loads(result.stdout.splitlines()[-1])["conditions"]
    assert [condition["answer"] for condition in conditions] == ["fails", "holds"]


def test_command_alone_with_json(folders: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, [*folders, "--json-only"])
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fail-if", "latency>+10%"], "there is no metric 'latency'"),
        (["--fail-if", "ttft_p50"], "--fail-if 'ttft_p50': is no condition"),
    ],
)
def test_bad_conditions(folders: tuple[str, str], arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, [*folders, *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_folder_that_is_none(folders: tuple[str, str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [folders[0], str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
