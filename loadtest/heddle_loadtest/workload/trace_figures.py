"""A trace in a few figures, to see what it asks before it is run. Reads no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from heddle_loadtest.workload.trace import TraceEntry

PERCENTILES = (50, 90, 99)


class LengthFigures(Struct, frozen=True, kw_only=True):
    """Of prompts or answers, in tokens."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: int


class TraceFigures(Struct, frozen=True, kw_only=True):
    """Of a whole trace."""

    requests: int
    seconds: float  # from the first request to the last
    rate: float | None  # requests per second; None where all come at once
    gap_cv: float | None  # coefficient of variation of the gaps: 1 as in a Poisson process, more is burstier
    prompt_tokens: LengthFigures
    output_tokens: LengthFigures
    known_block_share: float | None  # of all hash ids, those with the same prompt up to there before; None: no hash ids


def trace_figures(entries: Sequence[TraceEntry]) -> TraceFigures:
    """The figures of at least one entry, in the order of their times."""
    import numpy as np

    times = np.array([entry.at_seconds for entry in entries])
    gaps = np.diff(times)
    seconds = float(times[-1] - times[0])
    return TraceFigures(
        requests=len(entries),
        seconds=seconds,
        rate=len(gaps) / seconds if seconds else None,
        gap_cv=float(gaps.std() / gaps.mean()) if seconds else None,
        prompt_tokens=_length_figures([entry.num_prompt_tokens for entry in entries]),
        output_tokens=_length_figures([entry.num_output_tokens for entry in entries]),
        known_block_share=_known_block_share(entries),
    )


def _length_figures(lengths: Sequence[int]) -> LengthFigures:
    import numpy as np

    percentiles: dict[str, Any] = {f"p{rank}": float(np.percentile(lengths, rank)) for rank in PERCENTILES}
    return LengthFigures(mean=float(np.mean(lengths)), max=max(lengths), **percentiles)


def _known_block_share(entries: Sequence[TraceEntry]) -> float | None:
    """What a prefix cache without limit would find; a block counts only while all before it were found."""
    seen: set[int] = set()
    num_known = num_blocks = 0
    for entry in entries:
        num_blocks += len(entry.hash_ids)
        num_known += next((i for i, block in enumerate(entry.hash_ids) if block not in seen), len(entry.hash_ids))
        seen.update(entry.hash_ids)
    return num_known / num_blocks if num_blocks else None
