"""Which names, aliases and references are taken, and what a wrong one is told."""

from __future__ import annotations

import random
import time

import pytest

from heddle_adapters.errors import InvalidAdapterName
from heddle_adapters.names import AdapterReference, check_alias, check_name, nearest_names

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    "name",
    [
        *("a", "7", "pirate", "Pirate.v2", "a-b_c.d", "x" * 96, "based", "base2", "a..b", "latest", "my-versions"),
        *("team/sql", "7/7", "team/base", "base/sql", "versions/sql", "x" * 96 + "/" + "y" * 96),
    ],
)
def test_takes(name: str) -> None:
    check_name(name)
    assert AdapterReference.parse(name) == AdapterReference(name, None)


@pytest.mark.parametrize(
    "name",
    [
        "",
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
        "a@1",
        "/a",
        "a/",
        "a//b",
        "a/b/c",
        "a/../b",
        "a/.b",
        "x" * 97 + "/a",
        "a/" + "x" * 97,
    ],
)
def test_refuses_and_says_what_is_allowed(name: str) -> None:
    with pytest.raises(InvalidAdapterName, match="1 to 96 letters, digits") as caught:
        check_name(name)
    assert caught.value.param == "name"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["base", "Base", "BASE", "versions", "team/versions", "aliases", "team/aliases"])
def test_reserves_the_base_and_what_routes_end_with(name: str) -> None:
    for take in (check_name, AdapterReference.parse):
        with pytest.raises(InvalidAdapterName, match="reserved"):
            take(name)


@pytest.mark.parametrize("alias", ["prod", "P", "v3", "blue-green_2.0", "latest2", "x" * 96, "a" * 63, "ffff"])
def test_takes_the_alias(alias: str) -> None:
    check_alias(alias)
    assert AdapterReference.parse(f"team/sql@{alias}") == AdapterReference("team/sql", alias)


@pytest.mark.parametrize(
    "alias",
    [
        *("", "3", "3a", "-", ".x", "a/b", "a@b", "a:b", "a,b", "a\n", "x" * 97, "ä", "latest", "Latest"),
        *(DIGEST, "sha256", "SHA256.x", "a" * 64, "F" * 64),
    ],
)
def test_refuses_the_alias(alias: str) -> None:
    with pytest.raises(InvalidAdapterName, match="alias") as caught:
        check_alias(alias)
    assert caught.value.param == "alias"


@pytest.mark.parametrize("selector", ["1", "42", "9" * 18, "latest", "prod", DIGEST])
def test_reads_the_selector(selector: str) -> None:
    assert AdapterReference.parse(f"sql@{selector}") == AdapterReference("sql", selector)


@pytest.mark.parametrize(
    "selector", ["", "0", "01", "-1", "1.5", "9" * 19, "٣", "prod@1", "sha256:0", DIGEST.upper(), DIGEST + "\n", "a b"]
)
def test_refuses_the_selector(selector: str) -> None:
    with pytest.raises(InvalidAdapterName, match="after '@' comes a version number, an alias or") as caught:
        AdapterReference.parse(f"sql@{selector}")
    assert caught.value.param == "name"


def test_nearest_names() -> None:
    known = ("pirate", "french", "json", "capitals", "team/sql")
    assert nearest_names("pirat", known) == ("pirate",)
    assert nearest_names("team/sqll", known) == ("team/sql",)
    assert nearest_names("PIRATE/x/y", known) == ()
    assert nearest_names("zzzz", known) == ()
    assert len(nearest_names("adapter-1", [f"adapter-{number}" for number in range(10_000)])) == 3


@pytest.mark.parametrize("num_chars", [5, 14, 96])
def test_a_wrong_name_takes_no_long_time(num_chars: int) -> None:
    source = random.Random(0)
    known = ["".join(source.choices("abc", k=num_chars)) for _ in range(10_000)]
    started = time.perf_counter()
    nearest_names("".join(source.choices("abc", k=num_chars)), known)
    assert time.perf_counter() - started < 0.2
