"""PEFT's `rank_pattern` and `alpha_pattern` without a regular expression engine.

PEFT takes the first key of the map for which `re.match(rf"(.*\\.)?({key})$", module)` (peft 0.21,
`utils/other.py:get_pattern_key`). An uploaded expression can hang a process, so only keys that spell a module path or
the end of one are taken: dots, plain or escaped, mean dots, and `^` and `$` may stand at the ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

LITERAL_KEY = re.compile(r"(?P<start>\^?)(?P<path>[A-Za-z0-9_-]+(?:\\?\.[A-Za-z0-9_-]+)*)\$?")


@dataclass(frozen=True)
class LiteralKey:
    """A key that needs no regular expression engine."""

    path: str
    is_whole_path: bool  # it began with ^

    @classmethod
    def parse(cls, key: str) -> LiteralKey | None:
        """None if the key is more than a module path."""
        match = LITERAL_KEY.fullmatch(key)
        return match and cls(match["path"].replace("\\.", "."), bool(match["start"]))


@dataclass(frozen=True)
class ModulePattern:
    """Values for some modules; in the file's order, which decides between keys that both match."""

    values: Mapping[LiteralKey, float]

    def value_for(self, module: str, default: float) -> float:
        candidates = [LiteralKey(module, is_whole_path=True)]
        candidates += (LiteralKey(ending, is_whole_path=False) for ending in path_endings(module))
        first = min((key for key in candidates if key in self.values), key=self._positions.__getitem__, default=None)
        return default if first is None else self.values[first]

    @cached_property
    def _positions(self) -> Mapping[LiteralKey, int]:
        return {key: position for position, key in enumerate(self.values)}


def path_endings(module: str) -> Iterator[str]:
    """The module path, then what is left of it after each dot: "a.b.c", "b.c", "c"."""
    while module:
        yield module
        _, _, module = module.partition(".")
