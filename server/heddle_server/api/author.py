"""Somebody who changes adapters over HTTP: bounded by a quota, and every change in the audit log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from heddle_adapters.author import Author
from heddle_adapters.errors import NotTheOwner
from heddle_adapters.store_index import AdapterRecord, AdapterVersion
from heddle_server.api.actor import Actor
from heddle_server.api.errors import InsufficientScope, kind_of
from heddle_server.api.quota import Quota
from heddle_server.audit_log import AuditEntry, AuditLog
from heddle_server.key_store import ADMIN

MAX_NAME_CHARS = 256  # of one that may be none
_NOTHING_SAID: Mapping[str, object] = {"visibility": "private", "pinned": False}


class AuditedAuthor(Author):
    """One change by one actor."""

    def __init__(
        self,
        action: str,
        actor: Actor,
        audit: AuditLog,
        quota: Quota | None = None,
        check_pin: Callable[[AdapterVersion], None] = lambda version: None,
    ) -> None:
        """`action` as the log calls it; without a `quota` nothing bounds it.

        `check_pin` raises where an owner's adapter cannot stay on the device in place of what its name meant before.
        """
        super().__init__(actor.owner)
        self._audit = audit
        self._quota = quota
        self._check_pin = check_pin
        principal = actor.principal
        self._is_operator = actor.is_operator
        self._entry = AuditEntry(
            action,
            tenant=principal.tenant if principal else None,
            key_id=principal.key_id if principal else None,
            request_id=actor.request_id,
        )

    def permit(self, before: AdapterRecord | None, after: AdapterRecord, owned: Sequence[AdapterRecord]) -> None:
        if after.is_public and not (before and before.is_public) and not self._is_operator:
            raise InsufficientScope(
                f"Making an adapter public takes its name for every tenant and needs a key with the scope {ADMIN!r}. "
                "Ask the server's operator to publish it.",
                param="visibility",
            )
        if after.is_pinned and not (before and before.is_pinned and before.latest.digest == after.latest.digest):
            self._check_pin(after.latest)
        if self._quota is not None:
            self._quota.check(after, owned)

    def record(self, before: AdapterRecord | None, after: AdapterRecord | None) -> None:
        record = after or before
        assert record is not None
        entry = replace(self._entry, owner=record.owner, name=record.name, detail=_differences(before, after))
        gone = _gone(before, after)
        is_new = after is not None and (before is None or after.latest.version > before.latest.version)
        if after is None or (gone and not is_new):
            self._audit.append([_of_version(entry, version) for version in gone])
            return
        # An upload takes old versions away where few are kept, and all where the name's time was up.
        is_expired = before is not None and before.is_expired(after.latest.created_unix_seconds)
        dropped = replace(entry, action="adapter.expire" if is_expired else "adapter.drop", detail=None)
        self._audit.append([*(_of_version(dropped, each) for each in gone), _of_version(entry, after.latest)])

    def record_refusal(self, name: str | None, error: Exception) -> None:
        """The change was not made, and the error says why."""
        owner = error.owner if isinstance(error, NotTheOwner) else self.owner
        shown = None if name is None else name[:MAX_NAME_CHARS]
        self._audit.append([replace(self._entry, owner=owner, name=shown, outcome=kind_of(error).code)])


def _gone(before: AdapterRecord | None, after: AdapterRecord | None) -> Sequence[AdapterVersion]:
    """The versions that are there no more; content that is put again keeps its number."""
    kept = {version.version for version in after.versions} if after else set()
    return [version for version in before.versions if version.version not in kept] if before else []


def _of_version(entry: AuditEntry, version: AdapterVersion) -> AuditEntry:
    return replace(entry, version=version.version, digest=version.digest)


def _differences(before: AdapterRecord | None, after: AdapterRecord | None) -> str | None:
    """What is said about a name now and was not before; its description and tags are left to the index."""
    if after is None:
        return None
    old = _details(before) if before else _NOTHING_SAID
    new = _details(after)
    changed = [what for what in sorted({*old, *new}) if old.get(what) != new.get(what)]
    return ", ".join(f"{what}: {old.get(what)} -> {new.get(what)}" for what in changed) or None


def _details(record: AdapterRecord) -> Mapping[str, object]:
    return {
        **{f"alias {alias}": number for alias, number in record.aliases.items()},
        "visibility": record.visibility,
        "pinned": record.is_pinned,
        "expires": record.expires_unix_seconds,
    }
