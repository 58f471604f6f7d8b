"""The ready-made workloads: they load, draw, write back, and hold what their papers say; and the commands over them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from heddle_loadtest.commands.plan import plan
from heddle_loadtest.commands.specs import specs
from heddle_loadtest.workload.draw import draw_schedule, with_listed
from heddle_loadtest.workload.schedule import Schedule, read_schedule
from heddle_loadtest.workload.spec import Workload
from heddle_loadtest.workload.spec_file import dump_workload, list_ready_made, load_workload

READY_MADE = ("chameleon", "dlora-skew", "punica-fig11", "slora-table3", "smoke", "toppings-cold")
ALL = [(name, variant) for name in READY_MADE for variant in (None, *load_workload(name).variants)]

app = typer.Typer(rich_markup_mode=None)
app.command()(plan)
app.command()(specs)


def load(name: str, variant: str | None = None) -> Workload:
    return with_listed(load_workload(name, variant=variant), ["sql", "pirate"])


def draw(name: str, variant: str | None = None) -> Schedule:
    return draw_schedule(load(name, variant), seed=1)


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == exit_code, result.output
    return result.output


def test_all_are_there() -> None:
    assert list_ready_made() == READY_MADE


@pytest.mark.parametrize(("name", "variant"), ALL, ids=str)
def test_each_loads_draws_and_writes_back(tmp_path: Path, name: str, variant: str | None) -> None:
    workload = load_workload(name, variant=variant)
    path = tmp_path / "again.yaml"
    path.write_text(dump_workload(workload))
    assert load_workload(str(path)) == workload
    assert len(draw(name, variant).requests) == workload.requests
    assert workload.about


def test_punicas_four_mixes() -> None:
    num_asked = {
        variant: len(draw("punica-fig11", variant).adapters) for variant in load_workload("punica-fig11").variants
    }
    assert num_asked == {"distinct": 64, "uniform": 8, "skewed": 11, "identical": 1, "base": 1}
    assert draw("punica-fig11", "base").adapters == ("base",)
    assert draw("punica-fig11", "distinct").streams == {"": 32}


def test_punicas_mixes_ask_the_same() -> None:
    prompts = [[one.prompt for one in draw("punica-fig11", variant).requests] for variant in ("distinct", "base")]
    assert prompts[0] == prompts[1]


def test_s_loras_table_grows_in_adapters_alone() -> None:
    for variant in ("n5", "n100", "n1000", "n2000"):
        assert load("slora-table3", variant).adapters.count == int(variant[1:])
        power = load("slora-table3", f"{variant}-power03")
        assert power.adapters.count == int(variant[1:])
        assert Counter(one.adapter for one in draw_schedule(power, 1).requests).most_common(1)[0][1] > 2
    times = [[one.at_seconds for one in draw("slora-table3", variant).requests] for variant in ("n5", "n2000")]
    assert times[0] == times[1]


def test_chameleon_has_five_ranks_equally_many() -> None:
    adapters = load("chameleon").adapters
    assert [kind.rank for kind in adapters.kinds] == [8, 16, 32, 64, 128]
    assert adapters.count == 100


def test_toppings_is_cold_every_time_and_cached_otherwise_the_same() -> None:
    cold, cached = draw("toppings-cold", "cold"), draw("toppings-cold", "cached")
    assert len(cold.adapters) == len(cold.requests)
    assert cold == cached
    assert [load_workload("toppings-cold", variant=name).warmup for name in ("cold", "cached")] == [0, 1]


def test_dlora_grows_more_skewed_with_the_stride() -> None:
    firsts = [
        Counter(one.adapter for one in draw("dlora-skew", f"stride{stride}").requests)["adapter-00000"]
        for stride in (4, 8, 16, 32)
    ]
    assert all(less < more for less, more in pairwise(firsts))


# Commands ------------------------------------------------------------------------------------------------------------


def test_plan_writes_a_schedule_and_says_what_is_in_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan"
    options = ["--seed", "1", "--variant", "stride8", "--set", "requests=20", "--out", str(out)]
    lines = run("plan", "dlora-skew", *options).splitlines()
    schedule = read_schedule(out / "schedule.jsonl")
    assert schedule == draw_schedule(load_workload("dlora-skew", variant="stride8", overrides=["requests=20"]), 1)
    figures = json.loads(lines[-1])
    assert (figures["workload"], figures["requests"], figures["seed"]) == ("dlora-skew-stride8", 20, 1)
    assert figures["adapters"] == len(schedule.adapters)
    assert figures["output_tokens"] == sum(request.max_tokens for request in schedule.requests)
    assert len((out / "aiperf.jsonl").read_text().splitlines()) == 20


def test_plan_counts_tenants_apart(tmp_path: Path) -> None:
    tenants = "tenants={slow: {arrivals: {kind: poisson, rate: 1}}, fast: {arrivals: {kind: poisson, rate: 20}}}"
    output = run("plan", "chameleon", "--set", tenants, "--out", str(tmp_path))
    assert "slow" in output
    assert json.loads(output.splitlines()[-1])["tenants"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smok"], "Did you mean `smoke`?"),
        (["smoke"], "adapters.listed"),
        (["chameleon", "--seed", "-1"], "--seed '-1'"),
        (["chameleon", "--variant", "x"], "--variant 'x'"),
        (["chameleon", "--set", "arrivals.rate=0"], "arrivals.rate '0'"),
        (["chameleon", "--style", "llamacpp"], 'adapters.name="{index}"'),
    ],
)
def test_plan_says_what_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    output = run("plan", *arguments, "--out", str(tmp_path / "out"), exit_code=2)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_plan_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--out" in run("plan", "chameleon", "--out", str(tmp_path / "file"), exit_code=2)


def test_specs_lists_all_and_prints_one(tmp_path: Path) -> None:
    listed = run("specs")
    for name in READY_MADE:
        assert name in listed
        assert all(variant in listed for variant in load_workload(name).variants)
    path = tmp_path / "mine.yaml"
    path.write_text(run("specs", "punica-fig11"))
    assert load_workload(str(path)) == load_workload("punica-fig11")
    assert "Known: chameleon" in run("specs", "nothing", exit_code=2)
