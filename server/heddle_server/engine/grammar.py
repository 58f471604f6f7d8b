"""Grammars that answers must follow: compiled in a thread, then one mask for every token. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from heddle_server.grammar_compiler import GrammarCompiler, GrammarRefused

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CACHED = 64  # compiled grammars kept for whoever asks next


class GrammarFailed(Exception):
    """A grammar cannot be compiled, which the API process had found out, or has become too complex to go on with."""


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.failure: GrammarFailed | None = None  # why nothing can be said any more
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed_tokens(self) -> NDArray[np.int32]:
        """One bit for each token that may come next, the lowest first: [ceil(vocabulary / 32)].

        Where the answer is complete, or `failure` is set, only end-of-sequence tokens may.
        """
        mask = self._matcher.compute_bitmask()
        if error := self._matcher.get_error():
            self.failure = GrammarFailed(f"The answer's grammar became too complex to go on: {error}")
        return np.frombuffer(mask, np.int32)

    def advance(self, token_id: int) -> None:
        """One more token of the answer, which was allowed."""
        if not self._matcher.consume_token(token_id):
            self.failure = GrammarFailed(f"The answer left its grammar: {self._matcher.get_error()}")


class Grammars:
    """Compiles grammars for one vocabulary and keeps those used last. Called from the engine's thread."""

    def __init__(self, compiler: GrammarCompiler, on_compiled: Callable[[], None]) -> None:
        """`on_compiled` is called in the compiling thread when a grammar is ready or refused."""
        self._compiler = compiler
        self._on_compiled = on_compiled
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def begin(self, grammar: str) -> Future[LLMatcher]:
        """The compiled grammar, when it is done, for `state_of`."""
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]
        compiling = self._compiled[grammar] = self._thread.submit(self._compiler.compile, grammar)
        compiling.add_done_callback(lambda _: self._on_compiled())
        if len(self._compiled) > MAX_CACHED:
            self._compiled.popitem(last=False)
        return compiling

    def state_of(self, compiled: Future[LLMatcher]) -> GrammarState:
        """The beginning of an answer; raises `GrammarFailed` where the grammar was refused."""
        try:
            return GrammarState(compiled.result().deep_copy())
        except (GrammarRefused, MemoryError) as error:
            raise GrammarFailed(f"The answer's grammar cannot be compiled: {error}") from error

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
