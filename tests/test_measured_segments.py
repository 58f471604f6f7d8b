"""Is distinct really distinct? What the engine counted while a workload ran, beside what the workload says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from demo_server import DemoServer, demo_server
from heddle_demo.data import ADAPTERS, ADAPTERS_DIR
from heddle_loadtest.client.target import Target
from heddle_loadtest.measure.summary import summarize
from heddle_loadtest.run.experiment import run_experiment
from heddle_loadtest.workload.spec import (
    Adapters,
    Closed,
    Distinct,
    Identical,
    Output,
    Popularity,
    Skewed,
    Words,
    Workload,
)

NUM_STREAMS = len(ADAPTERS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    with demo_server(tmp_path_factory.mktemp("server"), adapters=ADAPTERS_DIR) as server:
        yield server


def segments_per_step(server: DemoServer, popularity: Popularity, adapters: Adapters) -> float:
    workload = Workload(
        name="segments",
        requests=8 * NUM_STREAMS,
        arrivals=Closed(streams=NUM_STREAMS),
        adapters=adapters,
        popularity=popularity,
        prompt=Words(tokens=12),
        output=Output(tokens=24),
    )
    experiment = asyncio.run(run_experiment(workload, Target(url=server.address)))
    summary = summarize(experiment.workload, experiment.outcomes)
    assert summary.total.num_ok == 8 * NUM_STREAMS, summary.error_examples
    assert summary.server is not None
    assert summary.server.segments_per_step is not None
    assert all(check.is_within_tolerance for check in summary.server.checks[:2]), summary.server.checks
    return summary.server.segments_per_step


def test_measured_segments_are_the_workloads(server: DemoServer) -> None:
    adapters = Adapters(names=tuple(ADAPTERS))
    assert segments_per_step(server, Identical(), Adapters(names=("base",))) == 1.0
    assert segments_per_step(server, Identical(), adapters) == 1.0
    distinct = segments_per_step(server, Distinct(), adapters)
    assert 0.75 * NUM_STREAMS < distinct <= NUM_STREAMS  # the streams start and end one by one
    assert 1.0 < segments_per_step(server, Skewed(), adapters) < distinct
