"""Prompts: as long as asked for, the same for the same seed, with prefixes shared as hash ids say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.prompts import BUILTIN_QUESTIONS, read_questions, token_ids, words, words_of_blocks


def test_builtin_questions_are_all_different() -> None:
    assert len(set(BUILTIN_QUESTIONS)) == len(BUILTIN_QUESTIONS) >= 10


def test_questions_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("  Who?\n\n¿Dónde?\r\nWhen?", encoding="utf-8")
    assert read_questions(path) == ("Who?", "¿Dónde?", "When?")


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "No such file"), (b"\n  \n", "no question"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_file_without_questions_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "questions.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=problem):
        read_questions(path)


@pytest.mark.parametrize("count", [0, 1, 7, 2000])
def test_words_are_as_many_as_asked_for(count: int) -> None:
    text = words(np.random.default_rng(5), count)
    assert len(text.split()) == count
    assert text == words(np.random.default_rng(5), count)
    assert text == " ".join(text.split())


def test_all_words_are_equally_likely() -> None:
    counts = Counter(words(np.random.default_rng(1), 100_000).split())
    assert len(counts) >= 300
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_words_are_plain_ascii_letters() -> None:
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words_of_blocks([1], 512).split())


def test_the_same_hash_ids_are_the_same_text() -> None:
    one, other = words_of_blocks([1, 2, 3], 1500).split(), words_of_blocks([1, 2, 4], 1500).split()
    assert len(one) == len(other) == 1500
    assert one[:1024] == other[:1024]
    assert one[1024:] != other[1024:]


def test_a_block_is_the_same_wherever_it_stands() -> None:
    assert words_of_blocks([9, 5], 1024).split()[512:] == words_of_blocks([5], 512).split()


def test_a_shorter_prompt_is_the_beginning_of_a_longer_one() -> None:
    assert words_of_blocks([3, 8], 1024).startswith(words_of_blocks([3, 8], 700))


def test_blocks_run_on_where_there_are_too_few() -> None:
    text = words_of_blocks([4], 1300).split()
    assert len(text) == 1300
    assert text[:512] == words_of_blocks([4], 512).split()
    assert text[512:1024] != text[:512]


def test_negative_hash_ids_are_ids_like_others() -> None:
    assert words_of_blocks([-7], 512) == words_of_blocks([-7], 512) != words_of_blocks([7], 512)


def test_token_ids_are_uniform_within_their_bounds() -> None:
    ids = token_ids(np.random.default_rng(2), 50_000, 3, 103)
    assert len(ids) == 50_000
    assert (min(ids), max(ids)) == (3, 102)
    assert all(type(token) is int for token in ids)
    assert stats.chisquare(list(Counter(ids).values())).pvalue > 1e-4
