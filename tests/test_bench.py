"""`heddle bench adapters`: its adapters are real ones, its arithmetic is right, its quick form agrees with itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from adapter_samples import NoBase
from heddle_adapters.content_folder import open_content
from heddle_adapters.store import AdapterStore
from heddle_demo.bench.counters import Counters
from heddle_demo.bench.floor import BaseBytes, Floor
from heddle_demo.bench.machine import TooLittleRoom, check_room
from heddle_demo.bench.popularity import POPULARITIES, own_shares, popular
from heddle_demo.bench.random_adapters import RANKS, RandomAdapters, fill_store, linear_layout
from heddle_demo.bench.ratio import Ratio
from heddle_demo.bench.server import Answer, BenchFailed, BenchServer, ServerSettings, running_server
from heddle_demo.bench.stores import BenchStores
from heddle_demo.bench.summary import Summary
from heddle_demo.bench.window import Label, Load, RequestShape, Window, base_only, summarise
from heddle_demo.data import BASE_DIR
from live_server import live_server, server_config
from scripted_engine import LAYOUT

BASE = linear_layout(BASE_DIR)
LABEL = Label("table", 2, "uniform")


def digests(path: Path) -> dict[str, str]:
    with AdapterStore(path) as store:
        return {record.name: record.latest.digest for record in store.list()}


# Adapters and stores.


def test_the_layout_is_that_of_the_bases_linears() -> None:
    config = json.loads((BASE_DIR / "config.json").read_text())
    assert len(BASE.sites) == 7 * config["num_hidden_layers"]
    sites = {site.path: site for site in BASE.sites}
    down = sites["model.layers.5.mlp.down_proj"]
    assert (down.in_features, down.out_features) == (config["intermediate_size"], config["hidden_size"])
    assert not down.has_bias


def test_random_adapters_are_stored_like_uploads_and_compile(tmp_path: Path) -> None:
    adapters = RandomAdapters(BASE)
    fill_store(tmp_path, adapters, 5)
    for number, digest in enumerate(digests(tmp_path).values()):
        checkpoint = open_content(tmp_path, digest, BASE)
        assert (checkpoint.max_rank, len(checkpoint.sites)) == (RANKS[number % 4], len(BASE.sites))
        rows = [update.rows for update in checkpoint.compile(NoBase()).updates if update.rows is not None]
        assert len(rows) == len(BASE.sites)
        values = np.concatenate([part.ravel() for each in rows for part in (each.a, each.b)])
        assert values.size * 2 == adapters.row_bytes(number)
        assert np.isfinite(values).all()
        assert 0 < np.abs(values).max() < 0.1


def test_random_adapters_depend_on_the_seed_and_their_number_alone(tmp_path: Path) -> None:
    for name, count, seed in (("five", 5, 0), ("three", 3, 0), ("other", 3, 1)):
        fill_store(tmp_path / name, RandomAdapters(BASE, seed), count)
    five, three, other = (digests(tmp_path / name) for name in ("five", "three", "other"))
    assert len(set(five.values())) == 5
    assert three.items() < five.items()
    assert not set(three.values()) & set(other.values())


def test_a_copied_store_shares_content_and_nothing_else(tmp_path: Path) -> None:
    stores = BenchStores(tmp_path, RandomAdapters(BASE))
    stores.fill(3)
    copied = stores.copy(3)
    assert digests(copied) == digests(stores.path(3))
    with AdapterStore(copied) as store:
        store.delete("random-00001")
        store.collect()
    assert len(digests(copied)) == 2
    for digest in digests(stores.path(3)).values():
        open_content(stores.path(3), digest, BASE)


# Who asks for what.


def share_of_first(draws: Any, count: int = 20_000) -> float:
    return Counter(islice(draws, count))["0"] / count


def test_popularities_have_the_shape_they_are_named_for() -> None:
    names = [str(number) for number in range(200)]
    uniform, zipf, power = (POPULARITIES[name] for name in ("uniform", "zipf 1.0", "power 0.3"))
    assert share_of_first(popular(names, uniform, 1)) == pytest.approx(1 / 200, abs=0.003)
    harmonic = sum(1 / rank for rank in range(1, 201))
    assert share_of_first(popular(names, zipf, 1)) == pytest.approx(1 / harmonic, abs=0.02)
    # P(int(power(a) * n) = 0) = n ** -a
    assert share_of_first(popular(names, power, 1)) == pytest.approx(200**-0.3, abs=0.02)
    first, again, other = (list(islice(popular(names, zipf, seed), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_streams_with_shares_never_meet_and_never_repeat() -> None:
    names = [str(number) for number in range(100)]
    rows = [list(islice(draws, 200)) for draws in own_shares(names, 8, seed=0)]
    for stream, row in enumerate(rows):
        assert {int(name) % 8 for name in row} == {stream}, "so its adapters all have one rank"
        assert set(row) == set(names[stream::8])
        assert all(name != following for name, following in pairwise(row))


# Arithmetic.


def answer(started: float, finished: float, tier: str | None = "device", load_seconds: float = 0.0) -> Answer:
    return Answer("a" if tier else None, started, finished, 10, tier, load_seconds, ttft_seconds=0.1)


def test_a_request_that_outlasts_the_window_counts_in_part() -> None:
    answers = [answer(100.0, 101.0), answer(101.0, 102.5, "disk", 0.5), answer(100.0, 104.0, "disk", 0.1)]
    counted = Counters.parse(
        'heddle_adapter_cache_requests_total{tier="device"} 1.0\n'
        'heddle_adapter_cache_requests_total{tier="disk"} 2.0\n'
        'heddle_adapter_load_bytes_total{source="disk"} 300\n'
        'heddle_adapter_load_bytes_total{source="host"} 200\n'
        "heddle_adapter_loads_total 2\nheddle_segments_total 30\nheddle_engine_steps_total 20\n"
        "heddle_step_seconds_total 1.5\n"
    )
    window = summarise(LABEL, 2.0, 102.0, answers, counted)
    whole, two_thirds, half = 1.0, 1 / 1.5, 0.5
    assert window.requests_per_second == pytest.approx((whole + two_thirds + half) / 2)
    assert window.output_tokens_per_second == pytest.approx(10 * window.requests_per_second)
    assert window.load_seconds_per_request == pytest.approx(0.2)
    assert window.requests_by_tier == window.counted_by_tier == {"device": 1, "disk": 2}
    assert (window.num_loads, window.read_bytes, window.loaded_bytes) == (2, 300, 200)
    summary = Summary.of([window, window])
    assert summary.share_by_tier == {"device": pytest.approx(1 / 3), "disk": pytest.approx(2 / 3)}
    assert (summary.segments_per_step, summary.num_loads) == (1.5, 4)
    assert summary.loaded_bytes_per_request == pytest.approx(400 / 6)


def test_counters_read_labels_and_subtract() -> None:
    before = Counters.parse('# HELP x y\nx_total{b="2",a="one, two"} 1e3\nz 5\n')
    after = Counters.parse('x_total{a="one, two",b="2"} 1001.5\nx_total{a="new",b="2"} 2\nz 5\n')
    added = after.since(before)
    assert added.total("x_total") == 3.5
    assert added.by_label("x_total", "a") == {"one, two": 1.5, "new": 2.0}
    assert (added.total("z"), added.total("unknown")) == (0, 0)


def test_a_ratio_knows_how_sure_it_is() -> None:
    random = np.random.default_rng(0)
    drift = np.linspace(1.0, 2.0, 20)  # of the machine, the same for both of a pair
    noise = 1 + random.normal(0, 0.01, (2, 20))
    ratio = Ratio.of(list(10 * drift * noise[0]), list(9 * drift * noise[1]))
    assert ratio.value == pytest.approx(0.9, abs=0.02)
    assert ratio.low < 0.9 < ratio.high < 0.95
    assert ratio.high - ratio.low < 0.06
    equal = Ratio.of([5.0] * 4, [5.0] * 4)
    assert (equal.value, equal.low, equal.high) == (1.0, 1.0, 1.0)


def test_the_floor_counts_what_a_step_reads() -> None:
    base = BaseBytes.of(BASE_DIR, BASE)
    num_weights = 6 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 640)
    assert base.weights == pytest.approx(num_weights * 0.516 + 1024 * 256 * 2, rel=1e-3)
    assert base.kv_per_token == 6 * 2 * 4 * 32 * 2
    floor = Floor(weight_bytes=6, adapter_bytes=3, kv_bytes=1, bandwidth_bytes_per_second=5, measured_step_seconds=4)
    assert floor.floor_seconds == 2
    assert floor.to_json()["floor_seconds"] == 2


def test_too_little_room_is_told_before_anything_starts(tmp_path: Path) -> None:
    check_room(tmp_path, 1, 1)
    with pytest.raises(TooLittleRoom, match=r"4194304\.0 GiB of disk are needed"):
        check_room(tmp_path, 1 << 52, 1)
    with pytest.raises(TooLittleRoom, match=r"4194304\.0 GiB of memory are needed"):
        check_room(tmp_path, 1, 1 << 52)


# Servers and load.


def test_a_closed_loop_on_a_real_server(tmp_path: Path) -> None:
    config = server_config(tmp_path)
    adapters = RandomAdapters(LAYOUT)
    fill_store(config.store_path, adapters, 8)
    shape = RequestShape(num_prompt_tokens=20, num_output_tokens=6, vocabulary_size=256)

    async def measure(address: str) -> tuple[Window, Window]:
        async with aiohttp.ClientSession(address) as session:
            server = BenchServer("scripted", session)
            with_adapters = Load(server, own_shares(adapters.names(8), 2, seed=0), shape)
            return (
                await with_adapters.measure(LABEL, seconds=0.5, settle_seconds=0.0),
                await Load(server, base_only(3), shape).measure(LABEL, seconds=0.2, settle_seconds=0.1),
            )

    with live_server(config) as client:
        window, base = asyncio.run(measure(str(client.base_url)))
    assert 2 < window.num_adapters <= 8
    assert window.num_requests == sum(window.requests_by_tier.values())
    assert window.requests_by_tier == {tier: count for tier, count in window.counted_by_tier.items() if count}
    assert window.requests_by_tier["disk"] == window.num_loads == window.num_adapters
    assert window.load_seconds_per_request > 0
    assert window.output_tokens_per_second == pytest.approx(6 * window.requests_per_second)
    assert (base.num_adapters, base.requests_by_tier, base.num_loads) == (0, {}, 0)
    assert base.num_requests >= 3


def test_a_refused_request_ends_the_measurement(tmp_path: Path) -> None:
    async def ask(address: str, adapter: str) -> Answer:
        async with aiohttp.ClientSession(address) as session:
            return await BenchServer("scripted", session).ask(adapter, [65] * 8, 4)

    with (
        live_server(server_config(tmp_path)) as client,
        pytest.raises(BenchFailed, match=r"refused a request.*nobody"),
    ):
        asyncio.run(ask(str(client.base_url), "nobody"))


def test_a_server_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    async def start() -> None:
        async with running_server(ServerSettings("no room", tmp_path / "store", pool_bytes=1, host_cache_bytes=0)):
            pass

    with pytest.raises(BenchFailed, match=r"the server with no room did not start:(.|\n)*pool"):
        asyncio.run(start())


# The whole of it.


def quick_bench(folder: Path) -> subprocess.Popen[str]:
    """`heddle bench adapters --quick` with its temporary files in `folder`."""
    (folder / "temporary").mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "heddle_server", "bench", "adapters", "--quick", "--json", str(folder / "bench.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder / "temporary"), "COLUMNS": "160"},
    )


def test_the_quick_form_agrees_with_itself(tmp_path: Path) -> None:
    bench = quick_bench(tmp_path)
    output, errors = bench.communicate(timeout=240)
    assert bench.returncode == 0, errors
    results = json.loads((tmp_path / "bench.json").read_text())
    last_line = json.loads(output.splitlines()[-1])
    assert last_line == {name: value for name, value in results.items() if name != "windows"}
    assert results["schema_version"] == 1
    assert results["machine"]["cores"] == os.cpu_count()
    assert "Figures of this machine" in output

    rows = [(row["label"]["num_registered"], row["label"]["arm"]) for row in results["table"]]
    assert rows == [(n, popularity) for n in (5, 200) for popularity in ("uniform", "zipf 1.0", "power 0.3")]
    windows = results["windows"]
    assert len(windows) == 6 + 2 * 2 + 2 * 2 + 4
    for window in windows:
        assert window["num_requests"] > 0, window
        assert window["num_steps"] > 0, window
        if window["label"]["section"] == "base_only":
            assert window["requests_by_tier"] == {}, window
            assert window["num_loads"] == 0, window
        else:
            assert sum(window["requests_by_tier"].values()) == window["num_requests"], window
            counted = {tier: count for tier, count in window["counted_by_tier"].items() if count}
            assert counted == window["requests_by_tier"], window
        assert (window["num_loads"] == 0) == (window["loaded_bytes"] == 0), window
        assert 0 < window["num_segments"] / window["num_steps"] <= 4, window

    resident = [w for w in windows if w["label"]["arm"] == "all resident"]
    assert all(set(window["requests_by_tier"]) == {"device"} for window in resident)
    small = {row["summary"]["label"]["arm"]: row["summary"] for row in results["small_pool"]}
    assert small["200 in use"]["num_loads"] > 0
    assert small["200 in use"]["loaded_bytes_per_request"] > small["24 in use"]["loaded_bytes_per_request"]
    assert results["floor"]["floor_seconds"] < results["floor"]["measured_step_seconds"]
    assert not list((tmp_path / "temporary").glob("heddle-*")), "the stores are gone"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_leaves_nothing_behind(tmp_path: Path, stop: signal.Signals) -> None:
    bench = quick_bench(tmp_path)
    deadline = time.monotonic() + 150
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    if not children.exists():
        bench.kill()
        bench.communicate()
        pytest.skip("needs /proc")
    while not (servers := children.read_text().split()):
        assert bench.poll() is None, bench.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.send_signal(stop)
    _, errors = bench.communicate(timeout=150)
    assert bench.returncode != 0
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{server}").exists() for server in servers)
    assert not list((tmp_path / "temporary").glob("heddle-*"))
