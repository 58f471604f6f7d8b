"""The server gives up what the simulator does: its policy alone, and the small form of `bench eviction --served`."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest
from rich.console import Console

from heddle_adapters.eviction import POLICIES
from heddle_demo.bench.eviction_bench import SCENARIOS, Simulation
from heddle_demo.bench.served_eviction import ServedPlan, confirm_on_servers
from small_world import SmallWorld

PLAN = ServedPlan(scenarios=("mixed ranks",), num_adapters=60, num_requests=150, pool_share=0.25, num_streams=1, seed=2)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_request_at_a_time_finds_what_the_simulator_says(policy: str) -> None:
    sizes = [1, 2, 4, 8] * 15
    world = SmallWorld(num_pages=40, host_pages=0, policy=policy)
    world.loader.sizes = {str(adapter): size for adapter, size in enumerate(sizes)}
    simulation = Simulation(sizes, world.pool.num_pages - 1, policy, num_in_flight=1)  # a request takes a page itself
    (scenario,) = [each for each in SCENARIOS if each.name == "mixed ranks"]
    for visit in islice(scenario.visits(random.Random(0), len(sizes)), 2000):
        simulation.serve(visit)
        world.serve(str(visit.adapter))
        assert world.residency.num_requests["device"] == simulation.num_hits
    assert world.residency.num_evictions > 500


def test_servers_load_again_what_the_simulator_says() -> None:
    result = confirm_on_servers(Console(), PLAN)
    outcomes = json.loads(json.dumps(result))["outcomes"]
    assert [each["served"]["policy"] for each in outcomes] == list(POLICIES)
    for each in outcomes:
        counted = each["counted"]
        found, moved = counted["requests_by_tier"], counted["bytes_by_source"]
        assert sum(found.values()) == PLAN.num_requests
        assert counted["num_loads"] == found["disk"] == PLAN.num_requests - found["device"]
        assert moved["disk"] == moved["host"] > 0, "nothing stays in host memory"
        assert each["served"] == each["simulated"], "to the byte, as nothing depends on time with one stream"
        assert each["difference"] == 0
    worse = {each["served"]["policy"]: each["served"]["relative"] for each in outcomes}
    assert worse["lru"] > 1.1 * worse["cost"], "so the equality says something"
