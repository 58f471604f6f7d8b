"""Does a running server give each adapter the answer alone that it gives among all the others?"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from heddle_server.doctor.check import Check
from heddle_server.server_address import ServerError
from heddle_server.server_client import ServerClient

BASE = "base"
# Shorter than a page of keys and values in any tokenizer worth its name, so that no prompt is found in the prefix
# cache: what is compared is computed.
PROMPTS = ("The capital of France is", "Once upon a time there was", "1, 2, 3, 4,")
NUM_TOKENS = 24
NUM_TOP_LOGPROBS = 5
NEAR_TIE = 0.05  # of log-probability between the best two tokens: rounding alone may decide there
MAX_CACHED = 10_000  # adapters that a server lists
MAX_PARTICIPANTS = 256  # as many as a server runs at once, if nobody said otherwise
MIN_TOGETHER = 0.5  # of all participants, in the mean over a pass's steps


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, each with its log-probability and how far the next best was behind."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]


@dataclass
class Verdict:
    """On one adapter, over all prompts and passes."""

    name: str
    num_compared: int = 0  # tokens that were equal
    largest_difference: float = 0.0  # of their log-probabilities
    num_near_ties: int = 0  # answers that parted where two tokens were all but equally likely
    difference: str = ""  # the first that cannot be explained so

    def compare(self, prompt: str, alone: Answer, together: Answer) -> None:
        for i, (expected, got) in enumerate(zip(alone.tokens, together.tokens, strict=False)):
            if expected == got:
                self.num_compared += 1
                self.largest_difference = max(self.largest_difference, abs(alone.logprobs[i] - together.logprobs[i]))
            elif alone.margins[i] < NEAR_TIE:
                self.num_near_ties += 1
                return
            else:
                self._differs(f"after {prompt!r}, token {i + 1} is {got!r} in the batch and {expected!r} alone")
                return
        if len(alone.tokens) != len(together.tokens):
            self._differs(f"after {prompt!r}, {len(together.tokens)} tokens in the batch and {len(alone.tokens)} alone")

    def _differs(self, difference: str) -> None:
        self.difference = self.difference or difference


@dataclass(frozen=True)
class Together:
    """How one pass of everybody at once was computed, by the server's own counters."""

    segments_per_step: float  # runs of tokens with one adapter, or with none
    loads: int  # adapters that had to be brought to the device meanwhile


@dataclass
class Isolation:
    """What came of it."""

    participants: tuple[str, ...]  # the base among them
    verdicts: list[Verdict]
    passes: list[Together] = field(default_factory=list)

    @property
    def ran_together(self) -> bool:
        """Whether most were in the steps of every pass; for one participant there is nothing to show."""
        return all(each.segments_per_step >= MIN_TOGETHER * len(self.participants) for each in self.passes)

    def checks(self) -> list[Check]:
        return [*(_check(verdict) for verdict in self.verdicts), self._batch_check()]

    def _batch_check(self) -> Check:
        mean = min(each.segments_per_step for each in self.passes)
        loads = sum(each.loads for each in self.passes)
        found = f"{len(self.participants)} at once, at least {mean:.1f} segments a step in the mean of a pass"
        found += f", {loads} adapters brought in meanwhile" if loads else ""
        if self.ran_together:
            return Check("together", "ok", found)
        remedy = "They did not share steps: name fewer with --adapter, or raise --pool-bytes or --max-batch-requests."
        return Check("together", "FAIL", found, remedy)


def check_isolation(client: ServerClient, adapters: Sequence[str]) -> Isolation:
    """Every adapter, and the base, alone; then all of them at once, in two orders. Raises `ServerError`.

    `adapters` by reference; none means those that are on the device.
    """
    participants = (BASE, *(adapters or _resident(client)))
    result = Isolation(participants, [Verdict(name) for name in participants])
    if len(participants) == 1:
        raise ServerError("no adapter is on the device: ask one something first, or name some with --adapter.")
    if len(participants) > MAX_PARTICIPANTS:
        raise ServerError(
            f"{len(participants) - 1} adapters are too many to be asked at once: name at most "
            f"{MAX_PARTICIPANTS - 1} with --adapter."
        )
    for prompt in PROMPTS:
        alone = [_answer(client, name, prompt) for name in participants]
        for order in (list(participants), list(reversed(participants))):
            before = _counters(client)
            with ThreadPoolExecutor(len(order)) as crowd:
                futures = {name: crowd.submit(_answer, client, name, prompt) for name in order}
                together = {name: future.result() for name, future in futures.items()}
            result.passes.append(_together(before, _counters(client)))
            for verdict, expected in zip(result.verdicts, alone, strict=True):
                verdict.compare(prompt, expected, together[verdict.name])
    return result


def _answer(client: ServerClient, name: str, prompt: str) -> Answer:
    body: dict[str, Any] = {
        "model": BASE,
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,  # so that all are there until the last step
        "temperature": 0,
        "logprobs": NUM_TOP_LOGPROBS,
    }
    reply = client.post("/v1/completions", body if name == BASE else {**body, "adapter": name})
    logprobs = reply["choices"][0]["logprobs"]
    return Answer(
        tokens=tuple(logprobs["tokens"]),
        logprobs=tuple(logprobs["token_logprobs"]),
        margins=tuple(_margin(top.values()) for top in logprobs["top_logprobs"]),
    )


def _margin(logprobs: Any) -> float:
    """Between the best two; tokens of the same text are one here, and then nothing can be said."""
    best = sorted(logprobs, reverse=True)[:2]
    return float(best[0] - best[1]) if len(best) == 2 else 0.0


def _resident(client: ServerClient) -> list[str]:
    cache = client.get(f"/v1/cache?limit={MAX_CACHED}")
    return [each["names"][0] for each in cache["adapters"] if each["tier"] == "device" and each["names"]]


def _counters(client: ServerClient) -> dict[str, Any]:
    counters: dict[str, Any] | None = client.get("/v1/cache?limit=0")["counters"]
    if counters is None:
        raise ServerError("the server counts its steps for an admin only: give a key with the scope admin.")
    return counters


def _together(before: dict[str, Any], after: dict[str, Any]) -> Together:
    num_steps = after["steps"] - before["steps"]
    return Together(
        segments_per_step=(after["segments"] - before["segments"]) / max(1, num_steps),
        loads=after["adapter_loads"] - before["adapter_loads"],
    )


def _check(verdict: Verdict) -> Check:
    found = f"{verdict.num_compared} tokens equal, log-probabilities at most {verdict.largest_difference:.1e} apart"
    found += f", {verdict.num_near_ties} near ties" if verdict.num_near_ties else ""
    if verdict.difference:
        remedy = "Keep this server from other tenants' requests, and tell us its base, its adapters and this machine."
        return Check(verdict.name, "FAIL", f"{verdict.difference}; before that {found}", remedy)
    if not verdict.num_compared:
        return Check(verdict.name, "warn", f"nothing could be compared: {found}", "Serve with --dtype float32 to see.")
    return Check(verdict.name, "ok", found)
