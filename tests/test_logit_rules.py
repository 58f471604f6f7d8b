"""Penalties, biases, least lengths: against transformers' own processors, or a definition of one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MinNewTokensLengthLogitsProcessor, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from engine_driver import make_request
from heddle_server.engine.logit_rules import HELD_BACK, change_logits
from heddle_server.engine.sampler import draw
from heddle_server.engine.sequence import Sequence

VOCABULARY = 50
PROMPT = [3, 3, 7, 12]
ANSWER = [7, 9, 9, 9, 20]
EOS = (1, 2)


def sequence(answer: list[int] = ANSWER, **sampling: object) -> Sequence:
    started = Sequence.of(make_request(PROMPT, max_tokens=100, **sampling))  # type: ignore[arg-type]
    for token_id in answer:
        started.append(token_id)
    return started


def changed_logits(rows: Tensor, sequences: list[Sequence]) -> Tensor:
    changed = rows.clone()
    change_logits(changed, sequences, EOS)
    return changed


def logits(num_rows: int = 1) -> Tensor:
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3


def test_nothing_asked_for_is_nothing_done() -> None:
    rows = logits(3)
    assert torch.equal(changed_logits(rows, [sequence()] * 3), rows)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_is_penalised_as_transformers_does(penalty: float) -> None:
    (changed,) = changed_logits(logits(), [sequence(repetition_penalty=penalty)])
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([PROMPT + ANSWER]), logits().clone())[0]
    torch.testing.assert_close(changed, expected)


def test_presence_counts_once_and_frequency_every_time_in_the_answer_alone() -> None:
    (changed,) = changed_logits(logits(), [sequence(presence_penalty=0.5, frequency_penalty=-0.25)])
    taken = (logits()[0] - changed).tolist()
    expected = [0.0] * VOCABULARY
    for token_id in set(ANSWER):
        expected[token_id] = 0.5 - 0.25 * ANSWER.count(token_id)
    assert taken == pytest.approx(expected, abs=1e-6)


def test_a_first_token_has_nothing_to_be_penalised_for() -> None:
    (changed,) = changed_logits(logits(), [sequence([], presence_penalty=2.0, frequency_penalty=2.0)])
    assert torch.equal(changed, logits()[0])


def test_a_bias_is_added() -> None:
    (changed,) = changed_logits(logits(), [sequence(logit_bias=((5, 100.0), (6, -100.0), (0, 0.5)))])
    difference = changed - logits()[0]
    assert difference[[5, 6, 0]].tolist() == pytest.approx([100.0, -100.0, 0.5], abs=1e-4)
    assert difference.count_nonzero() == 3


@pytest.mark.parametrize("num_generated", [0, 3, 4, 5])
def test_nothing_ends_an_answer_that_is_too_short(num_generated: int) -> None:
    answer = [30] * num_generated
    (changed,) = changed_logits(logits(), [sequence(answer, min_tokens=4, stop_token_ids=(8,))])
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [*EOS, 8])
    expected = processor(torch.tensor([PROMPT + answer]), logits().clone())[0]
    assert torch.equal(changed > HELD_BACK, expected.isfinite())
    assert torch.equal(changed[changed > HELD_BACK], expected[expected.isfinite()])


def test_every_row_gets_its_own() -> None:
    asked = [sequence(presence_penalty=1.0), sequence(), sequence(logit_bias=((4, 2.0),))]
    together = changed_logits(logits(3), asked)
    alone = [changed_logits(logits(3)[row : row + 1], [each])[0] for row, each in enumerate(asked)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    rows = logits() / 3
    kept = MinPLogitsWarper(min_p)(torch.tensor([[0]]), rows.clone())[0].isfinite()
    sampling = [make_request([0], temperature=1.0, min_p=min_p, seed=seed).sampling for seed in range(3000)]
    drawn = {token.token_id for token in draw(rows.repeat(3000, 1), sampling, [0] * 3000).read() if token}
    assert drawn == set(kept.nonzero().flatten().tolist())
    assert (len(drawn) > 1) == (min_p == 0.05)


def test_logprobs_are_the_model_s_own_whatever_is_drawn_from() -> None:
    asked = sequence(logit_bias=((5, 100.0),), num_logprobs=3)
    tokens = draw(logits(), [asked.request.sampling], [9], lambda rows: change_logits(rows, [asked], EOS)).read()
    (token,) = tokens
    assert token is not None
    assert token.logprobs is not None
    assert token.token_id == 5
    expected = torch.log_softmax(logits()[0], dim=-1)
    assert token.logprobs.logprob == pytest.approx(expected[5].item(), abs=1e-5)
    assert [token_id for token_id, _ in token.logprobs.top] == expected.topk(3).indices.tolist()
