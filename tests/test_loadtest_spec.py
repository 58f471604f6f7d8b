"""Bad settings are refused by name; durations are read as people write them."""

from typing import Any

import pytest

from heddle_loadtest.duration import parse_duration_seconds
from heddle_loadtest.errors import SpecError
from heddle_loadtest.spec import ClosedLoopSpec

GOOD: dict[str, Any] = {"target": "http://127.0.0.1:8000", "num_requests": 1}


@pytest.mark.parametrize("target", ["http://localhost", "https://example.org:8443/v1", "http://[::1]:8000"])
def test_good_targets_are_taken(target: str) -> None:
    assert ClosedLoopSpec(**GOOD | {"target": target}).target == target


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", "localhost:8000"),
        ("target", "http://"),
        ("target", "http://host:port"),
        ("target", "http://[::1"),
        ("target", "http://me:secret@host"),
        ("num_streams", 0),
        ("max_tokens", 0),
        ("num_requests", 0),
        ("duration_seconds", 0.0),
        ("duration_seconds", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("seed", -1),
        ("num_warmup_requests", -1),
        ("timeout_seconds", float("inf")),
        ("adapters", ()),
        ("adapters", ("poet", " ")),
        ("prompts", ("",)),
    ],
)
def test_bad_setting_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(SpecError) as caught:
        ClosedLoopSpec(**GOOD | {field: value})
    assert caught.value.field == field
    assert "secret" not in str(caught.value)


def test_run_without_an_end_is_refused() -> None:
    with pytest.raises(SpecError, match="no end"):
        ClosedLoopSpec(target="http://127.0.0.1:8000")


def test_key_is_not_shown() -> None:
    assert "sk-secret" not in repr(ClosedLoopSpec(**GOOD, api_key="sk-secret"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("5s", 5.0), ("5", 5.0), ("1.5m", 90.0), ("2h", 7200.0), (" 3 s ", 3.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "1,5s", "nan", "1e3", "9" * 400])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a duration|too long"):
        parse_duration_seconds(text)
