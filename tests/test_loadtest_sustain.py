"""The highest sustainable rate, on a server whose rate is known."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from heddle_loadtest.cli import app
from heddle_loadtest.mock.process import MockProcess
from heddle_loadtest.mock.settings import MockSettings

NUM_TOKENS = 6
SPEC = (
    "punica-fig11",
    *("--variant", "base"),
    *("--set", "arrivals={kind: constant, rate: 1}"),
    *("--set", f"output.tokens={NUM_TOKENS}"),
    *("--set", "slo.ttft_seconds=0.4"),
)


def sustain(url: str, *options: str) -> tuple[int, str, dict[str, object]]:
    result = CliRunner().invoke(app, ["sustain", *SPEC, "--target", url, "--seconds", "2s", *options])
    lines = result.stdout.splitlines()
    return result.exit_code, result.output, json.loads(lines[-1]) if lines else {}


def test_it_finds_what_the_server_can_do() -> None:
    """Two requests at a time of 0.1 s each are 20 a second; at 25 the queue is 0.4 s long after 1.6 s."""
    settings = MockSettings(ttft_seconds=0.05, itl_seconds=0.01, capacity=2)
    assert settings.sustainable_rate(NUM_TOKENS) == pytest.approx(20)
    with MockProcess(settings) as mock:
        status, output, line = sustain(mock.url, "--low", "6", "--high", "96", "--within", "0.2")
    assert status == 0, output
    found = line["sustained_requests_per_second"]
    assert isinstance(found, float)
    assert 14 <= found <= 27, output  # constant arrivals over 2 s: a rate a little above 20 is survived for so long
    assert f"sustained: {found:.2f} requests/s" in output


def test_it_says_when_even_the_lowest_rate_is_too_much() -> None:
    with MockProcess(MockSettings(ttft_seconds=0.6, itl_seconds=0.0)) as mock:
        status, output, line = sustain(mock.url, "--low", "2", "--high", "4")
    assert status == 1
    assert line["sustained_requests_per_second"] is None
    assert "not even the lowest rate is sustained" in output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--low", "0"), "low"),
        (("--low", "8", "--high", "4"), "--high"),
        (("--share", "2"), "share"),
        (("--within", "0"), "within"),
        (("--seconds", "soon"), "no duration"),
        (("--set", "slo=null"), "slo: is missing"),
        (("--set", "arrivals={kind: closed, streams: 2}"), "no rate"),
    ],
)
def test_bad_input_is_told_before_anything_is_sent(options: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["sustain", *SPEC, "--target", "http://127.0.0.1:9", *options])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
