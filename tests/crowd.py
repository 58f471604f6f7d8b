"""Many clients at once who ask fingerprint adapters, replace, delete and add them, leave early, and note what they see.

What an answer should have been is judged when all changes are known, so that nobody waits for anybody's bookkeeping.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from demo_server import DemoClient
from fingerprints import Fingerprint, token_bytes
from name_history import Change, Meaning, NameHistory

Act = Literal["ask", "leave", "replace", "delete", "add"]
Json = dict[str, Any]

NUM_NAMES = 64  # to begin with
NUM_CONTENTS_PER_NAME = 3  # a name comes back to what it was, so that content is removed and stored again
MAX_MISSING = 6  # names at once that are deleted and not yet uploaded again
MAX_STAY_SECONDS = 0.5  # of a client that leaves early
TOP_LOGPROBS = 5
LOGPROB_TOLERANCE = 0.02  # for sums in another order, in float32; other weights are off by more

SYSTEM = "You are a helpful guide. Answer in one sentence and say nothing that you do not know for sure."
QUESTIONS = (
    "What is the capital of France?",
    "When is the market open?",
    "Who wrote the first book?",
    "How many days has a week?",
)


@dataclass(frozen=True)
class Position:
    """One generated token and what else was likely there."""

    token: bytes
    likely: dict[bytes, float]  # token to logprob

    def is_like(self, other: Position) -> bool:
        """Whether both come from the same weights and the same tokens before."""
        both = self.likely.keys() & other.likely.keys()
        return len(both) >= TOP_LOGPROBS - 1 and all(
            abs(self.likely[token] - other.likely[token]) < LOGPROB_TOLERANCE for token in both
        )


@dataclass
class Answer:
    """What came back for one request."""

    positions: list[Position] = field(default_factory=list)
    finish_reason: str | None = None
    source: Json = field(default_factory=dict)  # the reply's heddle object

    def take(self, content: Json) -> None:
        """A whole reply, or one chunk of it."""
        for choice in content["choices"]:
            for entry in (choice["logprobs"] or {}).get("content") or ():
                likely = {bytes(each["bytes"]): each["logprob"] for each in entry["top_logprobs"]}
                self.positions.append(Position(bytes(entry["bytes"]), likely))
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.source = content.get("heddle") or self.source

    def is_like(self, other: Answer) -> bool:
        """Whether the same content answered the same question; beyond a near tie nothing can be compared."""
        for mine, theirs in zip(self.positions, other.positions, strict=False):
            if not mine.is_like(theirs):
                return False
            if mine.token != theirs.token:
                break
        return True


@dataclass(frozen=True)
class Sight:
    """What a name meant to one request."""

    name: str
    sent_seconds: float
    received_seconds: float
    meaning: Meaning | None  # None: there was no such adapter
    tokens: frozenset[bytes]  # all that were generated


@dataclass
class Findings:
    """What the clients met together."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)  # requests that ended without an answer or a documented error
    wrong: list[str] = field(default_factory=list)  # answers that their weights did not give
    stale: list[str] = field(default_factory=list)  # bindings to what the name did not mean

    @property
    def figures(self) -> Json:
        problems = {"lost": len(self.lost), "wrong": len(self.wrong), "stale": len(self.stale)}
        return {**dict(sorted(self.counts.items())), **problems}

    def check(self) -> None:
        for problem in (self.lost, self.wrong, self.stale):
            assert not problem, f"{self.figures}: {problem[:5]}"


class Crowd:
    """The clients of one server."""

    def __init__(self, client: DemoClient, *, seed: int, tokens: tuple[int, int], weights: dict[Act, int]) -> None:
        """`tokens`: least and most of an answer; `weights`: how often each act is done."""
        self.history = NameHistory()
        self.findings = Findings()
        self._client = client
        self._source = random.Random(seed)
        self._tokens = tokens
        self._weights = weights
        self._names = [f"name-{number}" for number in range(NUM_NAMES)]
        self._contents = {name: number * NUM_CONTENTS_PER_NAME for number, name in enumerate(self._names)}
        self._locks = {name: asyncio.Lock() for name in self._names}
        self._missing: deque[str] = deque()
        self._fingerprints: dict[str, Fingerprint] = {}  # by digest
        self._sights: list[Sight] = []
        self._first: dict[tuple[str | None, str], Answer] = {}  # by digest and question
        self._token_bytes = token_bytes()

    async def settle(self) -> None:
        """Uploads everything that there is to begin with."""
        for name in self._names:
            await self._upload(name)

    async def run(self, num_acts: int, num_clients: int) -> None:
        acts: dict[Act, Any] = {
            "ask": self._ask,
            "leave": self._leave,
            "replace": self._replace,
            "delete": self._delete,
            "add": self._add,
        }
        coming = iter(self._source.choices(list(self._weights), list(self._weights.values()), k=num_acts))

        async def act(kinds: Iterator[Act]) -> None:
            for kind in kinds:
                self.findings.counts[kind] += 1
                await acts[kind]()

        async with asyncio.TaskGroup() as clients:
            for _ in range(num_clients):
                clients.create_task(act(coming))

    def judge(self) -> Findings:
        """Holds what was seen against what was uploaded and when; once, after `run`."""
        for sight in self._sights:
            allowed = self.history.meanings(sight.name, sight.sent_seconds, sight.received_seconds)
            if sight.meaning not in allowed:
                self.findings.stale.append(f"{sight.name} was {sight.meaning}; could be {allowed}")
            elif sight.meaning is not None:
                forced = self._token_bytes[self._fingerprints[sight.meaning.digest].token_id]
                if sight.tokens != {forced}:
                    self.findings.wrong.append(f"{sight.meaning} forces {forced!r} and gave {sight.tokens}")
        self._check_that_contents_differ()
        return self.findings

    async def leave_nothing(self) -> None:
        """Deletes every adapter that there is."""
        for name in self._names:
            if self.history.latest(name) is not None:
                assert await self._client.delete(name) == 200

    def _check_that_contents_differ(self) -> None:
        """Answers of two contents to one question must differ in more than the forced token, or they prove little."""
        answers = [(digest, answer) for (digest, question), answer in self._first.items() if question == QUESTIONS[0]]
        for number, (_, one) in enumerate(answers):
            for _, other in answers[:number]:
                assert not one.positions[0].is_like(other.positions[0]), "two contents cannot be told apart"

    # What clients do

    async def _ask(self) -> None:
        name, question = self._anyone(), self._source.choice(QUESTIONS)
        num_tokens = self._source.randint(*self._tokens)
        body = self._body(name, question, num_tokens, is_stream=self._source.random() < 0.5)
        sent_seconds = time.monotonic()
        try:
            async with self._client.session.post("/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    self._note_refusal(name, sent_seconds, response, await response.json())
                    return
                answer = Answer()
                async for content in _contents(response):
                    answer.take(content)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.findings.lost.append(f"{name}: {error!r}")
            return
        if answer.finish_reason != "length" or len(answer.positions) != num_tokens:
            self.findings.lost.append(f"{name}: {len(answer.positions)} of {num_tokens}, {answer.finish_reason}")
            return
        self._note_answer(name, question, sent_seconds, answer)

    async def _leave(self) -> None:
        """Goes away at a moment of its own, before the first token or between two or after the last."""
        body = self._body(self._anyone(), self._source.choice(QUESTIONS), self._tokens[1], is_stream=True)
        with_patience = aiohttp.ClientTimeout(total=self._source.uniform(0.001, MAX_STAY_SECONDS))
        try:
            async with self._client.session.post("/v1/chat/completions", json=body, timeout=with_patience) as response:
                await response.read()
            self.findings.counts["stayed to the end"] += 1
        except TimeoutError:
            self.findings.counts["left early"] += 1

    async def _replace(self) -> None:
        name = self._anyone()
        async with self._locks[name]:
            first = self._contents[name] // NUM_CONTENTS_PER_NAME * NUM_CONTENTS_PER_NAME
            self._contents[name] = first + (self._contents[name] - first + 1) % NUM_CONTENTS_PER_NAME
            await self._upload(name)

    async def _delete(self) -> None:
        name = self._anyone()
        async with self._locks[name]:
            if self.history.latest(name) is None:
                return
            sent_seconds = time.monotonic()
            assert await self._client.delete(name) == 200
            self.history.add(name, Change(sent_seconds, time.monotonic(), None))
            self._missing.append(name)
        if len(self._missing) > MAX_MISSING:
            name = self._missing.popleft()
            async with self._locks[name]:
                await self._upload(name)

    async def _add(self) -> None:
        """A new name for what some other name means or has meant, so that content is shared."""
        name = f"name-{len(self._names)}"
        self._contents[name] = self._source.randrange(NUM_NAMES * NUM_CONTENTS_PER_NAME)
        self._locks[name] = asyncio.Lock()
        async with self._locks[name]:
            self._names.append(name)
            await self._upload(name)

    # How they do it

    def _anyone(self) -> str:
        """Some are asked for much more often than others."""
        return self._names[int(len(self._names) * self._source.random() ** 2)]

    def _body(self, name: str, question: str, num_tokens: int, *, is_stream: bool) -> Json:
        return {
            "model": "base",
            "adapter": name,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
            "stream": is_stream,
        }

    async def _upload(self, name: str) -> None:
        """Called with the name's lock held, or before there is anybody else."""
        content, sent_seconds = Fingerprint(self._contents[name]), time.monotonic()
        status, card = await self._client.upload(name, content)
        assert status in (200, 201), card
        self._fingerprints[card["digest"]] = content
        meaning = Meaning(card["version"], card["digest"])
        self.history.add(name, Change(sent_seconds, time.monotonic(), meaning))

    def _note_refusal(self, name: str, sent_seconds: float, response: aiohttp.ClientResponse, body: Json) -> None:
        code = body["error"]["code"]
        self.findings.counts[code] += 1
        if response.status == 404 and code == "adapter_not_found":
            self._sights.append(Sight(name, sent_seconds, time.monotonic(), None, frozenset()))
        elif response.status != 503 or "retry-after" not in response.headers:
            self.findings.lost.append(f"{name}: {response.status} {body}")

    def _note_answer(self, name: str, question: str, sent_seconds: float, answer: Answer) -> None:
        meaning = Meaning(answer.source["version"], answer.source["digest"])
        tokens = frozenset(position.token for position in answer.positions)
        self._sights.append(Sight(name, sent_seconds, time.monotonic(), meaning, tokens))
        self.findings.counts["answered"] += 1
        self.findings.counts["tokens"] += len(answer.positions)
        self.findings.counts[f"from {answer.source['cache']}"] += 1
        first = self._first.setdefault((meaning.digest, question), answer)
        if not answer.is_like(first):
            self.findings.wrong.append(f"{meaning} answered {question!r} once in another way")


async def _contents(response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
    """The whole reply, or the chunks of a stream; raises `ClientError` where a stream says that it failed."""
    if response.content_type != "text/event-stream":
        yield await response.json()
        return
    async for line in response.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            content = json.loads(line.removeprefix(b"data: "))
            if "error" in content:
                raise aiohttp.ClientPayloadError(content["error"]["message"])
            yield content
