"""Grammars tried out by a process of their own: what it says, what it forgets, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import pytest

from heddle_demo.data import BASE_DIR
from heddle_server.api import grammar_checker
from heddle_server.api.errors import EngineUnavailable, InvalidRequest, RateLimitExceeded
from heddle_server.api.grammar_checker import GrammarChecker
from heddle_server.api.response_format import schema_grammar

VOCABULARY_SIZE, EOS = 1024, [3]


def lark(rules: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": rules}]})


FINE, BROKEN = lark('start: "x"'), lark("start: missing")
HUGE = lark("start: /" + "(" * 20_000 + "x" + ")" * 20_000 + "/")


async def check(checker: GrammarChecker, grammar: str, tenant: str = "blue") -> str:
    """What is said about a grammar; nothing if it can be used."""
    try:
        await checker.check(grammar, VOCABULARY_SIZE, EOS, tenant=tenant, param="response_format")
    except InvalidRequest as error:
        return f"{error.param}: {error.message}"
    return ""


def with_checker(work: Callable[[GrammarChecker], Awaitable[None]]) -> None:
    async def run() -> None:
        checker = GrammarChecker(BASE_DIR / "tokenizer.json")
        try:
            await work(checker)
        finally:
            await checker.close()

    asyncio.run(run())


def worker_of(checker: GrammarChecker) -> int:
    assert checker._worker is not None
    return checker._worker.pid


def test_one_process_tries_all_of_them_in_turn() -> None:
    async def work(checker: GrammarChecker) -> None:
        verdicts = await asyncio.gather(*(check(checker, grammar) for grammar in (FINE, BROKEN) * 2))
        assert [bool(verdict) for verdict in verdicts] == [False, True] * 2
        assert "missing" in verdicts[1]
        assert verdicts[1].startswith("response_format: ")
        first = worker_of(checker)
        assert not await check(checker, schema_grammar({"type": "object"}))
        assert worker_of(checker) == first

    with_checker(work)


def test_what_takes_the_process_down_is_refused_and_the_next_is_tried_by_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(checker: GrammarChecker) -> None:
        assert not await check(checker, FINE)
        first = worker_of(checker)
        os.kill(first, signal.SIGKILL)
        assert "too much memory" in await check(checker, lark('start: "y"'))
        assert "too much memory" in await check(checker, lark('start: "y"')), "remembered for a while"
        monkeypatch.setattr(grammar_checker, "SLOW_SECONDS", 0.0)
        assert not await check(checker, lark('start: "u"'))
        os.kill(worker_of(checker), signal.SIGKILL)
        assert "too much memory" in await check(checker, lark('start: "v"'))
        assert not await check(checker, lark('start: "v"')), "and tried again after it"
        assert worker_of(checker) != first

    with_checker(work)


def test_what_takes_too_long_is_refused_and_not_remembered_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(checker: GrammarChecker) -> None:
        assert not await check(checker, FINE)
        os.kill(worker_of(checker), signal.SIGSTOP)
        monkeypatch.setattr(grammar_checker, "MAX_COMPILE_SECONDS", 0.2)
        monkeypatch.setattr(grammar_checker, "SLOW_SECONDS", 0.0)
        assert "takes longer than 0.2 s" in await check(checker, lark('start: "z"'))
        monkeypatch.undo()
        assert not await check(checker, lark('start: "z"'))

    with_checker(work)


def test_a_client_that_leaves_does_not_leave_its_answer_to_the_next() -> None:
    async def work(checker: GrammarChecker) -> None:
        assert not await check(checker, FINE)
        os.kill(worker_of(checker), signal.SIGSTOP)
        leaving = asyncio.create_task(check(checker, BROKEN))
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert not await check(checker, lark('start: "w"'))

    with_checker(work)


def test_a_process_that_does_not_start_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(checker: GrammarChecker) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(EngineUnavailable, match="does not start"):
            await check(checker, FINE)
        monkeypatch.undo()
        assert not await check(checker, FINE)

    with_checker(work)


def test_a_deep_one_overflows_nothing_of_ours() -> None:
    async def work(checker: GrammarChecker) -> None:
        assert await check(checker, HUGE)
        assert not await check(checker, FINE)

    with_checker(work)


def test_a_tenant_with_many_grammars_waits_for_itself() -> None:
    async def work(checker: GrammarChecker) -> None:
        assert not await check(checker, FINE)
        os.kill(worker_of(checker), signal.SIGSTOP)
        waiting = [asyncio.create_task(check(checker, lark(f'start: "{number}"'))) for number in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(RateLimitExceeded):
            await check(checker, lark('start: "more"'))
        other = asyncio.create_task(check(checker, lark('start: "other"'), tenant="green"))
        os.kill(worker_of(checker), signal.SIGCONT)
        assert not any(await asyncio.gather(*waiting, other))

    with_checker(work)
