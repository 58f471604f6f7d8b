"""The parts of a base's weight that some initialisations of LoRA subtract from it before training (peft 0.21).

PiSSA takes the largest singular values' part (`tuners/lora/layer.py:pissa_init`), KaSA the smallest ones'
(`variants.py:KasaLinearVariant`), OLoRA what a QR decomposition's first columns span (`layer.py:olora_init`). Each is
a projection of the weight, so signs and the choice of a basis do not matter, only the space does. PEFT finds it in
float32, with an error that grows as singular values come close; here it is found in float64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.canonical import Floats

RemovedPart = Literal["largest values", "smallest values", "leading columns"]

FLOAT32_EPSILON = 2.0**-23
MAX_UNCERTAINTY = 1e-3  # what float32 rounding may change in the removed part, relative to the whole weight

Doubles = NDArray[np.float64]


def removed_factors(part: RemovedPart, weight: Floats, rank: int) -> tuple[Floats, Floats] | None:
    """B0 [out_features, rank] and A0 [rank, in_features] of the part, from a weight [out_features, in_features].

    None where the weight does not determine it to within `MAX_UNCERTAINTY`. `rank` is at most the weight's least side.
    """
    exact = weight.astype(np.float64)
    if part == "leading columns":
        return _leading_columns(exact, rank)
    return _singular_values(exact, rank, of_largest=part == "largest values")


def _leading_columns(weight: Doubles, rank: int) -> tuple[Floats, Floats] | None:
    basis, triangle = np.linalg.qr(weight[:, :rank])
    lengths = np.abs(np.diagonal(triangle))
    if lengths.max() * FLOAT32_EPSILON >= MAX_UNCERTAINTY * lengths.min():
        return None
    return basis.astype(np.float32), (basis.T @ weight).astype(np.float32)


def _singular_values(weight: Doubles, rank: int, of_largest: bool) -> tuple[Floats, Floats] | None:
    out_features, in_features = weight.shape
    is_tall = out_features > in_features
    squares, vectors = np.linalg.eigh(weight.T @ weight if is_tall else weight @ weight.T)  # ascending
    values = np.sqrt(np.maximum(squares, 0))
    first = len(values) - rank if of_largest else 0
    if not _is_determined(values, first if of_largest else rank):
        return None
    basis = vectors[:, first : first + rank]
    b, a = (weight @ basis, basis.T) if is_tall else (basis, basis.T @ weight)
    return b.astype(np.float32), a.astype(np.float32)


def _is_determined(values: Doubles, border: int) -> bool:
    """Whether float32 can tell the directions of the singular values below the border from those above it.

    Rounding turns neighbouring directions into each other by about epsilon * largest / gap, and a direction that is
    on the wrong side takes its singular value there.
    """
    if not 0 < border < len(values):
        return True
    below, above, largest = values[border - 1], values[border], values[-1]
    turn = FLOAT32_EPSILON * largest / (above - below) if above > below else 1.0
    return bool(above * min(turn, 1.0) <= MAX_UNCERTAINTY * largest)
