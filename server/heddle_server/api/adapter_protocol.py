"""The wire types of /v1/adapters beside uploads: changes to an adapter, where an alias points, which ones to list."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heddle_adapters.store_index import AdapterDetails
from heddle_adapters.tier import Tier
from heddle_server.api.errors import InvalidRequest
from heddle_server.api.wire_fields import WireModel

MAX_PAGE = 1000
MAX_TEXT = 256

Status = Literal["ready", "quarantined"]


class AdapterChanges(WireModel):
    """PATCH /v1/adapters/{name}: what is left out or null stays as it is."""

    description: str | None = None
    tags: list[str] | None = None
    pinned: bool | None = None
    ttl_seconds: Annotated[int | None, Field(description="From now on; 0: for ever.")] = None

    @property
    def details(self) -> AdapterDetails:
        """Raises `AdapterError` for what is out of bounds."""
        return AdapterDetails(
            description=self.description,
            tags=None if self.tags is None else tuple(self.tags),
            is_pinned=self.pinned,
            ttl_seconds=self.ttl_seconds,
        )


class AliasTarget(WireModel):
    """PUT /v1/adapters/{name}/aliases/{alias}: a version of the same adapter, by number or by what else names it."""

    version: Annotated[int | None, Field(ge=1, le=2**63 - 1)] = None
    target: Annotated[str | None, Field(max_length=MAX_TEXT, description="'3', 'prod' or 'sha256:...'")] = None

    @property
    def selector(self) -> str:
        """Raises `InvalidRequest` unless exactly one of the two is given."""
        if self.version is not None and self.target is None:
            return str(self.version)
        if self.target is not None and self.version is None:
            return self.target
        message = """Say what the alias is to mean with either {"version": 3} or {"target": "prod"}."""
        raise InvalidRequest(message, param="target")


class ListQuery(BaseModel):
    """GET /v1/adapters: which adapters, in which order, and which page of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 100
    after: Annotated[str | None, Field(max_length=MAX_TEXT, description="The name after which the page begins.")] = None
    order: Literal["asc", "desc"] = "asc"
    q: Annotated[str | None, Field(max_length=MAX_TEXT, description="Part of the name.")] = None
    tag: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    method: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    status: Status | None = None
    tier: Tier | None = None
    pinned: bool | None = None
