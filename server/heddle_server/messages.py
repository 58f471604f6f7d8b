"""The messages between the API process and the engine process: msgpack of these structs, nothing else.

The socket carries one encoded `ToEngine` or `FromEngine` per frame.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from heddle_adapters.base_layout import BaseLayout
from heddle_adapters.tier import AdapterMove, CachedAdapter, Tier
from heddle_server.request import Request

FinishReason = Literal["stop", "length", "abort", "error"]


class Generate(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: int


class ForgetAdapter(msgspec.Struct, frozen=True, tag=True):
    """The digest's last name is gone and no request holds it: free what it occupies."""

    adapter_digest: str


class PrepareAdapter(msgspec.Struct, frozen=True, tag=True):
    """Content that was just stored: compile its rows when there is time, so that its first request need not wait."""

    adapter_digest: str


class PinAdapters(msgspec.Struct, frozen=True, tag=True):
    """All adapters that are to stay on the device from now on, in place of those pinned before."""

    tenants: dict[str, str]  # by adapter digest: in whose share of the pool it counts


class DescribeCache(msgspec.Struct, frozen=True, tag=True):
    """Answer with a `CacheReport`."""

    query_id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


ToEngine = Generate | Abort | ForgetAdapter | PrepareAdapter | PinAdapters | DescribeCache | Shutdown


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
    quantized_bytes: int  # the part of weights_bytes that is held quantised, scales included
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


class AdmissionReport(msgspec.Struct, frozen=True):
    """How a request came to its first computation."""

    tier: Tier | None  # where its adapter was when it arrived, the farthest of a mix; None for the base
    load_seconds: float  # from arrival until its adapter was on the device; 0 where it was
    queue_seconds: float  # from arrival until it was first computed, loading included


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
    admission: AdmissionReport | None = None  # with the first token
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # with the first token, if asked for: all but the first's


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
    num_pinned_pages: int  # of adapters that stay by an operator's wish
    num_loading_pages: int  # taken for adapters that are being copied
    adapter_used_bytes: int  # rows and vectors on the device; the rest of their pages is packing waste
    host_bytes: int  # held by the host tier
    host_budget_bytes: int
    num_host_adapters: int
    num_device_hits: int  # requests for an adapter that was on the device when they arrived
    num_host_hits: int  # in host memory
    num_misses: int  # on disk only
    num_adapter_loads: int  # copies to the device
    num_adapter_evictions: int  # adapters dropped from the device
    num_host_evictions: int
    num_prefix_queries: int  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int  # of those, found
    num_prefix_evictions: int  # cached pages given up
    num_segments: int  # over all steps: runs of tokens that share an adapter or the base
    num_computed_tokens: int  # over all steps, prompts and answers together
    step_seconds: float  # spent in steps that computed something
    host_seconds: float  # of those, outside forwards and sampling: planning, building tensors, handing tokens out


class CacheReport(msgspec.Struct, frozen=True, tag=True):
    """What lies in the pool and the host tier at this moment."""

    query_id: int
    policy: str
    adapters: list[CachedAdapter]
    stats: EngineStats


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    outputs: list[TokenOutput]
    moves: list[AdapterMove]
    stats: EngineStats


FromEngine = StartupProgress | Ready | StartupFailed | StepOutput | CacheReport
