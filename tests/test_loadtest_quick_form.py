"""The quick form of a run: options to a workload that the rest of the program takes."""

from pathlib import Path
from typing import Any

import pytest

from heddle_loadtest.commands.quick_form import QuickForm
from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.draw import draw_schedule
from heddle_loadtest.workload.spec import Closed, Poisson
from heddle_loadtest.workload.spec_file import dump_workload, load_workload


def test_nothing_but_a_target_is_ten_seconds_of_the_base() -> None:
    workload = QuickForm().to_workload()
    assert (workload.arrivals, workload.seconds, workload.requests) == (Closed(streams=8), 10.0, None)
    assert (workload.adapters.names, workload.output.tokens, workload.warmup) == (("base",), 64, 1)


def test_number_of_requests_takes_the_place_of_the_time() -> None:
    workload = QuickForm(requests=5).to_workload()
    assert (workload.seconds, workload.requests) == (None, 5)
    workload = QuickForm(requests=5, duration_seconds=2.0).to_workload()
    assert (workload.seconds, workload.requests) == (2.0, 5)


def test_rate_makes_an_open_loop() -> None:
    assert QuickForm(rate=20.0).to_workload().arrivals == Poisson(rate=20.0)


def test_adapters_are_named_or_all() -> None:
    assert QuickForm(adapters=" base , poet").to_workload().adapters.names == ("base", "poet")
    assert QuickForm(adapters="all").to_workload().adapters.listed


def test_adapters_take_turns_and_prompts_are_those_given() -> None:
    workload = QuickForm(adapters="base,poet", prompts=("Why?",), requests=4).to_workload()
    schedule = draw_schedule(workload, 0)
    assert [request.adapter for request in schedule.requests] == ["base", "poet"] * 2
    assert {request.prompt for request in schedule.requests} == {"Why?"}


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Why?\n\nWhen?\n", encoding="utf-8")
    schedule = draw_schedule(QuickForm(prompts_file=path, requests=6).to_workload(), 0)
    assert {request.prompt for request in schedule.requests} == {"Why?", "When?"}


def test_workload_can_be_written_down_and_read_again(tmp_path: Path) -> None:
    workload = QuickForm(rate=2.0, adapters="base,poet", prompts=("Why?",), temperature=0.5).to_workload()
    path = tmp_path / "workload.yaml"
    path.write_text(dump_workload(workload), encoding="utf-8")
    assert load_workload(str(path)) == workload


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("streams", 0),
        ("requests", -1),
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("warmup", -1),
        ("rate", 0.0),
        ("rate", float("inf")),
        ("duration_seconds", 0.0),
        ("adapters", "poet, "),
        ("prompts", ("",)),
    ],
)
def test_bad_option_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        QuickForm(**{field: value}).to_workload()
    assert caught.value.field == field


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(SpecError, match="Give one of the two"):
        QuickForm(rate=2.0, streams=3).to_workload()
    with pytest.raises(SpecError, match="Give one of the two"):
        QuickForm(prompts=("Why?",), prompts_file=Path("b")).to_workload()


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [("streams", 3, "--streams"), ("duration_seconds", 3.0, "--duration"), ("warmup", 0, "--warmup")],
)
def test_option_that_contradicts_a_workload_is_named_with_it(field: str, value: Any, option: str) -> None:
    with pytest.raises(SpecError, match=rf"{option} '{value}': contradicts the workload 'smoke'"):
        QuickForm(**{field: value}).check_left_out("smoke")
    QuickForm().check_left_out("smoke")
