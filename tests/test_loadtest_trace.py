"""Importers: lines as the published files have them, and every way in which a line can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heddle_loadtest.commands.trace import trace as trace_command
from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.trace import TraceEntry, read_trace
from heddle_loadtest.workload.trace_figures import trace_figures

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
50,ChatGPT,0,0,0,Conversation log
118.5,GPT-4,417,276,693,API log
"""
BURSTGPT_3 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
10,,1.25,ChatGPT,7,8,15,API log
11,4711,3.5,GPT-4,9,10,19,Conversation log
"""
AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9799600,4808,10
2023-11-17 00:00:00.0319610,3180,8
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-12 00:00:00.001163+00:00,1452,3
2024-05-12 00:00:01+00:00,584,3
2024-05-12 02:00:01.5+02:00,7,104
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}
{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 47], "more": true}
"""


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "trace"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "format", "expected"),
    [
        (BURSTGPT, "burstgpt", [(0.0, 472, 18), (40.0, 1087, 230), (113.5, 417, 276)]),
        (BURSTGPT_3, "burstgpt", [(0.0, 7, 8), (1.0, 9, 10)]),
        (AZURE_2023, "azure", [(0.0, 4808, 10), (0.052001, 3180, 8)]),
        (AZURE_2024, "azure", [(0.0, 1452, 3), (0.998837, 584, 3), (1.498837, 7, 104)]),
        (MOONCAKE, "mooncake", [(0.0, 6955, 52, (46, 47, 2353)), (3.053, 6472, 26, (46, 47))]),
    ],
)
def test_published_formats(tmp_path: Path, content: str, format: str, expected: list[tuple[float, int, int]]) -> None:
    path = written(tmp_path, content)
    assert read_trace(path, format) == read_trace(path) == tuple(TraceEntry(*values) for values in expected)


def test_blank_lines_byte_order_marks_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    plain = read_trace(written(tmp_path, AZURE_2023))
    content = b"\xef\xbb\xbf\r\n" + AZURE_2023.replace("\n", "\r\n\r\n").encode()
    assert read_trace(written(tmp_path, content)) == plain


def test_a_prompt_of_no_tokens_counts_as_one(tmp_path: Path) -> None:
    path = written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 00:00:00,0,5\n")
    assert read_trace(path) == (TraceEntry(0.0, 1, 5),)


def test_time_starts_at_the_first_request_that_got_an_answer(tmp_path: Path) -> None:
    content = "Timestamp,Request tokens,Response tokens\n1,5,0\n7,5,1\n9,5,1\n"
    assert [entry.at_seconds for entry in read_trace(written(tmp_path, content))] == [0.0, 2.0]


def test_lines_a_little_out_of_order_are_sorted(tmp_path: Path) -> None:
    content = "Timestamp,Request tokens,Response tokens\n70,1,1\n90,2,1\n31,3,1\n90,4,1\n"
    entries = read_trace(written(tmp_path, content))
    assert [(entry.at_seconds, entry.num_prompt_tokens) for entry in entries] == [(0, 3), (39, 1), (59, 2), (59, 4)]


def test_reading_stops_after_as_many_requests_as_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, BURSTGPT + "damaged from here on\n")
    assert len(read_trace(path, num_requests=3)) == 3
    with pytest.raises(SpecError, match="line 6 has 1 columns"):
        read_trace(path)


HEADER = "Timestamp,Model,Request tokens,Response tokens\n"
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (HEADER, "holds no request"),
        (HEADER + "5,m,7,0\n", "holds no request"),
        ("a,b,c\n1,2,3\n", "line 1 is of no known format: 'a,b,c'"),
        ("Timestamp,Request tokens\n5,7\n", "line 1 lacks the column 'Response tokens'"),
        (HEADER + "5,m,7\n", "line 2 has 3 columns, the header has 4"),
        (HEADER + "5,m,7,8\n6,m,-3,8\n", "line 3, column 'Request tokens': -3 is not from 0 to 1,000,000 tokens"),
        (HEADER + "5,m,7,1000001\n", "line 2, column 'Response tokens': 1000001 is not from 0"),
        (HEADER + "5,m,7.5,8\n", "line 2, column 'Request tokens': '7.5' is no number of tokens"),
        (HEADER + f"5,m,{'9' * 5000},8\n", "column 'Request tokens': '999.*…' is no number"),
        (HEADER + "5,m,,8\n", "column 'Request tokens': '' is no number"),
        (HEADER + "soon,m,7,8\n", "line 2, column 'Timestamp': 'soon' is no number of seconds"),
        (HEADER + "-1,m,7,8\n", "column 'Timestamp': '-1' is not from 0"),
        (HEADER + "nan,m,7,8\n", "column 'Timestamp': 'nan' is not from 0"),
        (HEADER + "inf,m,7,8\n", "column 'Timestamp': 'inf' is not from 0"),
        (HEADER + "1e30,m,7,8\n", "column 'Timestamp': '1e30' is not from 0"),
        (HEADER + "500,m,7,8\n5,m,7,8\n", "line 3 is 495 seconds earlier than a line before it"),
        (AZURE_HEADER + "16 Nov 2023,1,1\n", "line 2, column 'TIMESTAMP': '16 Nov 2023' is no date and time"),
        ('{"timestamp": 1}\n', "line 1 is malformed: .*`input_length`"),
        (MOONCAKE + '{"timestamp": 1, "input\n', "line 3 is malformed"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', r"line 1 is malformed: .*timestamp"),
        ('{"timestamp": 1, "input_length": 1e9, "output_length": 1}', r"line 1 is malformed: .*input_length"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}', r"malformed: .*hash_ids"),
        (b"Timestamp,Request tokens,Response tokens\n\xff,1,1\n", "line 2 is not UTF-8"),
        (b"x" * (1 << 20 | 1), "line 1 is longer than 1,048,576 bytes"),
        (HEADER.encode() + b"\x00,m,1,1\n", "line 2, column 'Timestamp'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_traces_are_refused_by_file_and_line(tmp_path: Path, content: str | bytes, problem: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(SpecError, match=problem) as raised:
        read_trace(path)
    assert str(path) in str(raised.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(SpecError, match="Is a directory"):
        read_trace(tmp_path)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"format 'sharegpt': is no trace format\. Give one of auto, burstgpt"):
        read_trace(written(tmp_path, BURSTGPT), "sharegpt")


def test_a_trace_of_another_format_than_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="lacks the column 'TIMESTAMP', 'ContextTokens'"):
        read_trace(written(tmp_path, BURSTGPT), "azure")


def test_figures_of_a_trace_counted_by_hand() -> None:
    entries = [
        TraceEntry(0.0, 100, 10, (0, 1)),
        TraceEntry(1.0, 200, 20, (0, 1, 2)),
        TraceEntry(4.0, 300, 60, (9, 1)),
    ]
    figures = trace_figures(entries)
    assert (figures.requests, figures.seconds, figures.rate, figures.gap_cv) == (3, 4.0, 0.5, 0.5)
    assert (figures.prompt_tokens.mean, figures.prompt_tokens.p50, figures.prompt_tokens.max) == (200, 200, 300)
    assert figures.output_tokens.mean == 30
    assert figures.known_block_share == 2 / 7
    assert trace_figures(entries[:1]).rate is None


def test_show_prints_the_figures_last_as_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(trace_command, ["show", str(written(tmp_path, MOONCAKE))])
    assert result.exit_code == 0
    figures = json.loads(result.stdout.splitlines()[-1])
    assert (figures["requests"], figures["seconds"], figures["prompt_tokens"]["max"]) == (2, 3.053, 6955)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere.csv"], "error: trace 'nowhere.csv': No such file"),
        (["show", "nowhere.csv", "--format", "x"], "error: --format 'x': is no trace format"),
        (["make", "alpaca", "--out", "t"], "error: --kind 'alpaca'"),
        (["make", "mooncake", "--out", "no/where", "--requests", "3"], "error: --out 'no/where': No such file"),
        (["make", "mooncake", "--out", "t", "--requests", "0"], "error: --requests '0': is not from 1"),
        (["make", "mooncake", "--out", "t", "--seed", "-1"], "error: --seed '-1': is below 0"),
    ],
)
def test_the_command_refuses_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(trace_command, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message.replace("--kind", "kind"))
    assert list(tmp_path.iterdir()) == []
