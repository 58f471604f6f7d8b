"""Draws one tenant's requests. Knows no other tenant, and not where its requests stand among theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.random import Generator

from heddle_loadtest.workload.adapter_set import adapter_names, adapter_ranks
from heddle_loadtest.workload.arrivals import arrival_seconds
from heddle_loadtest.workload.lengths import draw_lengths
from heddle_loadtest.workload.popularity import draw_adapters
from heddle_loadtest.workload.prompts import BUILTIN_QUESTIONS, token_ids, words, words_of_blocks
from heddle_loadtest.workload.schedule import ScheduledRequest
from heddle_loadtest.workload.spec import (
    ByRank,
    Closed,
    FromTrace,
    Questions,
    TokenIds,
    Trace,
    Uploads,
    Words,
    Workload,
)
from heddle_loadtest.workload.trace import TraceEntry, read_trace


class TenantDraw:
    """A tenant's workload with the seed; every aspect of it draws from a generator of its own."""

    def __init__(self, name: str, workload: Workload, seed: int, folder: Path, uploads: Uploads | None) -> None:
        """`workload` has no tenants. `uploads` are None where the tenant's adapters are not the ones uploaded."""
        self.name = name
        self._workload = workload
        self._seed = seed
        self._folder = folder
        self._uploads = uploads

    @property
    def streams(self) -> int:
        """Of its closed loop; 0 for an open one."""
        arrivals = self._workload.arrivals
        return arrivals.streams if isinstance(arrivals, Closed) else 0

    def times(self) -> Iterator[float]:
        """When its requests are due; none of a closed loop's are."""
        arrivals, seconds = self._workload.arrivals, self._workload.seconds
        match arrivals:
            case Closed():
                return iter(())
            case Trace(speed=speed):
                times = (entry.at_seconds / speed for entry in self._trace)
                return (at_seconds for at_seconds in times if seconds is None or at_seconds <= seconds)
            case _:
                return arrival_seconds(arrivals, self._random("arrivals"), seconds)

    def draw(self, times: Sequence[float | None]) -> list[ScheduledRequest]:
        """A request for each of the times, its id the number among them."""
        workload = self._workload
        names = adapter_names(workload.adapters)
        adapters = self._draw_adapters(times, len(names))
        traced = [entry.num_output_tokens for entry in self._trace]
        lengths = draw_lengths(workload.output.tokens, len(times), self._random("output lengths"), traced)
        return [
            ScheduledRequest(
                id=number,
                at_seconds=at_seconds,
                adapter=names[adapter],
                tenant=self.name,
                prompt=prompt,
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens,
                ignore_eos=workload.output.exact,
                temperature=workload.temperature,
                seed=_sampling_seed(self._seed, self.name, number),
            )
            for number, (at_seconds, adapter, (prompt, num_prompt_tokens), max_tokens) in enumerate(
                zip(times, adapters, self._draw_prompts(len(times)), lengths, strict=True)
            )
        ]

    def _draw_adapters(self, times: Sequence[float | None], num_adapters: int) -> list[int]:
        due_seconds = [at_seconds or 0.0 for at_seconds in times]
        num_from_start = num_adapters - (self._uploads.count if self._uploads else 0)
        by_rank = isinstance(self._workload.popularity, ByRank)
        adapters = draw_adapters(
            self._workload.popularity,
            num_from_start,
            self._random("popularity"),
            num_requests=len(times),
            times=due_seconds,
            ranks=adapter_ranks(self._workload.adapters) if by_rank else None,
        )
        if self._uploads is None:
            return adapters
        asks_newest = self._random("uploads").random(len(times)) < self._uploads.share
        return [
            num_from_start + num_uploaded - 1 if is_newest and num_uploaded else adapter
            for adapter, is_newest, num_uploaded in zip(
                adapters, asks_newest, _num_uploaded(self._uploads, due_seconds), strict=True
            )
        ]

    def _draw_prompts(self, num_requests: int) -> list[tuple[str | list[int], int | None]]:
        """Each with its tokens, as the workload wants them."""
        prompt, random = self._workload.prompt, self._random("prompts")
        if isinstance(prompt, Questions):
            return [(question, None) for question in _shuffled(prompt.questions, num_requests, random)]
        traced = [entry.num_prompt_tokens for entry in self._trace]
        lengths = draw_lengths(prompt.tokens, num_requests, self._random("prompt lengths"), traced)
        if isinstance(prompt, TokenIds):
            return [(token_ids(random, length, prompt.first, prompt.vocabulary), length) for length in lengths]
        return [(self._words(prompt, number, length, random), length) for number, length in enumerate(lengths)]

    def _words(self, prompt: Words, number: int, length: int, random: Generator) -> str:
        """Where lengths are the trace's, what its requests share they share here too."""
        hash_ids = self._trace[number].hash_ids if isinstance(prompt.tokens, FromTrace) else ()
        return words_of_blocks(hash_ids, length) if hash_ids else words(random, length)

    @cached_property
    def _trace(self) -> tuple[TraceEntry, ...]:
        arrivals = self._workload.arrivals
        if not isinstance(arrivals, Trace):
            return ()
        return read_trace(self._folder / arrivals.file, arrivals.format, num_requests=self._workload.requests)

    def _random(self, aspect: str) -> Generator:
        return child_generator(self._seed, self.name, aspect)


def child_generator(seed: int, tenant: str, aspect: str) -> Generator:
    """The generator of one aspect of one tenant: the same in every process, unlike any other's."""
    return np.random.default_rng(np.random.SeedSequence([seed, int.from_bytes(_digest(f"{tenant}\0{aspect}"))]))


def _sampling_seed(seed: int, tenant: str, number: int) -> int:
    """Not negative, and below 2 ** 31: what every target takes."""
    return int.from_bytes(_digest(f"{seed}\0{tenant}\0{number}")[:4]) >> 1


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _num_uploaded(uploads: Uploads, times: Sequence[float]) -> list[int]:
    """How many are there to be asked for at each time."""
    settled = (max(0.0, at_seconds - uploads.settle_seconds) for at_seconds in times)
    return [min(int(at_seconds / uploads.every_seconds), uploads.count) for at_seconds in settled]


def _shuffled(questions: Sequence[str], num_requests: int, random: Generator) -> list[str]:
    """All of them once in a random order, then all once more in another."""
    choices = questions or BUILTIN_QUESTIONS
    rounds = -(-num_requests // len(choices))
    order = [index for _ in range(rounds) for index in random.permutation(len(choices)).tolist()]
    return [choices[index] for index in order[:num_requests]]
