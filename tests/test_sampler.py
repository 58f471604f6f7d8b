"""Sampling against plain definitions: greedy, distributions, top-k, top-p, seeds, logprobs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from heddle_server.engine.sampler import Sampled, draw, uniform
from heddle_server.request import SamplingParams


def tokens(logits: torch.Tensor, params: list[SamplingParams], positions: list[int]) -> list[Sampled]:
    """What was sampled, all rows being sound."""
    sampled = [token for token in draw(logits, params, positions).read() if token is not None]
    assert len(sampled) == len(params)
    return sampled


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw_many(count: int, **options: float) -> Counter[int]:
    params = [SamplingParams(max_tokens=1, seed=seed, **options) for seed in range(count)]  # type: ignore[arg-type]
    return Counter(token.token_id for token in tokens(LOGITS.repeat(count, 1), params, [0] * count))


def test_zero_temperature_is_greedy() -> None:
    assert draw_many(5, temperature=0.0) == {0: 5}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    count = 20_000
    drawn = draw_many(count, temperature=temperature)
    probabilities = torch.softmax(LOGITS / temperature, dim=-1).tolist()
    chi_square = sum((drawn[t] - count * p) ** 2 / (count * p) for t, p in enumerate(probabilities))
    assert chi_square < 20.5, "5 degrees of freedom, p = 0.001"


def test_top_k_keeps_the_k_best_and_renormalises() -> None:
    count = 20_000
    drawn = draw_many(count, temperature=1.0, top_k=2)
    assert set(drawn) == {0, 1}
    share = torch.softmax(LOGITS[:2], dim=-1)[0].item()
    assert drawn[0] / count == pytest.approx(share, abs=0.015)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities = torch.softmax(LOGITS, dim=-1)
    just_two = (probabilities[0] + probabilities[1]).item()
    assert set(draw_many(3000, temperature=1.0, top_p=just_two - 1e-4)) == {0, 1}
    assert set(draw_many(3000, temperature=1.0, top_p=just_two + 1e-4)) == {0, 1, 2}
    assert set(draw_many(100, temperature=1.0, top_p=1e-9)) == {0}


def test_top_p_counts_the_mass_left_after_top_k() -> None:
    share = torch.softmax(LOGITS[:3], dim=-1)
    limit = (share[0] + share[1]).item() - 1e-4
    assert set(draw_many(3000, temperature=1.0, top_k=3, top_p=limit)) == {0, 1}


def test_a_draw_depends_on_seed_and_position_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 50)
    params = [SamplingParams(max_tokens=1, temperature=1.0, seed=seed) for seed in range(64)]
    together = [token.token_id for token in tokens(logits, params, list(range(64)))]
    alone = [tokens(logits[row : row + 1], [params[row]], [row])[0].token_id for row in range(64)]
    assert together == alone
    moved = [token.token_id for token in tokens(logits, params, [position + 1 for position in range(64)])]
    assert moved != together


def test_uniform_is_uniform_and_fixed_for_all_time() -> None:
    values = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.01)
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    params = [SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=wanted) for wanted in (0, 3)]
    none, three = tokens(LOGITS.repeat(2, 1), params, [0, 0])
    expected = torch.log_softmax(LOGITS, dim=-1)
    assert none.logprobs is not None
    assert none.logprobs.top == ()
    assert none.logprobs.logprob == pytest.approx(expected[0].item())
    assert three.logprobs is not None
    assert [token for token, _ in three.logprobs.top] == [0, 1, 2]
    assert [value for _, value in three.logprobs.top] == pytest.approx(expected[:3].tolist())


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    assert sum(draw_many(50, temperature=temperature).values()) == 50


def test_a_top_p_that_is_zero_in_float32_keeps_the_best_token() -> None:
    assert draw_many(20, temperature=1.0, top_p=1e-50) == {0: 20}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_gets_no_token_and_hurts_no_other(poison: float, temperature: float) -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = poison
    params = [SamplingParams(max_tokens=1, temperature=temperature, seed=5, num_logprobs=1)] * 3
    first, poisoned, last = draw(logits, params, [0, 0, 0]).read()
    assert poisoned is None
    assert first == last == tokens(LOGITS[None], params[:1], [0])[0]


def test_an_excluded_token_is_no_poison() -> None:
    logits = LOGITS.clone()
    logits[0] = -torch.inf
    params = [SamplingParams(max_tokens=1, temperature=1.0, seed=seed) for seed in range(50)]
    assert 0 not in {token.token_id for token in tokens(logits.repeat(50, 1), params, [0] * 50)}
