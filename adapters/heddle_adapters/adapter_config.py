"""Reads adapter_config.json: an uploaded object whose every meaningful key is either understood or refused.

Field names and defaults are PEFT's (peft 0.21, `tuners/*/config.py`). No value in it is ever run as a regular
expression, imported, fetched or opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from heddle_adapters.bounded_json import Json, parse_object
from heddle_adapters.errors import InvalidAdapter, listed, quoted
from heddle_adapters.module_pattern import LiteralKey, ModulePattern

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20
MAX_CONFIG_MEMBERS = 16_384
MAX_MODULE_PATHS = 16_384
MAX_PATH_CHARS = 512  # matching a path takes memory for each of its parts

# Fields of every method that change nothing about what the tensors compute. Which modules an adapter changes is read
# from its tensors' names; `auto_mapping` names Python classes, which nothing here imports.
DESCRIPTIVE_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "heddle_base_fingerprint",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)


@dataclass(frozen=True)
class AdapterConfig:
    """The uploaded fields, behind readers that check type and range and name the field when they refuse."""

    fields: Mapping[str, Json]

    @classmethod
    def parse(cls, data: bytes) -> AdapterConfig:
        """Raises `InvalidAdapter` unless `data` is a bounded JSON object with a `peft_type`."""
        if len(data) > MAX_CONFIG_BYTES:
            message = f"{CONFIG_FILE} is {len(data)} bytes long; at most {MAX_CONFIG_BYTES} are allowed."
            raise InvalidAdapter(message, param=CONFIG_FILE)
        fields = parse_object(data, what=CONFIG_FILE, param=CONFIG_FILE, max_members=MAX_CONFIG_MEMBERS)
        return cls(fields)

    def refuse(self, field: str, problem: str) -> NoReturn:
        """Raises `InvalidAdapter` about one field; `problem` says what is wrong and what to do."""
        raise InvalidAdapter(f"{CONFIG_FILE}: {field} {problem}", param=CONFIG_FILE)

    def check_fields(self, *, read: frozenset[str], harmless: frozenset[str], refused: Mapping[str, str]) -> None:
        """Refuses every set field that the method neither reads nor knows to be harmless.

        `refused` maps fields that the method knows and does not serve to what is to be said about them.
        """
        set_fields = [name for name, value in self.fields.items() if value]
        for name in set_fields:
            if name in refused:
                self.refuse(name, refused[name])
        unknown = [quoted(name) for name in set_fields if name not in read | harmless | DESCRIPTIVE_FIELDS]
        if unknown:
            self.refuse(listed(unknown), "is set, and this server does not know what it means; unset it or retrain.")

    def text(self, field: str) -> str | None:
        value = self.fields.get(field)
        if value is not None and not isinstance(value, str):
            self.refuse(field, f"must be a string, not {quoted(value)}.")
        return value

    def flag(self, field: str) -> bool:
        value = self.fields.get(field)
        if value is not None and not isinstance(value, bool):
            self.refuse(field, f"must be true or false, not {quoted(value)}.")
        return bool(value)

    def number(self, field: str, default: float) -> float:
        return self._number(field, self.fields.get(field, default))

    def rank(self, field: str, default: int) -> int:
        return self._rank(field, self.fields.get(field, default))

    def module_paths(self, field: str) -> tuple[str, ...]:
        """A list of module path endings; a string there is a regular expression of PEFT's, which is refused."""
        value = self.fields.get(field)
        if isinstance(value, str):
            self.refuse(
                field, "is a regular expression, and uploaded ones are never run; list the module names instead."
            )
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > MAX_MODULE_PATHS:
            self.refuse(field, f"must be a list of at most {MAX_MODULE_PATHS} module names, not {quoted(value)}.")
        return tuple(item if isinstance(item, str) else self.refuse(field, "must hold strings only.") for item in value)

    def rank_pattern(self, field: str) -> ModulePattern:
        return self._pattern(field, self._rank)

    def number_pattern(self, field: str) -> ModulePattern:
        return self._pattern(field, self._number)

    def _pattern(self, field: str, read: Callable[[str, Json], float]) -> ModulePattern:
        value = self.fields.get(field)
        if not value:
            return ModulePattern({})
        if not isinstance(value, dict):
            self.refuse(field, f"must be an object from module names to numbers, not {quoted(value)}.")
        values: dict[LiteralKey, float] = {}
        for key, item in value.items():
            # Keys that differ as text can be one as paths; PEFT takes the first.
            values.setdefault(self._literal_key(field, key), read(f"{field}[{quoted(key)}]", item))
        return ModulePattern(values)

    def _literal_key(self, field: str, key: str) -> LiteralKey:
        if len(key) > MAX_PATH_CHARS:
            self.refuse(f"{field} key {quoted(key)}", f"is over {MAX_PATH_CHARS} characters long; write module paths.")
        return LiteralKey.parse(key) or self.refuse(
            f"{field} key {quoted(key)}",
            "is a regular expression, and uploaded ones are never run; write one key per module path or ending.",
        )

    def _number(self, field: str, value: Json) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(field, f"must be a number, not {quoted(value)}.")
        return float(value)

    def _rank(self, field: str, value: Json) -> int:
        if type(value) is not int or value < 1:
            self.refuse(field, f"must be a whole number of at least 1, not {quoted(value)}.")
        return value
