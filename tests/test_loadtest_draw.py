"""A schedule is a pure function of workload and seed, and each aspect of it a function of its own."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import stats

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.draw import CLOSED_LOOP_REQUESTS, draw_schedule, with_listed
from heddle_loadtest.workload.prompts import BUILTIN_QUESTIONS
from heddle_loadtest.workload.schedule import Schedule, ScheduledRequest, read_schedule, write_schedule
from heddle_loadtest.workload.spec import Workload

OPEN: dict[str, Any] = {
    "name": "open",
    "requests": 200,
    "arrivals": {"kind": "poisson", "rate": 10},
    "adapters": {"count": 20},
    "popularity": {"kind": "zipf"},
    "prompt": {"kind": "words", "tokens": {"kind": "uniform", "low": 3, "high": 9}},
    "output": {"tokens": {"kind": "lognormal", "median": 20, "sigma": 0.5}},
}


def workload(**changes: Any) -> Workload:
    return msgspec.convert(OPEN | changes, Workload)


def draw(seed: int = 0, **changes: Any) -> Schedule:
    return draw_schedule(workload(**changes), seed)


def without_ids(requests: tuple[ScheduledRequest, ...], tenant: str) -> list[ScheduledRequest]:
    return [msgspec.structs.replace(request, id=0) for request in requests if request.tenant == tenant]


# Pure ----------------------------------------------------------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
from heddle_loadtest.workload.draw import draw_schedule
from heddle_loadtest.workload.schedule import write_schedule
from heddle_loadtest.workload.spec_file import load_workload
for name in ("chameleon", "punica-fig11", "dlora-skew"):
    write_schedule(draw_schedule(load_workload(name), int(sys.argv[1])), Path(sys.argv[2]) / name)
"""


def test_the_same_seed_makes_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    digests = []
    for run, (seed, hash_seed) in enumerate(((7, 1), (7, 2), (8, 1))):
        folder = tmp_path / str(run)
        folder.mkdir()
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": str(hash_seed)}
        subprocess.run([sys.executable, "-c", _SCRIPT, str(seed), str(folder)], check=True, env=environment)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())])
    assert digests[0] == digests[1]
    assert all(a != b for a, b in zip(digests[0], digests[2], strict=True))


def test_a_schedule_reads_back_as_written(tmp_path: Path) -> None:
    schedule = draw(uploads={"count": 2, "every_seconds": 3})
    write_schedule(schedule, tmp_path / "schedule.jsonl")
    assert read_schedule(tmp_path / "schedule.jsonl") == schedule


def test_ten_thousand_requests_take_no_time() -> None:
    changes: dict[str, Any] = {"requests": 10_000, "prompt": {"kind": "words", "tokens": 32}}
    draw(**changes)
    start = time.process_time()
    assert len(draw(**changes).requests) == 10_000
    assert time.process_time() - start < 5


# Each aspect by itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "aspects"),
    [
        ({"popularity": {"kind": "square-root"}}, {"adapter"}),
        ({"adapters": {"count": 3}}, {"adapter"}),
        ({"arrivals": {"kind": "gamma", "rate": 3, "cv": 2}}, {"at_seconds"}),
        ({"output": {"tokens": 5}}, {"max_tokens"}),
        ({"temperature": 1.0}, {"temperature"}),
        ({"prompt": {"kind": "questions"}}, {"prompt", "num_prompt_tokens"}),
        ({"uploads": {"count": 5, "every_seconds": 2}}, {"adapter"}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_changing_one_leaves_the_others_alone(change: dict[str, Any], aspects: set[str]) -> None:
    before, after = draw().requests, draw(**change).requests
    assert len(before) == len(after)
    for field in ScheduledRequest.__struct_fields__:
        is_same = [getattr(one, field) for one in before] == [getattr(one, field) for one in after]
        assert is_same == (field not in aspects), field


def test_another_tenant_leaves_the_first_ones_draws_alone() -> None:
    one = draw(requests=None, seconds=20, tenants={"a": {}})
    two = draw(requests=None, seconds=20, tenants={"b": {"arrivals": {"kind": "poisson", "rate": 4}}, "a": {}})
    assert without_ids(one.requests, "a") == without_ids(two.requests, "a")
    assert without_ids(two.requests, "b")


def test_tenants_draw_apart_from_each_other() -> None:
    schedule = draw(requests=None, seconds=20, tenants={"a": {}, "b": {}})
    prompts = [{request.prompt for request in without_ids(schedule.requests, tenant)} for tenant in "ab"]
    assert not {str(prompt) for prompt in prompts[0]} & {str(prompt) for prompt in prompts[1]}


def test_sampling_seeds_differ_and_depend_on_the_seed() -> None:
    seeds = [request.seed for request in draw().requests]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert not set(seeds) & {request.seed for request in draw(seed=1).requests}


# Order and end -------------------------------------------------------------------------------------------------------


def test_ids_count_in_the_order_of_times() -> None:
    requests = draw(tenants={"a": {}, "b": {}}).requests
    assert [request.id for request in requests] == list(range(200))
    assert all((one.at_seconds or 0) <= (two.at_seconds or 0) for one, two in pairwise(requests))


def test_requests_are_the_earliest_of_all_tenants() -> None:
    tenants: dict[str, Any] = {"slow": {"arrivals": {"kind": "constant", "rate": 1}}, "fast": {}}
    everything = draw(requests=None, seconds=60, tenants=tenants).requests
    first = draw(requests=50, tenants=tenants).requests
    assert [one.at_seconds for one in first] == [one.at_seconds for one in everything[:50]]
    assert Counter(one.tenant for one in first)["slow"] < 15


def test_superposed_poisson_tenants_are_poisson() -> None:
    arrivals = {name: {"arrivals": {"kind": "poisson", "rate": rate}} for name, rate in (("a", 2), ("b", 7))}
    times = [request.at_seconds for request in draw(requests=4000, tenants=arrivals).requests]
    gaps = np.diff([at or 0.0 for at in times])
    assert stats.kstest(gaps, stats.expon(scale=1 / 9).cdf).pvalue > 1e-3
    assert stats.kstest(gaps, stats.expon(scale=1 / 8).cdf).pvalue < 1e-6


def test_seconds_end_an_open_loop() -> None:
    times = [request.at_seconds or 0 for request in draw(requests=None, seconds=30).requests]
    assert max(times) <= 30
    assert len(times) == pytest.approx(300, abs=90)


def test_closed_loops_have_no_times_and_a_list_to_begin_again() -> None:
    schedule = draw(requests=None, seconds=5, arrivals={"kind": "closed", "streams": 3})
    assert schedule.streams == {"": 3}
    assert schedule.seconds == 5
    assert len(schedule.requests) == CLOSED_LOOP_REQUESTS
    assert {request.at_seconds for request in schedule.requests} == {None}


def test_closed_tenants_take_turns_by_their_streams() -> None:
    tenants = {name: {"arrivals": {"kind": "closed", "streams": streams}} for name, streams in (("a", 6), ("b", 2))}
    schedule = draw(requests=80, tenants=tenants)
    assert schedule.streams == {"a": 6, "b": 2}
    for start in range(0, 80, 8):
        assert Counter(one.tenant for one in schedule.requests[start : start + 8]) == {"a": 6, "b": 2}


def test_closed_and_open_tenants_need_seconds_alone() -> None:
    tenants = {"closed": {"arrivals": {"kind": "closed", "streams": 2}}, "open": {}}
    with pytest.raises(SpecError, match="requests '200': cannot count over closed and open loops"):
        draw(tenants=tenants)
    schedule = draw(requests=None, seconds=10, tenants=tenants)
    assert schedule.streams == {"closed": 2}
    assert {request.at_seconds is None for request in without_ids(schedule.requests, "open")} == {False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": None, "seconds": 1, "arrivals": {"kind": "poisson", "rate": 1e-5}}, "come to none"),
        ({"requests": None, "seconds": 1e4, "arrivals": {"kind": "poisson", "rate": 1e3}}, "more than 1,000,000"),
        ({"requests": 2_000_000}, "more than the 1,000,000 of one schedule"),
        ({"adapters": {"listed": True}}, "known only when a target is asked"),
    ],
)
def test_impossible_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        draw(**changes)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(SpecError, match="seed '-1'"):
        draw(seed=-1)


# Adapters ------------------------------------------------------------------------------------------------------------


def test_listed_adapters_are_spelt_out_with_the_base_first() -> None:
    listed = workload(adapters={"listed": True}, popularity={"kind": "in-turn"}, tenants={"a": {}, "b": {}})
    spelt_out = with_listed(listed, ["x", "y"])
    assert spelt_out.adapters.names == ("base", "x", "y")
    assert draw_schedule(spelt_out, 0).adapters == ("base", "x", "y")
    assert with_listed(spelt_out, ["z"]) == spelt_out


def test_a_tenants_own_listed_adapters_are_spelt_out_too() -> None:
    spelt_out = with_listed(workload(tenants={"a": {"adapters": {"listed": True}}}), ["x"])
    own = spelt_out.tenants["a"].adapters
    assert own is not None
    assert own.names == ("base", "x")


def test_names_carry_index_rank_and_method() -> None:
    kinds = [{"rank": 8}, {"rank": 64, "method": "rslora"}]
    adapters = {"count": 3, "name": "{method}-r{rank}-{index}", "kinds": kinds}
    assert draw(adapters=adapters, popularity={"kind": "in-turn"}).adapters == (
        "lora-r8-0",
        "rslora-r64-1",
        "lora-r8-2",
    )


def test_ranks_are_asked_for_equally_often() -> None:
    kinds = [{"rank": rank} for rank in (8, 16, 32, 64, 128)]
    adapters = {"count": 100, "name": "{rank}-{index}", "kinds": kinds}
    schedule = draw(requests=5000, adapters=adapters, popularity={"kind": "by-rank"})
    counts = Counter(request.adapter.partition("-")[0] for request in schedule.requests)
    assert stats.chisquare([counts[str(rank)] for rank in (8, 16, 32, 64, 128)]).pvalue > 1e-3


def test_uploaded_adapters_are_asked_for_once_they_are_there() -> None:
    schedule = draw(
        requests=None,
        seconds=400,
        adapters={"count": 7},
        popularity={"kind": "uniform"},
        uploads={"count": 3, "every_seconds": 100, "settle_seconds": 2, "share": 0.25},
    )
    assert [(one.at_seconds, one.adapter) for one in schedule.uploads] == [
        (100, "adapter-00004"),
        (200, "adapter-00005"),
        (300, "adapter-00006"),
    ]
    for period in range(4):
        start = 100 * period + (2 if period else 0)  # settled; until then the one before is the newest
        asked = [one.adapter for one in schedule.requests if start <= (one.at_seconds or 0) < 100 * period + 102]
        newest = f"adapter-{3 + period:05d}"
        if period:
            assert set(asked) == {*(f"adapter-{index:05d}" for index in range(4)), newest}
            assert stats.binomtest(asked.count(newest), len(asked), 0.25).pvalue > 1e-3
        else:
            assert set(asked) == {f"adapter-{index:05d}" for index in range(4)}


def test_moving_popularities_see_the_requests_times() -> None:
    schedule = draw(popularity={"kind": "storm", "warm": 2, "at_seconds": 5})
    early = {one.adapter for one in schedule.requests if (one.at_seconds or 0) < 5}
    assert early == {"adapter-00000", "adapter-00001"}
    assert len(schedule.adapters) == 20


# Prompts and traces --------------------------------------------------------------------------------------------------


def test_prompts_are_as_long_as_they_say() -> None:
    for request in draw().requests:
        assert isinstance(request.prompt, str)
        assert len(request.prompt.split()) == request.num_prompt_tokens


def test_token_ids_stay_in_the_vocabulary() -> None:
    prompt = {"kind": "token-ids", "tokens": 50, "vocabulary": 20, "first": 5}
    for request in draw(prompt=prompt).requests:
        assert isinstance(request.prompt, list)
        assert len(request.prompt) == request.num_prompt_tokens == 50
        assert set(request.prompt) <= set(range(5, 20))


def test_questions_all_have_their_turn() -> None:
    questions = ["one?", "two?", "three?"]
    asked = [request.prompt for request in draw(prompt={"kind": "questions", "questions": questions}).requests]
    for start in range(0, 198, 3):
        assert set(asked[start : start + 3]) == set(questions)
    assert {request.prompt for request in draw(prompt={"kind": "questions"}).requests} == set(BUILTIN_QUESTIONS)


def test_a_trace_gives_times_lengths_and_shared_prefixes(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
        '{"timestamp": 4000, "input_length": 700, "output_length": 6, "hash_ids": [1, 3]}\n'
        '{"timestamp": 9000, "input_length": 10, "output_length": 7, "hash_ids": [4]}\n'
    )
    traced = workload(
        requests=None,
        arrivals={"kind": "trace", "file": "trace.jsonl", "speed": 2},
        prompt={"kind": "words", "tokens": {"kind": "trace"}},
        output={"tokens": {"kind": "trace"}},
    )
    requests = draw_schedule(traced, 0, folder=tmp_path).requests
    assert [one.at_seconds for one in requests] == [0, 2, 4.5]
    assert [one.num_prompt_tokens for one in requests] == [600, 700, 10]
    assert [one.max_tokens for one in requests] == [5, 6, 7]
    first, second, third = (str(one.prompt).split() for one in requests)
    assert first[:512] == second[:512]
    assert first[512:] != second[512:600]
    assert third != first[:10]
    cut = msgspec.structs.replace(traced, seconds=3.0)
    assert len(draw_schedule(cut, 0, folder=tmp_path).requests) == 2
