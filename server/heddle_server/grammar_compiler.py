"""Grammars as llguidance compiles them: the same for the process that tries them and the one that answers by them.

A grammar is text as llguidance reads it: a Lark grammar, in which JSON schemas and regular expressions are embedded.
llguidance counts its work in its own units, so that what is refused does not depend on how busy a machine is; the time
and the memory stand behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_COMPILE_SECONDS = 1.0
MAX_COMPILE_BYTES = 512 << 20
MAX_STEP_ITEMS = 2000  # of the parser for one token: milliseconds, and a hundred times what schemas take


class GrammarRefused(Exception):
    """A grammar that cannot be compiled."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary."""

    def __init__(self, tokenizer_path: Path, vocabulary_size: int, eos_token_ids: Sequence[int]) -> None:
        """Takes a second for a vocabulary of 150,000, and no other thread runs meanwhile.

        Where llguidance is missing (an engine can do without) or does not understand the tokenizer, every grammar is
        refused.
        """
        self._refusal: str | None = None
        try:
            import llguidance

            text = tokenizer_path.read_text(encoding="utf-8")
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocabulary_size, eos_token=list(eos_token_ids))
            self._make_matcher = llguidance.LLMatcher
            self._limits = llguidance.LLParserLimits(step_max_items=MAX_STEP_ITEMS)
        except (ImportError, OSError, ValueError) as error:
            self._refusal = f"this base's tokenizer cannot be held to a grammar: {error}"

    def compile(self, grammar: str) -> LLMatcher:
        """Raises `GrammarRefused`."""
        if self._refusal is not None:
            raise GrammarRefused(self._refusal)
        matcher = self._make_matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if error := matcher.get_error():
            raise GrammarRefused(error)
        return matcher
