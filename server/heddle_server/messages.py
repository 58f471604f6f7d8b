"""The messages between the API process and the engine process: msgpack of these structs, nothing else.

The socket carries one encoded `ToEngine` or `FromEngine` per frame.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from heddle_adapters.base_layout import BaseLayout
from heddle_server.request import Request

FinishReason = Literal["stop", "length", "abort", "error"]


class Generate(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: int


class ForgetAdapter(msgspec.Struct, frozen=True, tag=True):
    """The digest's last name is gone and no request holds it: free what it occupies."""

    adapter_digest: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


ToEngine = Generate | Abort | ForgetAdapter | Shutdown


class StartupProgress(msgspec.Struct, frozen=True, tag=True):
    """A phase of start-up has ended."""

    phase: str  # "weights", "page pool", ...
    seconds: float
    detail: str = ""


class ModelCard(msgspec.Struct, frozen=True):
    """What the API process needs to know of the loaded base."""

    layout: BaseLayout
    dtype: str
    device: str
    vocabulary_size: int
    max_model_len: int  # tokens of prompt and answer together
    eos_token_ids: tuple[int, ...]
    weights_bytes: int
    weights_4bit_bytes: int  # the part of weights_bytes held in 4 bit
    pool_bytes: int
    page_bytes: int
    page_tokens: int  # tokens of KV in one page
    num_pages: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    model: ModelCard


class StartupFailed(msgspec.Struct, frozen=True, tag=True):
    message: str


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position, from the logits before temperature."""

    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


class TokenOutput(msgspec.Struct, frozen=True):
    """One step's result for one request."""

    request_id: int
    token_ids: list[int]  # new tokens, usually one; empty when the request failed
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token id when asked for
    finish_reason: FinishReason | None = None
    error_code: str | None = (
        None  # set with finish_reason "error": "adapter_damaged", "adapter_capacity", "internal_error"
    )
    error_message: str | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges of the moment and counters since start."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_kv_pages: int  # held by running requests
    num_cached_pages: int  # prefix cache, reclaimable
    num_adapter_pages: int
    num_resident_adapters: int
    num_steps: int
    num_preemptions: int
    num_adapter_loads: int
    num_adapter_evictions: int
    num_prefix_queries: int  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int  # of those, found


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    outputs: list[TokenOutput]
    stats: EngineStats


FromEngine = StartupProgress | Ready | StartupFailed | StepOutput
