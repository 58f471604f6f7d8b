"""Token ids to the text of a stream, token by token, and prompts to token ids. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heddle_loadtest.errors import SpecError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NUM_HELD_BACK = 4  # tokens at most: UTF-8 has no longer characters, so more of them are no character
NUM_CONTEXT_TOKENS = 8  # decoded with a new one: a token's text depends on its neighbours (blanks, split characters)


class TokenText:
    """One answer's text. Without a tokenizer every token is its number and a blank.

    Every token makes a piece that is not empty, since a load generator measures the time to the first content that is
    not empty. A token without text of its own (a special one, a part of a character) therefore becomes a replacement
    character; the character itself comes with its last token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # tokens whose text is out, for context, and those held back
        self._num_done = 0  # of them, those whose text is out

    def piece(self, token: int) -> str:
        """What this token adds to the text."""
        if self._tokenizer is None:
            return f"{token} "
        self._pending.append(token)
        before = self._decode(self._pending[: self._num_done])
        text = self._decode(self._pending)[len(before) :]
        is_whole = bool(text) and not text.endswith(REPLACEMENT)
        if not is_whole and len(self._pending) - self._num_done < NUM_HELD_BACK:
            return REPLACEMENT
        self._pending = self._pending[-NUM_CONTEXT_TOKENS:]
        self._num_done = len(self._pending)
        return text or REPLACEMENT

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_tokenizer(base: Path) -> Any:
    """transformers' tokenizer, or None where the folder has none: prompts of token ids need none.

    A tokenizer.json is taken as it is. AutoTokenizer would take a class of the model's family, and Qwen2's makes no
    token at all of a file that is not of its own kind. Raises SpecError if it cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((base / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        kind = PreTrainedTokenizerFast if (base / "tokenizer.json").exists() else AutoTokenizer
        return kind.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        problem = f"transformers cannot load its tokenizer: {error}"
        raise SpecError("base", base, problem, "Repair it, or take its files away to ask by token ids") from error


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt of a chat. Raises ValueError if the template refuses it, or if there is none."""
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise ValueError(str(error)) from error
    return [int(token) for token in ids]
