"""Durations are read as people write them."""

import pytest

from heddle_loadtest.duration import parse_duration_seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("5s", 5.0), ("5", 5.0), ("1.5m", 90.0), ("2h", 7200.0), (" 3 s ", 3.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "1,5s", "nan", "1e3", "9" * 400])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a duration|too long"):
        parse_duration_seconds(text)
