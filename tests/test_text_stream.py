"""Token ids to text: characters and stop strings split over tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from byte_tokenizer import EOS, EOS_ID, save_tokenizer
from heddle_server.api.text_stream import TextStream
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.config import ConfigError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary of the sentencepiece kind: a mark for spaces, bytes for what it lacks."""
    tokenizer = FastTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False, vocab_size=300
    )
    tokenizer.train_from_iterator(["hello world of looms and threads " * 5], trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:1]  # the trainer's way in makes bytes special: undo it
    folder = tmp_path_factory.mktemp("words")
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return Tokenizer(folder)


def pieces(stream: TextStream, token_ids: list[int]) -> list[str]:
    """What each token made certain, and what came at the end."""
    return [*(stream.push([token_id]) for token_id in token_ids), stream.finish()]


def test_emoji_and_accents_come_whole(tokenizer: Tokenizer) -> None:
    text = "a🧵é👩‍👩‍👧漢"
    increments = pieces(TextStream(tokenizer), list(text.encode()))
    assert "".join(increments) == text
    assert "\ufffd" not in "".join(increments)
    assert increments[:6] == ["a", "", "", "", "🧵", ""]


def test_an_unfinished_character_is_told_at_the_end(tokenizer: Tokenizer) -> None:
    assert pieces(TextStream(tokenizer), [*b"ok", 0xF0, 0x9F]) == ["o", "k", "", "", "\ufffd"]


def test_bytes_that_are_no_text_lose_nothing_after_them(tokenizer: Tokenizer) -> None:
    token_ids = [0xFF, 0xFE, *b"ok", 0xC3, *b"!"]
    text = "".join(pieces(TextStream(tokenizer), token_ids))
    assert text.replace("\ufffd", "") == "ok!"


def test_special_tokens_and_foreign_ids_are_no_text(tokenizer: Tokenizer) -> None:
    assert "".join(pieces(TextStream(tokenizer), [*b"a", EOS_ID, 5000, *b"b"])) == "ab"


def test_a_stop_string_split_over_tokens(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP"])
    assert [stream.push([token_id]) for token_id in b"go ST"] == ["g", "o", " ", "", ""]
    assert stream.push(list(b"OP and more")) == ""
    assert stream.is_stopped
    assert stream.push(list(b"x")) == ""
    assert stream.finish() == ""


def test_the_beginning_of_a_stop_string_is_not_lost(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP", "\n\n"])
    assert pieces(stream, list(b"STO STOx\n")) == ["", "", "", "STO ", "", "", "", "STOx", "", "\n"]
    assert not stream.is_stopped


def test_the_first_of_several_stop_strings_wins(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["cd", "bc"])
    assert stream.push(list(b"abcd")) == "a"
    assert stream.is_stopped


def test_a_stop_string_of_split_characters(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["🧵!"])
    assert "".join(stream.push([token_id]) for token_id in "a🧵?🧵!b".encode()) == "a🧵?"
    assert stream.is_stopped


def test_overlapping_beginnings(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["aab"])
    assert "".join(stream.push([token_id]) for token_id in b"aaab") == "a"
    assert stream.is_stopped


def test_spaces_of_sentencepiece_vocabularies(words: Tokenizer) -> None:
    token_ids = words.encode("hello world", add_special_tokens=False)
    alone, continued = TextStream(words), TextStream(words, continued_token_ids=token_ids)
    assert "".join(pieces(alone, token_ids)) == "hello world"
    assert "".join(pieces(continued, token_ids)) == " hello world"


def test_byte_tokens_of_sentencepiece_vocabularies(words: Tokenizer) -> None:
    token_ids = words.encode("hello 🧵", add_special_tokens=False)
    assert "".join(pieces(TextStream(words), token_ids)) == "hello 🧵"
    assert b"".join(words.token_bytes(token_id) for token_id in token_ids) == " hello 🧵".encode()


def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    assert b"".join(tokenizer.token_bytes(byte) for byte in range(256)) == bytes(range(256))
    assert tokenizer.token_text(EOS_ID) == EOS
    assert tokenizer.token_bytes(5000) == b""


def test_a_missing_tokenizer_is_told_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*save_pretrained"):
        Tokenizer(tmp_path)
