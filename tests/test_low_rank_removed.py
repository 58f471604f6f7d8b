"""The parts that PiSSA, KaSA and OLoRA take from a weight: the same as PEFT takes, or said to be undetermined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heddle_adapters.canonical import Floats
from heddle_adapters.methods.removed_parts import MAX_UNCERTAINTY, RemovedPart, removed_factors

WIDTH, RANK = 48, 4


def weight_of(values: Floats, out_features: int = WIDTH, seed: int = 0) -> Floats:
    """A weight [out_features, 48] of these singular values, in random directions."""
    generator = np.random.default_rng(seed)
    u, v = (np.linalg.qr(generator.standard_normal((size, len(values))))[0] for size in (out_features, WIDTH))
    return np.asarray((u * values) @ v.T, np.float32)


def taken_by_torch(part: RemovedPart, weight: Floats, rank: int = RANK) -> Floats:
    """As PEFT takes it, in float32."""
    matrix = torch.from_numpy(weight)
    if part == "leading columns":
        q, r = torch.linalg.qr(matrix)
        taken = q[:, :rank] @ r[:rank]
        return np.asarray(taken)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    chosen = slice(0, rank) if part == "largest values" else slice(len(values) - rank, None)
    return np.asarray((u[:, chosen] * values[chosen]) @ vt[chosen])


PARTS: tuple[RemovedPart, ...] = ("largest values", "smallest values", "leading columns")


@pytest.mark.parametrize("out_features", [32, 48, 96])
@pytest.mark.parametrize("part", PARTS)
def test_the_part_that_peft_takes(part: RemovedPart, out_features: int) -> None:
    weight = weight_of(np.linspace(1, 3, min(out_features, WIDTH), dtype=np.float32), out_features)
    factors = removed_factors(part, weight, RANK)
    assert factors is not None
    b, a = factors
    assert (b.shape, a.shape) == ((out_features, RANK), (RANK, WIDTH))
    np.testing.assert_allclose(b @ a, taken_by_torch(part, weight), atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", PARTS)
def test_signs_and_bases_do_not_matter(part: RemovedPart) -> None:
    """The same weight from another machine's decomposition: each pair of vectors may have the other sign."""
    values = np.linspace(1, 3, WIDTH, dtype=np.float32)
    generator = np.random.default_rng(1)
    u, v = (np.linalg.qr(generator.standard_normal((WIDTH, WIDTH)))[0] for _ in range(2))
    signs = generator.choice([-1.0, 1.0], WIDTH)
    one, other = (u * values) @ v.T, (u * signs * values) @ (v * signs).T
    products = []
    for weight in (one, other):
        factors = removed_factors(part, weight.astype(np.float32), RANK)
        assert factors is not None
        products.append(factors[0] @ factors[1])
    np.testing.assert_allclose(products[0], products[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 3e-4])
def test_close_singular_values_cost_what_is_said(gap: float) -> None:
    """float32 may turn the border's directions into each other by epsilon * largest / gap; no more was measured."""
    values = np.array([4, 3, 2, 1 + gap, 1, *np.linspace(0.5, 0.1, WIDTH - 5)], np.float32)
    errors = []
    for seed in range(5):
        weight = weight_of(values, seed=seed)
        factors = removed_factors("largest values", weight, RANK)
        assert factors is not None
        errors.append(np.linalg.norm(factors[0] @ factors[1] - taken_by_torch("largest values", weight), 2))
    assert max(errors) <= 4 * 2.0**-23 * 4 / gap
    assert max(errors) <= 4 * MAX_UNCERTAINTY * 4


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5])
def test_equal_singular_values_determine_nothing(gap: float) -> None:
    largest = np.array([4, 3, 2, 1 + gap, 1, *np.linspace(0.5, 0.1, WIDTH - 5)], np.float32)
    smallest = np.array([*np.linspace(4, 3, WIDTH - 4), 1 + gap, 1, 0.8, 0.6], np.float32)
    assert removed_factors("largest values", weight_of(largest), RANK) is None
    assert removed_factors("smallest values", weight_of(smallest), 3) is None


def test_what_hardly_matters_need_not_be_determined() -> None:
    values = np.array([*np.linspace(4, 3, WIDTH - 8), *[1e-5] * 8], np.float32)
    assert removed_factors("smallest values", weight_of(values), RANK) is not None


def test_dependent_columns_determine_no_leading_ones() -> None:
    weight = weight_of(np.linspace(1, 3, WIDTH, dtype=np.float32))
    weight[:, 1] = weight[:, 0]
    assert removed_factors("leading columns", weight, RANK) is None
    assert removed_factors("leading columns", np.zeros((WIDTH, WIDTH), np.float32), RANK) is None


def test_the_whole_weight_can_be_taken() -> None:
    weight = weight_of(np.ones(WIDTH, np.float32))
    factors = removed_factors("largest values", weight, WIDTH)
    assert factors is not None
    np.testing.assert_allclose(factors[0] @ factors[1], weight, atol=1e-5)
