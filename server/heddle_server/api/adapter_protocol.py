"""The wire types of /v1/adapters beside uploads: changes to an adapter, where an alias points, which ones to list."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heddle_adapters.store_index import (
    MAX_DESCRIPTION_CHARS,
    MAX_TAG_CHARS,
    MAX_TAGS,
    MAX_TTL_SECONDS,
    AdapterDetails,
    Visibility,
)
from heddle_adapters.tier import Tier
from heddle_server.api.errors import InvalidRequest
from heddle_server.api.wire_fields import WireModel
from heddle_server.key_store import TENANT

MAX_PAGE = 1000
MAX_TEXT = 256

Owner = Annotated[
    str | None,
    Field(
        max_length=MAX_TEXT,
        description="As which tenant to act; needs the scope admin unless it is your own.",
        json_schema_extra={"pattern": f"^{TENANT.pattern}$"},
    ),
]
Status = Literal["ready", "quarantined"]


class AdapterChanges(WireModel):
    """PATCH /v1/adapters/{name}: what is left out or null stays as it is."""

    # The bounds are for the description only: `details` tells what breaks them.
    description: Annotated[str | None, Field(json_schema_extra={"maxLength": MAX_DESCRIPTION_CHARS})] = None
    tags: Annotated[
        list[
            Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": MAX_TAG_CHARS, "pattern": "^[^,]*$"})]
        ]
        | None,
        Field(json_schema_extra={"maxItems": MAX_TAGS}),
    ] = None
    pinned: bool | None = None
    ttl_seconds: Annotated[
        int | None,
        Field(description="From now on; 0: for ever.", json_schema_extra={"minimum": 0, "maximum": MAX_TTL_SECONDS}),
    ] = None
    visibility: Annotated[Visibility | None, Field(description="public: every tenant may use it.")] = None

    @property
    def details(self) -> AdapterDetails:
        """Raises `AdapterError` for what is out of bounds."""
        return AdapterDetails(
            description=self.description,
            tags=None if self.tags is None else tuple(self.tags),
            is_pinned=self.pinned,
            ttl_seconds=self.ttl_seconds,
            visibility=self.visibility,
        )


class AliasTarget(WireModel):
    """PUT /v1/adapters/{name}/aliases/{alias}: a version of the same adapter, by number or by what else names it."""

    model_config = ConfigDict(
        **WireModel.model_config,
        json_schema_extra={
            "oneOf": [
                {"properties": {"version": {"type": "integer"}}, "required": ["version"]},
                {"properties": {"target": {"type": "string"}}, "required": ["target"]},
            ]
        },
    )

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

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE, description="How many at most.")] = 100
    after: Annotated[str | None, Field(max_length=MAX_TEXT, description="The name after which the page begins.")] = None
    order: Annotated[Literal["asc", "desc"], Field(description="By name.")] = "asc"
    q: Annotated[str | None, Field(max_length=MAX_TEXT, description="Part of the name.")] = None
    tag: Annotated[str | None, Field(max_length=MAX_TEXT, description="One of its tags.")] = None
    method: Annotated[str | None, Field(max_length=MAX_TEXT, description="LoRA, rsLoRA, IA3, ...")] = None
    status: Status | None = None
    tier: Tier | None = None
    pinned: bool | None = None
    visibility: Visibility | None = None
    owner: Owner = None
