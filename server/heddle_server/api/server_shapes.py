"""The shapes of what the server tells of itself, errors among it, for the description of the API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from heddle_adapters.tier import Tier
from heddle_server.config import EvictionName

Count = Annotated[int, Field(ge=0)]


class ErrorDetails(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: Annotated[str | None, Field(description="The field that was wrong.")]
    code: str


class ErrorReply(TypedDict):
    """OpenAI's envelope around every error."""

    error: ErrorDetails


class Alive(TypedDict):
    """The process turns."""

    status: Literal["ok"]


class IsReady(TypedDict):
    """Requests can be answered."""

    status: Literal["ready"]


class Version(TypedDict):
    """Which heddle it is."""

    version: str


class PagesByKind(TypedDict):
    """What the pool's pages hold."""

    free: Count
    kv: Count
    cached: Count
    adapter: Count
    loading: Count


class Pool(TypedDict):
    """The page pool."""

    num_pages: Count
    page_bytes: Count
    pages: PagesByKind
    pinned_pages: Count
    num_adapters: Count
    adapter_used_bytes: Count
    packing_waste: Annotated[float, Field(description="The part of the adapters' pages that holds nothing.")]


class HostMemory(TypedDict):
    """Adapters beside the device."""

    num_adapters: Count
    bytes: Count
    budget_bytes: Count


class RequestsNow(TypedDict):
    """Requests in the engine, of all tenants. Only an admin is told."""

    running: Count | None
    waiting: Count | None


class ByTier(TypedDict):
    """Requests by where their adapter was."""

    device: Count
    host: Count
    disk: Count


class Evictions(TypedDict):
    """Adapters that had to leave."""

    device: Count
    host: Count


class Counters(TypedDict):
    """What has happened since the engine started."""

    requests_by_tier: ByTier
    adapter_loads: Count
    adapter_evictions: Evictions
    prefix_queries: Count
    prefix_hits: Count
    prefix_evictions: Count
    preemptions: Count
    steps: Count
    step_seconds: Annotated[float, Field(ge=0)]
    host_seconds: Annotated[float, Field(ge=0)]
    segments: Count
    computed_tokens: Count


class AdapterInMemory(TypedDict):
    """An adapter nearer than the disk. How it is used only an admin is told."""

    digest: str
    names: list[str]
    tier: Tier
    pages: Count
    size_bytes: Count
    references: Annotated[int | None, Field(description="Running requests that use it.")]
    waiting: Annotated[int | None, Field(description="Requests that wait for it.")]
    pinned: bool
    uses: int | None
    idle_seconds: float | None


class CacheContents(TypedDict):
    """What lies in the page pool and in host memory."""

    object: Literal["cache"]
    policy: EvictionName
    pool: Pool
    host: HostMemory
    requests: RequestsNow
    counters: Annotated[Counters | None, Field(description="Of all tenants; only an admin is told.")]
    num_adapters: Count
    num_other_adapters: Annotated[int, Field(ge=0, description="Those that the asker may not know of.")]
    adapters: list[AdapterInMemory]
