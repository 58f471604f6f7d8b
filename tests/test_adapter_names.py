"""Which adapter names are taken, and what a wrong one is told."""

from __future__ import annotations

import pytest

from heddle_adapters.errors import InvalidAdapterName
from heddle_adapters.names import check_name, nearest_names


@pytest.mark.parametrize("name", ["a", "7", "pirate", "Pirate.v2", "a-b_c.d", "x" * 96, "based", "base2", "a..b"])
def test_takes(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "a,b",
        "../a",
        ".hidden",
        "-r",
        "_a",
        "a b",
        "a\n",
        "\n",
        "ä",
        "a\0",
        "x" * 97,
        "a:b",
        "a\\b",
        "%2e",
        "٣",
    ],
)
def test_refuses_and_says_what_is_allowed(name: str) -> None:
    with pytest.raises(InvalidAdapterName, match="1 to 96 letters, digits") as caught:
        check_name(name)
    assert caught.value.param == "name"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["base", "Base", "BASE"])
def test_reserves_the_base(name: str) -> None:
    with pytest.raises(InvalidAdapterName, match="reserved"):
        check_name(name)


def test_nearest_names() -> None:
    known = ("pirate", "french", "json", "capitals")
    assert nearest_names("pirat", known) == ("pirate",)
    assert nearest_names("PIRATE/x", known) == ()
    assert nearest_names("zzzz", known) == ()
    assert len(nearest_names("adapter-1", [f"adapter-{number}" for number in range(10_000)])) == 3
