"""What is told of an adapter over HTTP: the card of a name or of one version, and the report of a dry run."""

from __future__ import annotations

from typing import Any

from heddle_adapters.checkpoint import Checkpoint
from heddle_adapters.positions import Positions
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterRecord, AdapterVersion
from heddle_server.api.adapter_protocol import Status
from heddle_server.api.engine_client import EngineClient
from heddle_server.api.pool_room import PoolRoom
from heddle_server.api.registry import Validation


class AdapterCards:
    """Looks at the store and at what the engine last told; never waits."""

    def __init__(self, store: AdapterStore, engine: EngineClient) -> None:
        self._store = store
        self._engine = engine

    def of_record(self, record: AdapterRecord) -> dict[str, Any]:
        """What a name means now, and what is said about it."""
        return self._card(record.latest, record)

    def of_reference(self, reference: str, tenant: str) -> dict[str, Any]:
        """The version that a reference means to a tenant, and what is said about its name; raises `AdapterNotFound`."""
        version = self._store.resolve(reference, tenant)
        return self._card(version, self._store.record(version.name, tenant))

    def of_upload(self, version: AdapterVersion) -> dict[str, Any]:
        """The version that was just stored, even if somebody else has deleted it since."""
        return self._card(version, self._store.own(version.name, version.owner))

    def of_version(self, version: AdapterVersion, record: AdapterRecord) -> dict[str, Any]:
        """One version of a name, without what is said about the name as a whole."""
        aliases = {"aliases": list(record.aliases_of(version))}
        return {"id": version.reference, "object": "adapter.version", **self._version(version), **aliases}

    def of_validation(self, validation: Validation, room: PoolRoom) -> dict[str, Any]:
        """The card that an upload would have got, and what it would take of the page pool.

        The number of a new version is decided by the upload, so that `version` and `reference` are null.
        """
        checkpoint, record = validation.checkpoint, validation.record
        existing = None if record is None or validation.is_new_version else record.latest
        card = {
            "id": validation.name,
            "object": "adapter",
            "name": validation.name,
            "version": existing.version if existing else None,
            "reference": existing.reference if existing else None,
            **self._content(checkpoint),
            "status": "ready",
            "reason": None,
            # Where another tenant's same content lies is nobody else's business.
            "tier": self._engine.tier_of(checkpoint.digest) if validation.references else "disk",
            "created": existing.created_unix_seconds if existing else None,
            **_details(validation.owner, record),
        }
        return {
            "object": "adapter.validation",
            "valid": True,
            "card": {**card, **_announced(validation)},
            "memory": {
                "bytes": room.bytes_of(checkpoint),
                "pages": room.pages_of(checkpoint),
                "pool_share": room.share_of(checkpoint),
                "rows": checkpoint.num_rows,
            },
            "name_exists": record is not None,
            "is_new_version": validation.is_new_version,
            "is_stored": bool(validation.references),
            "stored_as": list(validation.references),
        }

    def status_of(self, digest: str) -> Status:
        return "ready" if self._store.quarantine_reason(digest) is None else "quarantined"

    def _card(self, version: AdapterVersion, record: AdapterRecord | None) -> dict[str, Any]:
        is_latest = record is None or record.latest == version
        return {
            "id": version.name if is_latest else version.reference,
            "object": "adapter",
            **self._version(version),
            **_details(version.owner, record),
        }

    def _version(self, version: AdapterVersion) -> dict[str, Any]:
        return {
            "name": version.name,
            "version": version.version,
            "reference": version.reference,
            **self._content(version),
            "status": self.status_of(version.digest),
            "reason": self._store.quarantine_reason(version.digest),
            "tier": self._engine.tier_of(version.digest),
            "created": version.created_unix_seconds,
        }

    def _content(self, adapter: AdapterVersion | Checkpoint) -> dict[str, Any]:
        model = self._engine.model
        room = PoolRoom(model) if model is not None and adapter.num_row_values + adapter.num_vector_values else None
        return {
            "digest": adapter.digest,
            "method": adapter.method,
            "rank": adapter.max_rank,
            "combination": adapter.combination,
            "sites": dict(adapter.sites_by_pattern),
            "positions": positions_text(adapter.positions),
            "num_virtual_tokens": adapter.num_virtual_tokens,
            "size_bytes": adapter.size_bytes,
            "pool_bytes_estimate": None if room is None else room.bytes_of(adapter),
            "pool_pages": None if room is None else room.pages_of(adapter),
        }


def positions_text(positions: Positions) -> str:
    """What an adapter acts on, for people."""
    if positions.are_all:
        return "all tokens"
    if positions.invocation:
        return "its invocation and all that follows"
    ends = {"first": positions.num_first, "last": positions.num_last}
    named = " and ".join(f"the {end} {number}" for end, number in ends.items() if number)
    return f"{named} {'token' if sum(ends.values()) == 1 else 'tokens'} of the prompt"


def _details(owner: str, record: AdapterRecord | None) -> dict[str, Any]:
    """What is said about a name; for one that does not exist, what is said about it by default."""
    return {
        "owner": owner,
        "visibility": record.visibility if record else "private",
        "pinned": record.is_pinned if record else False,
        "expires": record.expires_unix_seconds if record else None,
        "tags": list(record.tags) if record else [],
        "description": record.description if record else "",
        "aliases": dict(record.aliases) if record else {},
        "num_versions": record.num_versions if record else 0,
    }


def _announced(validation: Validation) -> dict[str, Any]:
    """What the upload itself says about the name; its alias and time to live begin with the real upload."""
    said = validation.details
    announced = {
        "tags": said.tags,
        "description": said.description,
        "pinned": said.is_pinned,
        "visibility": said.visibility,
    }
    return {field: value for field, value in announced.items() if value is not None}
