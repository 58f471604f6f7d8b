"""Made-up traces with the shape of published ones, since no data set is shipped. Reads no file.

What is kept: the distribution of prompt and answer lengths, how bursty arrivals are, and, for Mooncake, which prompts
begin alike. What is not: the time of day, and how the lengths of neighbouring requests depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.prompts import NUM_BLOCK_TOKENS
from heddle_loadtest.workload.trace import FORMATS, TraceEntry

if TYPE_CHECKING:
    from numpy.random import Generator

_Tokens = tuple[int, ...]  # at _PERCENTILES
_PERCENTILES = (0, 5, 10, 25, 50, 75, 90, 95, 99, 100)
_NUM_RECENT = 1000  # a Mooncake conversation that goes on is one of so many latest requests: a guess
_NUM_CANDIDATES = 24  # of them, the one that fits the length best: chosen so that as much is shared as in the trace
_FIRST_DAY = datetime(2023, 11, 16)  # noqa: DTZ001 - as in the published files, which name no zone


@dataclass(frozen=True)
class LookAlike:
    """The shape of one trace."""

    prompt_tokens: _Tokens
    output_tokens: _Tokens
    gap_seconds: float  # mean time between two requests, pauses aside
    gap_cv: float  # its coefficient of variation; the gaps are Gamma-distributed
    pause_share: float = 0.0  # so many gaps are pauses instead
    pause_seconds: float = 0.0  # their mean; exponential
    tick_seconds: float = 0.0  # the trace knows time no better: each request moves to the tick before it
    continued_share: float | None = None  # so many requests go on with an earlier prompt; None: prompts share nothing


LOOK_ALIKES = {
    # BurstGPT: 1,404.3 thousand answers in two months (README of HPMLL/BurstGPT), in whole seconds. Mean prompt 621 and
    # mean answer 126 tokens: second-hand, from several projects that counted BurstGPT_1. Gamma-distributed gaps are the
    # paper's own model (arXiv 2401.17644); their cv of 2, and the lognormal form of the lengths, are guesses.
    "burstgpt": LookAlike(
        prompt_tokens=(1, 42, 65, 134, 302, 678, 1406, 2173, 4096, 8192),
        output_tokens=(1, 7, 11, 24, 56, 133, 295, 474, 1000, 2000),
        gap_seconds=3.75,
        gap_cv=2.0,
        tick_seconds=1.0,
    ),
    # Azure 2023: counted in AzureLLMInferenceTrace_code.csv of AzurePublicDataset (8,819 requests in 57 minutes);
    # 0.65 % of its gaps last longer than 5 s, 43 s on average, and make the cv of all gaps 13.
    "azure-code": LookAlike(
        prompt_tokens=(3, 75, 147, 578, 1469, 2744, 5187, 7303, 7436, 7437),
        output_tokens=(6, 6, 7, 9, 13, 24, 55, 90, 251, 1899),
        gap_seconds=0.111,
        gap_cv=2.2,
        pause_share=0.0065,
        pause_seconds=43.2,
    ),
    # Azure 2023: counted in AzureLLMInferenceTrace_conv.csv (19,366 requests in 58 minutes).
    "azure-conv": LookAlike(
        prompt_tokens=(2, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 14050),
        output_tokens=(7, 41, 54, 85, 129, 395, 424, 451, 601, 1000),
        gap_seconds=0.181,
        gap_cv=1.09,
    ),
    # Mooncake: counted in FAST25-release/traces/conversation_trace.jsonl of kvcache-ai/Mooncake (12,031 requests in 59
    # minutes, all on a grid of 3 s). All prompts have the first block in common; 38.7 % share more than that with an
    # earlier one. With a cache without limit 37 % of all blocks would be found.
    "mooncake": LookAlike(
        prompt_tokens=(891, 901, 964, 2306, 6909, 15367, 27367, 39550, 85400, 126195),
        output_tokens=(1, 10, 24, 156, 350, 472, 597, 698, 1118, 2000),
        gap_seconds=0.294,
        gap_cv=1.0,
        tick_seconds=3.0,
        continued_share=0.387,
    ),
}


def make_look_alike(kind: str, num_requests: int, seed: int) -> list[TraceEntry]:
    """A trace of the shape of LOOK_ALIKES[kind], the first request at 0. Raises SpecError for an unknown kind."""
    from numpy.random import default_rng

    if kind not in LOOK_ALIKES:
        raise SpecError("kind", kind, "is no trace that can be imitated", f"Give one of {', '.join(LOOK_ALIKES)}")
    shape = LOOK_ALIKES[kind]
    times, prompts, outputs, prefixes = default_rng(seed).spawn(4)
    at_seconds = _arrivals(shape, num_requests, times)
    prompt_tokens = _lengths(shape.prompt_tokens, num_requests, prompts)
    output_tokens = _lengths(shape.output_tokens, num_requests, outputs)
    hash_ids: Iterator[tuple[int, ...]] = iter([()] * num_requests)
    if shape.continued_share is not None:
        hash_ids = _shared_prefixes(prompt_tokens, shape.continued_share, prefixes)
    return [TraceEntry(*values) for values in zip(at_seconds, prompt_tokens, output_tokens, hash_ids, strict=True)]


def write_trace(entries: Sequence[TraceEntry], format: str, path: Path) -> None:
    """The entries in a format of trace.py, so that `read_trace` and other tools' importers read them.

    Times keep microseconds. Hash ids are lost in a format other than mooncake. Raises SpecError for an unknown format
    and for a file that cannot be written.
    """
    if format not in FORMATS:
        raise SpecError("format", format, "is no trace format", f"Give one of {', '.join(FORMATS)}")
    lines = {"burstgpt": _burstgpt_lines, "azure": _azure_lines, "mooncake": _mooncake_lines}[format](entries)
    try:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        raise SpecError("out", path, error.strerror or "cannot be written", "Name a file to write") from error


def _arrivals(shape: LookAlike, num_requests: int, random: Generator) -> list[float]:
    import numpy as np

    gamma_shape = shape.gap_cv**-2
    gaps = random.gamma(gamma_shape, shape.gap_seconds / gamma_shape, num_requests)
    is_pause = random.random(num_requests) < shape.pause_share
    gaps[is_pause] = random.exponential(shape.pause_seconds, int(is_pause.sum()))
    times = np.cumsum(gaps) - gaps[0]
    if shape.tick_seconds:
        times = times // shape.tick_seconds * shape.tick_seconds
    return [round(float(time), 6) for time in times]


def _lengths(tokens: _Tokens, num_requests: int, random: Generator) -> list[int]:
    """Drawn so that their percentiles are those of `tokens`; between two of them a straight line of logarithms."""
    import numpy as np

    logarithms = np.interp(random.random(num_requests) * 100, _PERCENTILES, np.log(tokens))
    return [int(length) for length in np.rint(np.exp(logarithms))]


def _shared_prefixes(
    prompt_tokens: Sequence[int], continued_share: float, random: Generator
) -> Iterator[tuple[int, ...]]:
    """Hash ids, one per 512 tokens: block 0 for all, then those of a recent prompt or ones never seen."""
    prompts: list[tuple[int, ...]] = []
    next_id = 1
    for num_tokens in prompt_tokens:
        num_blocks = -(-num_tokens // NUM_BLOCK_TOKENS)
        ids: tuple[int, ...] = (0,)
        if prompts and random.random() < continued_share:
            recent = random.integers(min(len(prompts), _NUM_RECENT), size=_NUM_CANDIDATES).tolist()
            earlier = max((prompts[-1 - index] for index in recent), key=lambda ids: min(len(ids), num_blocks))
            ids = earlier[: max(1, min(len(earlier), num_blocks) - 1)]  # the last block is seldom full, so never shared
        num_new = num_blocks - len(ids)
        prompts.append((*ids, *range(next_id, next_id + num_new)))
        next_id += num_new
        yield prompts[-1]


def _burstgpt_lines(entries: Sequence[TraceEntry]) -> Iterator[str]:
    yield "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    for entry in entries:
        total = entry.num_prompt_tokens + entry.num_output_tokens
        lengths = f"{entry.num_prompt_tokens},{entry.num_output_tokens},{total}"
        yield f"{_number(entry.at_seconds)},ChatGPT,{lengths},Conversation log"


def _azure_lines(entries: Sequence[TraceEntry]) -> Iterator[str]:
    yield "TIMESTAMP,ContextTokens,GeneratedTokens"
    for entry in entries:
        moment = _FIRST_DAY + timedelta(microseconds=round(entry.at_seconds * 1e6))
        yield f"{moment:%Y-%m-%d %H:%M:%S.%f}0,{entry.num_prompt_tokens},{entry.num_output_tokens}"


def _mooncake_lines(entries: Sequence[TraceEntry]) -> Iterator[str]:
    for entry in entries:
        fields = {
            "timestamp": _number(entry.at_seconds * 1000),
            "input_length": entry.num_prompt_tokens,
            "output_length": entry.num_output_tokens,
            "hash_ids": entry.hash_ids,
        }
        yield msgspec.json.encode(fields).decode()


def _number(value: float) -> int | float:
    """Whole where it is whole, as in the published files."""
    value = round(value, 6)
    return int(value) if value.is_integer() else value
