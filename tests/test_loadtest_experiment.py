"""Whole runs of a workload, from its keys to its outcomes, on a real server."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fake_openai_server import FakeOpenAIServer
from heddle_loadtest.client.style import Style
from heddle_loadtest.client.target import CheckedTarget, Target
from heddle_loadtest.errors import LoadTestError, SpecError, TargetError
from heddle_loadtest.report.folder import ResultFolder
from heddle_loadtest.run.experiment import Experiment, RunSettings, run_experiment
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.schedule import Schedule
from heddle_loadtest.workload.spec import Workload

KEY = "sk-secret"


@pytest.fixture
def server() -> Iterator[FakeOpenAIServer]:
    with FakeOpenAIServer(("tiny", "poet", "clerk"), ttft_seconds=0.01, inter_token_seconds=0.001) as server:
        yield server


def workload(**keys: Any) -> Workload:
    defaults = {"name": "test", "requests": 4, "arrivals": {"kind": "closed", "streams": 2}, "output": {"tokens": 20}}
    return msgspec.convert(defaults | keys, Workload)


def run(server: FakeOpenAIServer, work: Workload, folder: Any = None, **fields: Any) -> Experiment:
    names = ("seed", "num_repeats", "adapter_files", "keep_text", "workload_folder")
    settings = RunSettings(**{name: fields.pop(name) for name in names if name in fields})
    return asyncio.run(run_experiment(work, Target(url=server.url, **fields), settings, folder))


class Notebook:
    """What is written down, in its order, with the number of requests that the server had by then."""

    def __init__(self, server: FakeOpenAIServer) -> None:
        self.entries: list[tuple[str, int]] = []
        self._server = server

    def _note(self, entry: str) -> None:
        self.entries.append((entry, len(self._server.bodies)))

    def write_workload(self, workload: Workload) -> None:
        self._note(f"workload of {len(workload.adapters.names)} adapters")

    def write_schedule(self, repeat: int, schedule: Schedule, style: Style, model: str | None) -> None:
        self._note(f"schedule {repeat} for {style} {model}")

    def write_outcome(self, repeat: int, outcome: Outcome, *, keep_text: bool) -> None:
        self._note(f"outcome {repeat} with {len(outcome.results)}")


def write_adapter(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name / file).write_bytes(b"{}")


def test_repeats_ask_other_things_and_all_is_written_down(server: FakeOpenAIServer) -> None:
    book = Notebook(server)
    done = run(server, workload(adapters={"listed": True}), book, num_repeats=2, seed=5)
    assert [outcome.seed for outcome in done.outcomes] == [5, 6]
    assert done.workload.adapters.names == ("base", "poet", "clerk")
    assert (done.target.model, done.target.adapters) == ("tiny", ("poet", "clerk"))
    assert book.entries == [
        ("workload of 3 adapters", 0),
        ("schedule 0 for heddle tiny", 0),
        ("schedule 1 for heddle tiny", 0),
        ("outcome 0 with 4", 7),  # three of them to warm up
        ("outcome 1 with 4", 14),
    ]
    asked = [body["messages"][0]["content"] for body in server.bodies if body["max_tokens"] == 20]
    assert asked[:4] != asked[4:]


def test_warm_up_goes_to_each_adapter_and_is_not_counted(server: FakeOpenAIServer) -> None:
    done = run(server, workload(adapters={"names": ["poet", "clerk"]}, warmup=2))
    assert Counter((body["adapter"], body["max_tokens"]) for body in server.bodies[:4]) == {
        ("poet", 8): 2,
        ("clerk", 8): 2,
    }
    assert len(server.bodies) == 4 + len(done.outcomes[0].results) == 8


def test_cold_workload_is_not_warmed_up(server: FakeOpenAIServer) -> None:
    run(server, workload(warmup=0))
    assert len(server.bodies) == 4


def test_time_and_number_together_end_with_whichever_comes_first(server: FakeOpenAIServer) -> None:
    assert len(run(server, workload(seconds=30.0)).outcomes[0].results) == 4


def test_texts_are_kept_on_demand(server: FakeOpenAIServer) -> None:
    assert {result.text for result in run(server, workload()).outcomes[0].results} == {""}
    kept = run(server, workload(), keep_text=True).outcomes[0].results
    assert all(result.text.startswith("0 1 2 ") for result in kept)


def test_tenants_key_comes_from_the_environment(server: FakeOpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload(tenants={"gold": {"api_key_env": "GOLD_KEY"}}, warmup=0)
    with pytest.raises(SpecError, match=r"tenants.gold.api_key_env 'GOLD_KEY': is not set"):
        run(server, work)
    monkeypatch.setenv("GOLD_KEY", KEY)
    done = run(server, work)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert KEY not in repr(done)


def test_keys_are_in_no_file(
    server: FakeOpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOLD_KEY", KEY)
    folder = ResultFolder.create(tmp_path / "out")
    adapters = {"names": ["poet", "overloaded"]}
    with FakeOpenAIServer(("tiny", "poet", "overloaded"), ttft_seconds=0.01) as failing:
        work = workload(tenants={"gold": {"api_key_env": "GOLD_KEY"}, "iron": {}}, adapters=adapters)
        done = run(failing, work, folder, api_key=KEY, keep_text=True)
    assert {result.is_ok for result in done.outcomes[0].results} == {True, False}
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert not [path.name for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())


def test_missing_adapters_are_uploaded_before_the_warm_up(server: FakeOpenAIServer, tmp_path: Path) -> None:
    for name in ("mine", "poet", "unused"):
        write_adapter(tmp_path, name)
    done = run(server, workload(adapters={"names": ["poet", "mine"]}), adapter_files=tmp_path)
    assert list(server.uploads) == ["mine"]
    assert done.target.missing == ("mine",)
    assert all(result.is_ok for result in done.outcomes[0].results)


def test_adapter_that_the_target_does_not_take_ends_the_run(server: FakeOpenAIServer, tmp_path: Path) -> None:
    write_adapter(tmp_path, "unfit")
    with pytest.raises(TargetError, match="adapter_incompatible: made for another base"):
        run(server, workload(adapters={"names": ["unfit"]}), adapter_files=tmp_path)
    assert server.bodies == []


def test_each_repeat_uploads_its_adapters_afresh(server: FakeOpenAIServer, tmp_path: Path) -> None:
    write_adapter(tmp_path, "new-1")
    keys: dict[str, Any] = {
        "adapters": {"count": 2, "name": "new-{index}"},
        "uploads": {"count": 1, "every_seconds": 0.1},
        "arrivals": {"kind": "constant", "rate": 20},
        "popularity": {"kind": "identical"},
        "requests": 8,
    }
    with FakeOpenAIServer(("tiny", "new-0"), ttft_seconds=0.01) as fresh:
        done = run(fresh, workload(**keys), adapter_files=tmp_path, num_repeats=2)
        assert [[upload.error for upload in outcome.uploads] for outcome in done.outcomes] == [[None], [None]]
        assert "new-1" not in [body.get("adapter") for body in fresh.bodies if body["max_tokens"] == 8]
        again = run(fresh, workload(**keys), adapter_files=tmp_path)  # finds the target as the first run did
        assert [upload.http_status for upload in again.outcomes[0].uploads] == [201]
    with FakeOpenAIServer(("tiny", "new-0", "new-1")) as taken, pytest.raises(TargetError, match="'new-1': is on the"):
        run(taken, workload(**keys), adapter_files=tmp_path)


def test_the_adapters_of_a_storm_are_cold(server: FakeOpenAIServer) -> None:
    keys: dict[str, Any] = {
        "adapters": {"names": ["poet", "clerk"]},
        "popularity": {"kind": "storm", "warm": 1, "at_seconds": 0.1},
        "arrivals": {"kind": "constant", "rate": 20},
    }
    done = run(server, workload(**keys))
    assert [result.adapter for result in done.outcomes[0].results] == ["poet", "poet", "clerk", "poet"]
    assert [body["adapter"] for body in server.bodies if body["max_tokens"] == 8] == ["poet"]


@pytest.mark.parametrize(
    ("keys", "fields", "expected"),
    [
        ({"adapters": {"names": ["poets"]}}, {}, "adapters 'poets': the target does not list it. It has: poet"),
        ({}, {"model": "huge"}, "model 'huge'"),
        ({"adapters": {"listed": True}}, {"style": Style.LORAX}, "does not list its adapters"),
        (
            {"prompt": {"kind": "token-ids", "tokens": 4, "vocabulary": 99}},
            {"style": Style.LORAX},
            "is of token ids, which lorax does not take",
        ),
        ({}, {"adapter_files": Path("nowhere")}, "adapter_files 'nowhere': is no folder"),
        ({}, {"adapter_files": Path(), "style": Style.VLLM}, "which takes no uploads"),
        ({}, {"num_repeats": 0}, "repeats '0': must be 1 or more"),
        ({}, {"seed": -1}, "seed '-1': must be 0 or more"),
        (
            {
                "adapters": {"names": ["poet", "new"]},
                "uploads": {"count": 1, "every_seconds": 1.0},
                "arrivals": {"kind": "constant", "rate": 10},
            },
            {},
            "adapter_files: is not given, and the workload uploads adapters while it runs",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_request(
    server: FakeOpenAIServer, keys: dict[str, Any], fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(LoadTestError) as caught:
        run(server, workload(**keys), **fields)
    assert expected in str(caught.value)
    assert server.bodies == []


def test_stop_ends_the_repeats_too(server: FakeOpenAIServer) -> None:
    async def run_and_stop() -> Experiment:
        stop = asyncio.Event()

        def stop_soon(_: Schedule) -> None:
            asyncio.get_running_loop().call_later(0.3, stop.set)

        return await run_experiment(
            workload(requests=None, seconds=60.0),
            Target(url=server.url),
            RunSettings(num_repeats=3),
            on_start=stop_soon,
            stop=stop,
        )

    done = asyncio.run(run_and_stop())
    assert [outcome.was_interrupted for outcome in done.outcomes] == [True]
    assert any(result.is_ok for result in done.outcomes[0].results)


def test_callbacks_come_in_order(server: FakeOpenAIServer) -> None:
    calls: list[str] = []

    def checked(work: Workload, target: CheckedTarget) -> None:
        calls.append(f"checked {target.model}")

    asyncio.run(
        run_experiment(
            workload(),
            Target(url=server.url),
            RunSettings(num_repeats=2),
            on_checked=checked,
            on_repeat=lambda repeat: calls.append(f"repeat {repeat}"),
            on_start=lambda schedule: calls.append("start"),
            on_result=lambda result: calls.append("result"),
        )
    )
    assert calls == [
        "checked tiny",
        *(["repeat 0", "start"] + ["result"] * 4),
        *(["repeat 1", "start"] + ["result"] * 4),
    ]


def test_warm_up_asks_nothing_that_is_measured(server: FakeOpenAIServer) -> None:
    run(server, workload(warmup=1, prompt={"kind": "token-ids", "tokens": 20, "vocabulary": 1000}))
    warm_up, *measured = [(path, body["prompt"]) for path, body in zip(server.paths, server.bodies, strict=True)]
    assert {path for path, _ in (warm_up, *measured)} == {"/v1/completions"}
    assert len(measured) == 4
    assert all(prompt[:4] != warm_up[1][:4] for _, prompt in measured)  # no prefix cache knows them yet
