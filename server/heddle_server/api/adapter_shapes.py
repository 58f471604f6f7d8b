"""The shapes of what is told of adapters and models, for the description of the API."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from heddle_adapters.method import Combination
from heddle_adapters.store_index import Visibility
from heddle_adapters.tier import Tier
from heddle_server.api.adapter_protocol import Status

UnixSeconds = Annotated[int, Field(description="Unix time in seconds.")]


class Identity(TypedDict):
    """One version of an adapter."""

    version: Annotated[int, Field(ge=1)]
    digest: Annotated[str, Field(description="sha256: of its content, in 64 hex digits.")]


class AdapterContent(TypedDict):
    """What the files are."""

    digest: str
    method: Annotated[str, Field(description="LoRA, rsLoRA, IA3, ...")]
    rank: Annotated[int, Field(ge=0, description="The largest of its sites; 0 without rows.")]
    combination: Annotated[Combination, Field(description="How it can be mixed with others.")]
    sites: Annotated[
        dict[str, int],
        Field(
            description="The modules that it changes: paths with every number as *, to how many there are. Empty: "
            "an older heddle stored it and did not note them."
        ),
    ]
    positions: Annotated[str, Field(description="The tokens of a sequence that it changes, in words.")]
    num_virtual_tokens: Annotated[int, Field(ge=0, description="That it puts before every prompt.")]
    size_bytes: Annotated[int, Field(ge=0, description="Of the weights file.")]
    pool_bytes_estimate: Annotated[
        int | None,
        Field(
            description="Of the page pool: exactly its rows and vectors, keys and values included, without what "
            "alignment and page ends add; null while it is not known."
        ),
    ]
    pool_pages: Annotated[
        int | None, Field(description="Pages that so many bytes fill, a prefix's apart; null while it is not known.")
    ]
    status: Status
    reason: Annotated[str | None, Field(description="Why it is quarantined.")]
    tier: Annotated[Tier, Field(description="Where it is now.")]


class AdapterDetailsShape(TypedDict):
    """What is said about a name."""

    owner: Annotated[str, Field(description="The tenant that changes it.")]
    visibility: Visibility
    pinned: bool
    expires: Annotated[int | None, Field(description="Unix time in seconds; null: never.")]
    tags: list[str]
    description: str
    aliases: Annotated[dict[str, int], Field(description="To the versions that they mean.")]
    num_versions: Annotated[int, Field(ge=0)]


class AdapterCard(AdapterContent, AdapterDetailsShape):
    """What a name means now, or one of its versions."""

    id: Annotated[str, Field(description="The name; of an older version its reference.")]
    object: Literal["adapter"]
    name: str
    version: Annotated[int, Field(ge=1)]
    reference: Annotated[str, Field(description="What means this version for ever.")]
    created: UnixSeconds


class UploadedAdapter(AdapterCard):
    """The adapter as it is stored."""

    is_new_version: Annotated[bool, Field(description="False: the name's newest version had this very content.")]


class ValidatedAdapter(AdapterContent, AdapterDetailsShape):
    """The card that an upload would have got."""

    id: Annotated[str | None, Field(description="Null: the upload gave no name.")]
    object: Literal["adapter"]
    name: str | None
    version: Annotated[int | None, Field(description="Null: the upload would be a new version.")]
    reference: str | None
    created: int | None


class AdapterMemory(TypedDict):
    """What an adapter takes of the page pool."""

    bytes: Annotated[int, Field(ge=0)]
    pages: Annotated[int, Field(ge=0)]
    pool_share: Annotated[float, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)]


class AdapterValidation(TypedDict):
    """What an upload would have come to."""

    object: Literal["adapter.validation"]
    valid: Literal[True]
    card: ValidatedAdapter
    memory: AdapterMemory
    name_exists: bool
    is_new_version: bool
    is_stored: Annotated[bool, Field(description="Whether the owner has this content already.")]
    stored_as: list[str]


class AdapterPage(TypedDict):
    """A page of a list of adapters."""

    object: Literal["list"]
    data: list[AdapterCard]
    first_id: str | None
    last_id: Annotated[str | None, Field(description="What `after` has to be for the next page.")]
    has_more: bool


class VersionCard(AdapterContent):
    """One version, without what is said about its name."""

    id: str
    object: Literal["adapter.version"]
    name: str
    version: Annotated[int, Field(ge=1)]
    reference: str
    created: UnixSeconds
    aliases: Annotated[list[str], Field(description="Those that mean this version.")]


class VersionList(TypedDict):
    """The versions of one adapter, oldest first."""

    object: Literal["list"]
    data: list[VersionCard]


class AliasSet(Identity):
    """What an alias means now."""

    object: Literal["adapter.alias"]
    name: str
    alias: str
    previous: Annotated[Identity | None, Field(description="What it meant before.")]


class AliasRemoved(Identity):
    """What an alias meant."""

    object: Literal["adapter.alias.deleted"]
    name: str
    alias: str
    deleted: Literal[True]


class AdapterDeleted(TypedDict):
    """What is gone."""

    id: str
    object: Literal["adapter.deleted"]
    deleted: Literal[True]
    versions: list[Identity]
    draining: Annotated[int, Field(ge=0, description="Running requests that finish on it.")]


class Model(TypedDict):
    """What a request can name in `model`: the base or an adapter."""

    id: str
    object: Literal["model"]
    created: UnixSeconds
    owned_by: str
    root: Annotated[str, Field(description="Of an adapter its digest.")]
    parent: Annotated[str | None, Field(description="Of an adapter its base.")]
    max_model_len: Annotated[int | None, Field(description="Null while the base loads.")]
    quantization: Annotated[str | None, Field(description="Null while the base loads.")]


class ModelList(TypedDict):
    """All that a request can name."""

    object: Literal["list"]
    data: list[Model]


class ModelDeleted(TypedDict):
    """What is gone."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]
