"""What one request came to: its times, its text, its error. Knows no HTTP and computes no percentiles.

All times are seconds on the clock of `time.perf_counter`. Latencies count from the time the workload wanted the
request to start, not from the time it was sent, so that a late client cannot make a slow server look fast.
"""

from __future__ import annotations

from itertools import pairwise

from msgspec import Struct

ABANDONED = "abandoned"  # the run was stopped while the request was under way
CLIENT_LIMIT = "client_limit"  # this machine had no file descriptor or no port left for it
CLIENT_CODES = (ABANDONED, CLIENT_LIMIT)  # errors that are not the target's; none of its own may be called so


class RequestError(Struct, frozen=True):
    """Why a request failed: a code to count by and a message to read.

    The server's own code where it gave one, else `http_<status>`, else one of the client's: `connection_failed`,
    `connection_lost`, `timeout`, `not_an_event_stream`, `malformed_event`, `stream_error`, `stream_interrupted`,
    `given_up` (by the server, as its `finish_reason` says), `unreadable` (an answer that nothing can be made of), and
    CLIENT_CODES.
    """

    code: str
    message: str


class ServerReport(Struct, frozen=True, kw_only=True):
    """What heddle says of a request in its reply's `heddle` object; other servers say none of it."""

    cache: str | None = None  # where its adapter was when it arrived: device, host or disk; None for the base
    load_seconds: float | None = None  # until its adapter was on the device
    queue_seconds: float | None = None  # until it was computed for the first time, loading included
    ttft_seconds: float | None = None  # until its first token, as the server saw it


class RequestResult(Struct, frozen=True, kw_only=True):
    """One finished request, good or failed."""

    id: int = 0  # of its line in the schedule
    adapter: str  # `base` for the base model
    tenant: str = ""
    scheduled_seconds: float  # when the workload wanted it to start
    started_seconds: float  # when it was sent
    finished_seconds: float  # when its last choice arrived or its failure was noticed
    chunk_seconds: tuple[float, ...]  # when each chunk with content arrived
    text: str
    num_prompt_tokens: int | None  # None if the server reported no usage
    num_output_tokens: int  # as the server reported, else the number of chunks with content
    finish_reason: str | None
    http_status: int | None  # None if there was no answer at all
    server: ServerReport | None = None
    error: RequestError | None

    @property
    def is_ok(self) -> bool:
        """Whether the whole answer arrived."""
        return self.error is None

    @property
    def lag_seconds(self) -> float:
        """How late the client sent it."""
        return self.started_seconds - self.scheduled_seconds

    @property
    def ttft_seconds(self) -> float | None:
        """Time to the first content that is not empty; None if there was none."""
        return self.chunk_seconds[0] - self.scheduled_seconds if self.chunk_seconds else None

    @property
    def end_to_end_seconds(self) -> float:
        """Time to the end of the answer."""
        return self.finished_seconds - self.scheduled_seconds

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time per output token after the first; None for fewer than two tokens."""
        if self.ttft_seconds is None or self.num_output_tokens < 2:
            return None
        return (self.end_to_end_seconds - self.ttft_seconds) / (self.num_output_tokens - 1)

    @property
    def inter_token_seconds(self) -> tuple[float, ...]:
        """The gaps between chunks with content: the stutter that the mean time per token hides."""
        return tuple(later - earlier for earlier, later in pairwise(self.chunk_seconds))


def describe(error: Exception) -> str:
    """What an exception says; its name where it says nothing, as timeouts do."""
    return str(error) or type(error).__name__
