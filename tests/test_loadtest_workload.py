"""What is asked of whom: the same for the same seed, and fair to every adapter."""

from collections import Counter
from pathlib import Path

import pytest

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload import BUILTIN_PROMPTS, Workload, read_prompts

ADAPTERS = ("base", "poet", "clerk")


def test_same_seed_asks_the_same() -> None:
    first, second = (Workload(ADAPTERS, BUILTIN_PROMPTS, seed=5) for _ in range(2))
    assert [first.ask(index) for index in range(50)] == [second.ask(index) for index in range(50)]


def test_other_seed_asks_otherwise() -> None:
    first, second = (Workload(ADAPTERS, BUILTIN_PROMPTS, seed=seed) for seed in (5, 6))
    assert [first.ask(index).prompt for index in range(50)] != [second.ask(index).prompt for index in range(50)]


def test_adapters_take_turns_and_get_the_same_prompts() -> None:
    workload = Workload(ADAPTERS, BUILTIN_PROMPTS, seed=0)
    asks = [workload.ask(index) for index in range(3 * len(BUILTIN_PROMPTS))]
    assert tuple(ask.adapter for ask in asks[:3]) == ADAPTERS
    for adapter in ADAPTERS:
        prompts = [ask.prompt for ask in asks if ask.adapter == adapter]
        assert prompts == [ask.prompt for ask in asks if ask.adapter == "base"]
        assert Counter(prompts) == Counter(BUILTIN_PROMPTS)
    assert len({ask.seed for ask in asks}) == len(asks)


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Wie geht's?\n\n  Why?  \n", encoding="utf-8")
    assert read_prompts(path) == ("Wie geht's?", "Why?")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_file_without_prompts_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"prompts_file .*prompts\.txt"):
        read_prompts(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
