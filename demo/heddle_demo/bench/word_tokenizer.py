"""A tokenizer for a base of random weights: every token is a word, so that any answer is text and lengths are exact."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from heddle_loadtest.workload.prompts import WORDS

SPECIAL = ("<unk>", "<s>", "</s>")  # their numbers are what `ModelShape.config` says
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write_word_tokenizer(folder: Path, vocabulary_size: int) -> None:
    """tokenizer.json, its config and a chat template that adds nothing.

    Knows the words that the load generator asks with; the other numbers are words without a meaning.
    """
    words = [*SPECIAL, *WORDS]
    words += [f"w{number}" for number in range(len(words), vocabulary_size)]
    vocabulary = {word: number for number, word in enumerate(words[:vocabulary_size])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
