"""Whether a grammar can be used: found out by a process of its own, before a request is admitted."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from heddle_server.api.errors import EngineUnavailable, InvalidRequest, RateLimitExceeded
from heddle_server.api.grammar_worker import LENGTH_BYTES, frame
from heddle_server.grammar_compiler import MAX_COMPILE_SECONDS, MAX_GRAMMAR_BYTES

MAX_REMEMBERED = 256  # verdicts, by grammar
START_SECONDS = 30.0  # for the process and its table of tokens
MAX_REASON_CHARS = 500
MAX_WAITING = 4  # grammars of one tenant
SLOW_SECONDS = 10.0  # before a grammar that took too much is tried again


@dataclass(frozen=True)
class _Verdict:
    """What was found out about a grammar."""

    refusal: str  # "" for none
    until: float = math.inf  # on the monotonic clock: what took too long another time may not


class GrammarChecker:
    """One worker, started when the first grammar comes. Lives on the event loop."""

    def __init__(self, tokenizer_path: Path) -> None:
        self._tokenizer_path = tokenizer_path
        self._worker: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()  # one grammar at a time
        self._waiting = Counter[str]()  # grammars to be tried, by tenant
        self._verdicts = OrderedDict[str, _Verdict]()

    async def check(
        self, grammar: str, vocabulary_size: int, eos_token_ids: Sequence[int], *, tenant: str, param: str
    ) -> None:
        """Raises `InvalidRequest` for a grammar that is too large, wrong, or takes too much to compile, and
        `RateLimitExceeded` for a tenant that has others waiting to be tried."""
        if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"{param!r} makes a grammar of more than {MAX_GRAMMAR_BYTES} bytes.", param=param)
        verdict = self._known(grammar) or await self._in_turn(grammar, vocabulary_size, eos_token_ids, tenant)
        if verdict.refusal:
            raise InvalidRequest(f"{param!r} cannot be followed: {verdict.refusal}", param=param)

    def _known(self, grammar: str) -> _Verdict | None:
        verdict = self._verdicts.get(grammar)
        return verdict if verdict is not None and time.monotonic() < verdict.until else None

    async def _in_turn(self, grammar: str, vocabulary_size: int, eos_token_ids: Sequence[int], tenant: str) -> _Verdict:
        """Nobody waits for more than a few grammars of each tenant, however many one of them sends."""
        if self._waiting[tenant] >= MAX_WAITING:
            raise RateLimitExceeded(f"{MAX_WAITING} of your grammars wait to be compiled. Try again in a moment.")
        self._waiting[tenant] += 1
        try:
            async with self._turn:
                verdict = self._known(grammar)  # somebody else may have sent the same
                if verdict is None:
                    verdict = self._verdicts[grammar] = await self._try(grammar, vocabulary_size, eos_token_ids)
                    self._verdicts.move_to_end(grammar)
                if len(self._verdicts) > MAX_REMEMBERED:
                    self._verdicts.popitem(last=False)
                return verdict
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant]

    async def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            with suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()

    async def _try(self, grammar: str, vocabulary_size: int, eos_token_ids: Sequence[int]) -> _Verdict:
        worker = await self._ready_worker(vocabulary_size, eos_token_ids)
        assert worker.stdin is not None
        try:
            worker.stdin.write(frame(grammar))
            async with asyncio.timeout(MAX_COMPILE_SECONDS):
                return _Verdict(_shortened(await _answer(worker)))
        except TimeoutError:
            refusal = f"it takes longer than {MAX_COMPILE_SECONDS:g} s to compile. Make it simpler."
        except (OSError, asyncio.IncompleteReadError):
            refusal = "it takes too much memory to compile. Make it simpler."
        except asyncio.CancelledError:
            await self.close()  # its answer would be taken for the next one's
            raise
        await self.close()
        return _Verdict(refusal, time.monotonic() + SLOW_SECONDS)

    async def _ready_worker(self, vocabulary_size: int, eos_token_ids: Sequence[int]) -> asyncio.subprocess.Process:
        if self._worker is not None and self._worker.returncode is None:
            return self._worker
        try:
            self._worker = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "heddle_server.api.grammar_worker",
                f"--tokenizer={self._tokenizer_path}",
                f"--vocabulary-size={vocabulary_size}",
                f"--eos-token-ids={json.dumps(list(eos_token_ids))}",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            async with asyncio.timeout(START_SECONDS):
                await _answer(self._worker)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            await self.close()
            raise EngineUnavailable("The process that tries grammars out does not start. Try again.") from None
        except asyncio.CancelledError:
            await self.close()
            raise
        return self._worker


async def _answer(worker: asyncio.subprocess.Process) -> str:
    assert worker.stdout is not None
    length = int.from_bytes(await worker.stdout.readexactly(LENGTH_BYTES), "little")
    return (await worker.stdout.readexactly(length)).decode()


def _shortened(reason: str) -> str:
    """The compiler quotes the grammar it was given, which may be long."""
    reason = " ".join(reason.split())
    return reason if len(reason) <= MAX_REASON_CHARS else reason[:MAX_REASON_CHARS] + " ..."
