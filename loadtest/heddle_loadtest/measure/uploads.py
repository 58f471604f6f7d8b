"""The adapters uploaded during a run, boiled down. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heddle_loadtest.measure.distribution import Distribution
from heddle_loadtest.run.outcome import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadNumbers:
    """Times are those of the uploads that succeeded, from when they were due."""

    num_ok: int
    num_failed: int
    seconds: Distribution | None
    error_example: str | None  # the first failure's

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return {
            "num_ok": self.num_ok,
            "num_failed": self.num_failed,
            "seconds": self.seconds.to_json() if self.seconds else None,
            "error_example": self.error_example,
        }


def upload_numbers(outcomes: Sequence[Outcome]) -> UploadNumbers | None:
    """The uploads of all repeats; None if there were none."""
    uploads = [upload for outcome in outcomes for upload in outcome.uploads]
    if not uploads:
        return None
    good = [upload for upload in uploads if upload.error is None]
    return UploadNumbers(
        num_ok=len(good),
        num_failed=len(uploads) - len(good),
        seconds=Distribution.of(upload.finished_seconds - upload.scheduled_seconds for upload in good),
        error_example=next((upload.error for upload in uploads if upload.error is not None), None),
    )
