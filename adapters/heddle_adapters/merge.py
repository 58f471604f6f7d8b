"""Several adapters made into one, on what they add to each weight: linear, TIES and DARE.

What is merged are the deltas, each times its part's weight, and never the factors that they are products of:

    linear        their sum
    ties          each delta keeps the share `density` of its elements that are largest; at each element the sign of the
                  sum is elected, and the mean is taken of those that have it (TIES, arXiv 2306.01708, section 3)
    dare_linear   each delta loses all but the share `density` of its elements, at random, and what stays is divided by
                  it; then their sum (DARE, arXiv 2311.03099, section 3)
    dare_ties     the same loss, then the election and the mean

Sums of rows are rows, exactly. Anything else is a matrix, given by its elements that are not zero, or brought to a
rank by a singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.base_layout import BaseLayout, Site
from heddle_adapters.canonical import CompiledAdapter, Floats, Rows, SiteUpdate
from heddle_adapters.checkpoint import Checkpoint
from heddle_adapters.errors import AdapterError, listed

MergeMethod = Literal["linear", "ties", "dare_linear", "dare_ties"]

# Of the search for the largest singular vectors: at these two a flat spectrum's error is within 1 % of the least.
OVERSAMPLING = 8
POWER_ITERATIONS = 4


@dataclass(frozen=True)
class MergePart:
    """One adapter of a merge."""

    name: str
    checkpoint: Checkpoint
    weight: float


@dataclass(frozen=True)
class Recipe:
    """How the parts become one."""

    method: MergeMethod
    density: float = 1.0  # share of each delta's elements that stay; unused by linear
    seed: int = 0  # of what is lost at random, and of the search for singular vectors
    rank: int | None = None  # of the result; None: exact


@dataclass(frozen=True)
class SparseDelta:
    """A matrix by its elements that are not zero."""

    shape: tuple[int, int]  # [out_features, in_features]
    places: NDArray[np.int64]  # counted row by row, ascending
    values: Floats


@dataclass(frozen=True)
class Merged:
    """What came of it, by module path: rows everywhere, or elements everywhere."""

    rows: Mapping[str, Rows]  # with gains of 1
    elements: Mapping[str, SparseDelta]
    relative_error: float  # of the result against the merge itself: root of the sums of squares; 0 where exact


def merge(parts: Sequence[MergePart], recipe: Recipe, base: BaseLayout) -> Merged:
    """Merges adapters that only add; raises `AdapterError` for those that do anything else."""
    _check(parts, base)
    changed = {path for part in parts for path in part.checkpoint.sites}
    sites = [site for site in base.sites if site.path in changed]
    if recipe.method == "linear" and recipe.rank is None and not any(part.checkpoint.is_dense for part in parts):
        return Merged({site.path: _row_sum(parts, site) for site in sites}, {}, 0.0)
    generator = np.random.default_rng(recipe.seed)
    rows, elements = dict[str, Rows](), dict[str, SparseDelta]()
    squares, lost_squares = 0.0, 0.0
    for site in sites:
        delta = _merged_delta(parts, site, recipe, generator)
        if recipe.rank is None:
            places = np.flatnonzero(delta)
            elements[site.path] = SparseDelta((site.out_features, site.in_features), places, delta.reshape(-1)[places])
            continue
        found = rows[site.path] = nearest_of_rank(delta, recipe.rank, generator)
        squares += float(np.square(delta).sum(dtype=np.float64))
        lost_squares += float(np.square(delta - found.b.T @ found.a).sum(dtype=np.float64))
    return Merged(rows, elements, (lost_squares / squares) ** 0.5 if squares else 0.0)


def ties(deltas: Sequence[Floats]) -> Floats:
    """At each element the mean of those that have the sign of the sum."""
    elected = np.sign(np.sum(deltas, axis=0))
    total, count = np.zeros_like(deltas[0]), np.zeros(deltas[0].shape, np.int32)
    for delta in deltas:
        agrees = (np.sign(delta) == elected) & (delta != 0)
        total += np.where(agrees, delta, 0)
        count += agrees
    return np.asarray(total / np.maximum(count, 1), np.float32)


def trimmed(delta: Floats, density: float) -> Floats:
    """The share `density` of the elements that are largest, the others zero."""
    num_kept = max(1, int(density * delta.size))
    sizes = np.abs(delta).reshape(-1)
    kept = np.argpartition(sizes, delta.size - num_kept)[delta.size - num_kept :]
    result = np.zeros_like(delta)
    result.reshape(-1)[kept] = delta.reshape(-1)[kept]
    return result


def dropped(delta: Floats, density: float, generator: np.random.Generator) -> Floats:
    """Each element divided by `density` with that probability, zero otherwise."""
    stays = generator.random(delta.shape, np.float32) < density
    return np.where(stays, delta / np.float32(density), np.float32(0))


def nearest_of_rank(delta: Floats, rank: int, generator: np.random.Generator) -> Rows:
    """The largest singular vectors, found by subspace iteration (Halko et al. 2011, algorithm 4.4)."""
    width = min(rank + OVERSAMPLING, *delta.shape)
    basis = np.linalg.qr(delta @ generator.standard_normal((delta.shape[1], width), np.float32)).Q
    for _ in range(POWER_ITERATIONS):
        basis = np.linalg.qr(delta @ np.linalg.qr(delta.T @ basis).Q).Q
    left, values, right = np.linalg.svd(basis.T @ delta, full_matrices=False)
    roots = np.sqrt(values[:rank])  # half of each value on either side, so that both are of one size
    return Rows.of(roots[:, None] * right[:rank], (basis @ left[:, :rank] * roots).T)


def _check(parts: Sequence[MergePart], base: BaseLayout) -> None:
    linear = base.by_path("linear")
    for part in parts:
        checkpoint = part.checkpoint
        if checkpoint.combination == "product" or checkpoint.num_vector_values or checkpoint.num_virtual_tokens:
            _refuse(part, "it also scales channels, shifts outputs or brings tokens")
        if not checkpoint.positions.are_all:
            _refuse(part, "it changes certain tokens of a sequence only")
        others = [path for path in checkpoint.sites if path not in linear]
        if others or any(not source.site for source in checkpoint.sources):
            _refuse(part, f"it changes more than linear layers: {listed(others or ['attention'])}")


def _refuse(part: MergePart, reason: str) -> NoReturn:
    raise AdapterError(
        f"{part.name} ({part.checkpoint.method}) cannot be merged, for {reason}; merge adapters that add to the "
        "weights of linear layers and do nothing else."
    )


def _row_sum(parts: Sequence[MergePart], site: Site) -> Rows:
    """All parts' rows, one below the other, their gains and weights in b."""
    found = [(part.weight, rows) for part, update in _updates(parts, site) if (rows := update.rows) is not None]
    a = np.concatenate([rows.a for _, rows in found])
    return Rows.of(a, np.concatenate([weight * rows.gain[:, None] * rows.b for weight, rows in found]))


def _merged_delta(parts: Sequence[MergePart], site: Site, recipe: Recipe, generator: np.random.Generator) -> Floats:
    """[out_features, in_features]"""
    deltas = [_delta(update, site) * np.float32(part.weight) for part, update in _updates(parts, site)]
    if recipe.method == "ties":
        return ties([trimmed(delta, recipe.density) for delta in deltas])
    if recipe.method in ("dare_linear", "dare_ties"):
        deltas = [dropped(delta, recipe.density, generator) for delta in deltas]
    return ties(deltas) if recipe.method == "dare_ties" else np.asarray(np.sum(deltas, axis=0), np.float32)


def _delta(update: SiteUpdate, site: Site) -> Floats:
    delta = np.zeros((site.out_features, site.in_features), np.float32) if update.delta is None else update.delta
    rows = update.rows
    return delta if rows is None else np.asarray(delta + (rows.gain[:, None] * rows.b).T @ rows.a, np.float32)


def _updates(parts: Sequence[MergePart], site: Site) -> Iterator[tuple[MergePart, SiteUpdate]]:
    """What each part does at one site, for the parts that do something there; read when asked for."""
    for part in parts:
        sources = [source for source in part.checkpoint.sources if source.site == site.path]
        if not sources:
            continue
        built = (source.build(part.checkpoint.content.file, _NoWeights(part)) for source in sources)
        (update,) = CompiledAdapter.of(part.checkpoint.digest, built, part.checkpoint.positions).updates
        if update.rows is not None and (update.rows.activation.any() or update.rows.c.any()):
            _refuse(part, "what it adds is no linear function of a layer's input")
        yield part, update


@dataclass(frozen=True)
class _NoWeights:
    """The base's weights, which nothing here has."""

    part: MergePart

    def weight(self, path: str) -> Floats:
        _refuse(self.part, "what it adds depends on the base's own weights")

    def bias(self, path: str) -> Floats | None:
        _refuse(self.part, "what it adds depends on the base's own weights")
