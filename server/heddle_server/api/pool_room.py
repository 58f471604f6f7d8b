"""What the page pool of the loaded base has room for: one adapter, and all that are pinned together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from heddle_adapters.errors import AdapterExceedsPool
from heddle_adapters.tensor_file import WEIGHTS_FILE
from heddle_server.api.errors import PinCapacity
from heddle_server.messages import ModelCard

WIDE_DTYPE = "float32"


class Packable(Protocol):
    """An adapter of which one can tell what its rows take."""

    def estimate_bytes(self, row_dtype_bytes: int) -> int: ...


class PoolRoom:
    """Sizes without alignment: the rows of an adapter that fits may take some pages more."""

    def __init__(self, model: ModelCard) -> None:
        self._model = model

    def bytes_of(self, adapter: Packable) -> int:
        """Its rows and vectors in the dtype that this server computes in."""
        return adapter.estimate_bytes(4 if self._model.dtype == WIDE_DTYPE else 2)

    def pages_of(self, adapter: Packable) -> int:
        return math.ceil(self.bytes_of(adapter) / self._model.page_bytes)

    def share_of(self, adapter: Packable) -> float:
        """The part of the pool that it takes, rounded to a thousandth of a percent."""
        return round(self.pages_of(adapter) / self._model.num_pages, 5)

    @property
    def num_pinnable_pages(self) -> int:
        """All but those that one request of the longest context needs."""
        return self._model.num_pages - math.ceil(self._model.max_model_len / self._model.page_tokens)

    def check_fits(self, adapter: Packable) -> None:
        """Raises `AdapterExceedsPool` for one that could never be on the device."""
        needed = self.bytes_of(adapter)
        if needed > self._model.pool_bytes:
            raise AdapterExceedsPool(
                f"{WEIGHTS_FILE} needs {needed} bytes of the page pool, which has {self._model.pool_bytes}; "
                "start the server with a larger --pool-bytes.",
                param=WEIGHTS_FILE,
            )

    def check_pins(self, pinned: Mapping[str, Packable]) -> None:
        """Raises `PinCapacity` unless all these, by digest, may stay on the device together."""
        needed = sum(self.pages_of(adapter) for adapter in pinned.values())
        if needed > self.num_pinnable_pages:
            page_bytes = self._model.page_bytes
            raise PinCapacity(
                f"All pinned adapters together would need {needed * page_bytes} bytes of the page pool, and "
                f"{max(0, self.num_pinnable_pages) * page_bytes} of its {self._model.num_pages * page_bytes} may be "
                f"pinned: one request of {self._model.max_model_len} tokens must still fit. Pin fewer adapters, or "
                "start the server with a larger --pool-bytes or a smaller --max-model-len.",
                param="pinned",
            )

    def pins_that_fit(self, pinned: Iterable[tuple[str, Packable]]) -> tuple[str, ...]:
        """The digests that may be pinned, in the order given; one that does not fit is passed over."""
        left = self.num_pinnable_pages
        digests: dict[str, None] = {}
        for digest, adapter in pinned:
            pages = self.pages_of(adapter)
            if digest not in digests and pages <= left:
                digests[digest] = None
                left -= pages
        return tuple(digests)
