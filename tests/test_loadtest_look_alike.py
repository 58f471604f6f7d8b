"""Look-alikes: read back as written, and close to the figures that the published traces have."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heddle_loadtest.commands.trace import trace as trace_command
from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.look_alike import LOOK_ALIKES, make_look_alike, write_trace
from heddle_loadtest.workload.trace import TraceEntry, read_trace
from heddle_loadtest.workload.trace_figures import TraceFigures, trace_figures

NUM_REQUESTS = 20_000


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_the_importer_reads_back_what_was_written(tmp_path: Path, kind: str) -> None:
    entries = make_look_alike(kind, 500, seed=3)
    format = kind.partition("-")[0]
    write_trace(entries, format, tmp_path / "trace")
    assert read_trace(tmp_path / "trace") == read_trace(tmp_path / "trace", format) == tuple(entries)


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_the_seed_decides(kind: str) -> None:
    assert make_look_alike(kind, 50, 1) == make_look_alike(kind, 50, 1) != make_look_alike(kind, 50, 2)


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_times_start_at_zero_and_never_go_back(kind: str) -> None:
    times = [entry.at_seconds for entry in make_look_alike(kind, 2000, 7)]
    assert times[0] == 0
    assert times == sorted(times)


# What the published files say of themselves, independently of the percentiles that the look-alikes are drawn from:
# requests per second, cv of the gaps, mean prompt, median prompt, mean answer, median answer.
PUBLISHED = {
    "burstgpt": (0.266, None, 621, None, 126, None),  # README; means second-hand
    "azure-code": (2.57, 13.2, 2048, 1469, 28, 13),
    "azure-conv": (5.53, 1.09, 1155, 1020, 211, 129),
    "mooncake": (3.40, 3.03, 12035, 6909, 343, 350),  # means: FAST25-release/README.md
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_look_alike_has_the_published_figures(kind: str) -> None:
    figures = trace_figures(make_look_alike(kind, NUM_REQUESTS, 0))
    rate, gap_cv, mean_prompt, median_prompt, mean_answer, median_answer = PUBLISHED[kind]
    assert figures.rate == pytest.approx(rate, rel=0.15)  # a pause of 43 s is rare, so the rate of one trace varies
    assert gap_cv is None or figures.gap_cv == pytest.approx(gap_cv, rel=0.1)
    assert figures.prompt_tokens.mean == pytest.approx(mean_prompt, rel=0.1)
    assert figures.output_tokens.mean == pytest.approx(mean_answer, rel=0.2)
    assert median_prompt is None or figures.prompt_tokens.p50 == pytest.approx(median_prompt, rel=0.1)
    assert median_answer is None or figures.output_tokens.p50 == pytest.approx(median_answer, rel=0.1)


def test_mooncake_prompts_share_prefixes_as_the_trace_does() -> None:
    entries = make_look_alike("mooncake", NUM_REQUESTS, 0)
    assert all(len(entry.hash_ids) == math.ceil(entry.num_prompt_tokens / 512) for entry in entries)
    assert {entry.hash_ids[0] for entry in entries} == {0}
    assert shares(entries) == pytest.approx(0.366, abs=0.03)
    assert {entry.at_seconds % 3 for entry in entries} == {0}


def shares(entries: list[TraceEntry]) -> float:
    share = trace_figures(entries).known_block_share
    assert share is not None
    return share


def test_the_same_hash_id_always_follows_the_same_ids() -> None:
    """What makes it the hash of a prefix."""
    before: dict[int, tuple[int, ...]] = {}
    for entry in make_look_alike("mooncake", 2000, 5):
        for index, hash_id in enumerate(entry.hash_ids):
            assert before.setdefault(hash_id, entry.hash_ids[:index]) == entry.hash_ids[:index]


def test_other_traces_share_nothing() -> None:
    assert trace_figures(make_look_alike("azure-conv", 10, 0)).known_block_share is None


def test_files_look_like_the_published_ones(tmp_path: Path) -> None:
    entries = [TraceEntry(0.0, 374, 44, (0, 1)), TraceEntry(4.5, 396, 109, (0, 2))]
    for format in ("burstgpt", "azure", "mooncake"):
        write_trace(entries, format, tmp_path / format)
    assert (tmp_path / "burstgpt").read_text().splitlines()[1:] == [
        "0,ChatGPT,374,44,418,Conversation log",
        "4.5,ChatGPT,396,109,505,Conversation log",
    ]
    assert (tmp_path / "azure").read_text().splitlines()[2] == "2023-11-16 00:00:04.5000000,396,109"
    line = json.loads((tmp_path / "mooncake").read_text().splitlines()[1])
    assert line == {"timestamp": 4500, "input_length": 396, "output_length": 109, "hash_ids": [0, 2]}


def test_unknown_kinds_and_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Give one of burstgpt, azure-code, azure-conv, mooncake"):
        make_look_alike("azure", 5, 0)
    with pytest.raises(SpecError, match="Give one of burstgpt, azure, mooncake"):
        write_trace([], "csv", tmp_path / "trace")


def test_the_command_makes_a_file_and_prints_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "trace.jsonl"
    result = CliRunner().invoke(trace_command, ["make", "mooncake", "--requests", "40", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures.keys() == set(TraceFigures.__struct_fields__)
    assert figures["requests"] == len(read_trace(out)) == 40
