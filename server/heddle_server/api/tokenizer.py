"""A base's own tokenizer, read from its folder: text to token ids and back, without transformers."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from heddle_server.config import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """`tokenizer.json` with the special tokens that the folder's config files name."""

    def __init__(self, model_path: Path) -> None:
        path = model_path / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{model_path} has no tokenizer.json. Save it with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) into the same folder."
            )
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}") from error
        self.fast.no_truncation()
        self.fast.no_padding()
        self.config = _read_json(model_path / "tokenizer_config.json")
        self.special_tokens = _special_tokens(self.config, _read_json(model_path / "special_tokens_map.json"))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; a rendered chat template brings its own special tokens."""
        ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, usually without special tokens."""
        return str(self.fast.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """One token alone, special tokens included; a piece of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for: whole characters or a piece of one."""
        token = self.fast.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_ids:
            return str(token).encode()
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if self._is_byte_level:
            return bytes(_BYTES_BY_CHARACTER.get(character, 0x3F) for character in token)
        return str(token).replace("\u2581", " ").encode()  # the mark for a space in sentencepiece vocabularies

    @cached_property
    def special_token_ids(self) -> dict[str, int]:
        """Tokens that stand for no text, by how they are written."""
        added = self.fast.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.fast.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.fast.to_str()).get("decoder"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return content


def _special_tokens(*configs: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... as text; a config may hold the text or an object around it."""
    tokens: dict[str, str] = {}
    for config in configs:
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
            value = config.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens.setdefault(name, text)
    return tokens


def _bytes_by_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where it is one, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES_BY_CHARACTER = _bytes_by_character()
