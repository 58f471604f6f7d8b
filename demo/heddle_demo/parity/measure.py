"""Errors and effects of every sample on one base, in every way it can be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heddle_demo.parity.peft_sample import BaseOracle
from heddle_demo.parity.sample import Oracle, Sample
from heddle_demo.parity.served import Answer, Served

# DESIGN: max|Δlogit| <= LIMIT_FP32 * max(1, |logit|), the effect at least MIN_EFFECT_FP32 times the limit.
LIMIT_FP32 = 1e-5
MIN_EFFECT_FP32 = 100
# In bfloat16 rounding alone moves logits: at most so many times PEFT's own error, mean and 99th percentile over
# positions, and an effect of at least so many times the mean error.
LIMIT_BF16 = 1.5
MIN_EFFECT_BF16 = 10
NEAR_TIE_MARGIN = 0.05

ALONE, MIXED, CHUNKED, RELOADED = "alone", "mixed", "chunked", "reloaded"
WAYS = (ALONE, MIXED, CHUNKED, RELOADED)
CHUNK_TOKENS = 24  # a step, less than any prompt has


@dataclass(frozen=True)
class Bases:
    """One base as heddle loads it, and as its oracles hold it."""

    model_path: Path
    truth: Any  # float32, what the served weights mean
    rounded: Any | None  # the same in bfloat16; None where float32 is served
    settings: Mapping[str, Any]  # of the engine
    prompts: Sequence[list[int]]
    num_new_tokens: int  # of each answer


@dataclass
class Errors:
    """Of one sample, asked in one way: one entry a position."""

    ours: list[float] = field(default_factory=list)  # largest error over the vocabulary, in units of the limit's scale
    peft: list[float] = field(default_factory=list)  # PEFT's own in bfloat16
    effect: list[float] = field(default_factory=list)  # of the adapter
    num_decided: int = 0  # positions where the oracle's best token leads clearly
    num_equal: int = 0  # of those, where it is ours as well

    @property
    def worst(self) -> float:
        return max(self.ours)

    @property
    def largest_effect(self) -> float:
        return max(self.effect)

    @property
    def mean_ratio(self) -> float:
        """Ours over PEFT's."""
        return sum(self.ours) / sum(self.peft)

    @property
    def p99_ratio(self) -> float:
        return _percentile(self.ours) / _percentile(self.peft)

    @property
    def mean_effect_ratio(self) -> float:
        """The mean effect over the mean error."""
        return sum(self.effect) / max(sum(self.ours), 1e-12)

    @property
    def holds_fp32(self) -> bool:
        is_near = self.worst <= LIMIT_FP32 and self.num_equal == self.num_decided
        return is_near and self.largest_effect >= MIN_EFFECT_FP32 * LIMIT_FP32

    @property
    def holds_bf16(self) -> bool:
        return max(self.mean_ratio, self.p99_ratio) <= LIMIT_BF16 and self.mean_effect_ratio >= MIN_EFFECT_BF16


@dataclass
class Measured:
    """One base's results."""

    errors: dict[str, dict[str, Errors]] = field(default_factory=dict)  # by sample and way
    refusals: dict[str, str] = field(default_factory=dict)  # why a sample is not served
    pool_bytes: dict[str, int] = field(default_factory=dict)  # by sample
    num_rows: dict[str, int] = field(default_factory=dict)
    answers: dict[str, dict[str, list[Answer]]] = field(default_factory=dict)  # by way and sample


def measure(bases: Bases, samples: Sequence[Sample], folder: Path) -> Measured:
    """Make each sample over `truth`, upload it, ask in every way, compare with its oracle on the very same tokens.

    Those that want a plain base are left out on a quantised one.
    """
    measured, folders = Measured(), dict[str, Path]()
    samples = [sample for sample in samples if bases.rounded is None or not sample.on_plain_base_only]
    for number, sample in enumerate(samples):
        folders[sample.name] = folder / "samples" / str(number)
        folders[sample.name].mkdir(parents=True)
        sample.save(bases.truth, folders[sample.name], seed=number)
    measured.answers = answers = _answers(bases, samples, folders, folder / "store", measured)
    for sample in samples:
        if sample.name not in measured.refusals:
            judge = Judge(bases, sample, folders[sample.name])
            measured.errors[sample.name] = {way: judge.errors(answers[way][sample.name]) for way in WAYS}
    return measured


def _answers(
    bases: Bases,
    samples: Sequence[Sample],
    folders: Mapping[str, Path],
    store: Path,
    measured: Measured,
) -> dict[str, dict[str, list[Answer]]]:
    """By way and sample."""
    vocabulary_size = bases.truth.config.vocab_size
    answers: dict[str, dict[str, list[Answer]]] = {way: {} for way in WAYS}
    for way_settings, ways in (({}, (ALONE, MIXED, RELOADED)), ({"max_batch_tokens": CHUNK_TOKENS}, (CHUNKED,))):
        served = Served(bases.model_path, store, vocabulary_size, **{**bases.settings, **way_settings})
        measured.refusals |= served.register(folders)
        names = [sample.name for sample in samples if sample.name not in measured.refusals]
        for way in ways:
            if way == RELOADED:
                served.forget()
            if way == ALONE:
                for name in names:
                    alone = (served.ask([(name, prompt)], bases.num_new_tokens) for prompt in bases.prompts)
                    answers[way][name] = [answer for (answer,) in alone]
            else:
                questions = [(name, prompt) for prompt in bases.prompts for name in ["", *names]]
                for (name, _), answer in zip(questions, served.ask(questions, bases.num_new_tokens), strict=True):
                    answers[way].setdefault(name, []).append(answer)
        for name, checkpoint in served.checkpoints.items():
            measured.pool_bytes[name] = checkpoint.estimate_bytes(4 if bases.rounded is None else 2)
            measured.num_rows[name] = checkpoint.num_rows
        served.close()
    return answers


class Judge:
    """The oracles of one sample; what they say of a sequence of tokens is computed once."""

    def __init__(self, bases: Bases, sample: Sample, folder: Path) -> None:
        self._truth: Oracle = sample.load(bases.truth, folder)
        self._rounded: Oracle | None = None if bases.rounded is None else sample.load(bases.rounded, folder)
        self._base = BaseOracle(bases.truth)
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor | None]] = {}

    def errors(self, answers: Sequence[Answer]) -> Errors:
        errors = Errors()
        for answer in answers:
            assert answer.error is None, answer.error
            truth, base, rounded = self._logprobs(answer)
            ours = torch.stack(answer.logprobs)
            scale = truth.abs().clamp(min=1)  # of the limit
            errors.ours += _largest((ours - truth) / scale)
            errors.effect += _largest((truth - base) / scale)
            errors.peft += [] if rounded is None else _largest((rounded - truth) / scale)
            best = truth.topk(2).values
            is_decided = best[:, 0] - best[:, 1] > NEAR_TIE_MARGIN
            is_equal = ours.argmax(-1) == truth.argmax(-1)
            errors.num_decided += int(is_decided.sum())
            errors.num_equal += int((is_equal & is_decided).sum())
        return errors

    def _logprobs(self, answer: Answer) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the answered positions, [num_new_tokens, vocabulary]: the truth, the base, PEFT in bfloat16."""
        token_ids, num_prompt_tokens = answer.prompt + answer.token_ids, len(answer.prompt)
        if (known := self._known.get(tuple(token_ids))) is not None:
            return known

        def logprobs(oracle: Oracle) -> Tensor:
            logits = oracle.logits(token_ids, num_prompt_tokens)[num_prompt_tokens - 1 : -1]
            return torch.log_softmax(logits, dim=-1)

        rounded = None if self._rounded is None else logprobs(self._rounded)
        result = (logprobs(self._truth), logprobs(self._base), rounded)
        self._known[tuple(token_ids)] = result
        return result


def _largest(differences: Tensor) -> list[float]:
    largest: list[float] = differences.abs().amax(dim=-1).tolist()
    return largest


def _percentile(values: Sequence[float]) -> float:
    return float(torch.quantile(torch.tensor(values), 0.99))
