"""What requests ask of their logits before a token is drawn: penalties, biases, a least length, a grammar.

Rows whose request asks for nothing of the kind cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heddle_server.engine.sequence import Sequence

# As good as impossible, and still better than what a grammar forbids: where only an end is left, it may come.
HELD_BACK = -1e30


def change_logits(logits: Tensor, sequences: Rows[Sequence], eos_token_ids: Rows[int]) -> None:
    """Turns logits [num_rows, vocabulary] float32 into what tokens are drawn from, in place."""
    for row, sequence in enumerate(sequences):
        if sequence.changes_logits:
            _penalise(logits[row], sequence)
            _bias(logits[row], sequence)
            _hold_back_endings(logits[row], sequence, eos_token_ids)
            _forbid(logits[row], sequence)


def _penalise(row: Tensor, sequence: Sequence) -> None:
    """Repetition as in CTRL (arXiv:1909.05858, section 4.1), presence and frequency as OpenAI defines them."""
    sampling, counts = sequence.request.sampling, sequence.answer_counts
    if sampling.repetition_penalty != 1.0:
        used = torch.tensor(list(sequence.prompt_tokens | counts.keys()), device=row.device)
        logits = row[used]
        row[used] = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        token_ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), device=row.device)
        row[token_ids] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _bias(row: Tensor, sequence: Sequence) -> None:
    if bias := sequence.request.sampling.logit_bias:
        token_ids, values = zip(*bias, strict=True)
        row[torch.tensor(token_ids, device=row.device)] += torch.tensor(values, device=row.device)


def _hold_back_endings(row: Tensor, sequence: Sequence, eos_token_ids: Rows[int]) -> None:
    sampling = sequence.request.sampling
    if sequence.num_tokens - sequence.num_prompt_tokens < sampling.min_tokens:
        endings = [*eos_token_ids, *sampling.stop_token_ids]
        row[torch.tensor(endings, dtype=torch.long, device=row.device)] = HELD_BACK


def _forbid(row: Tensor, sequence: Sequence) -> None:
    if sequence.grammar is not None:
        row.masked_fill_(~_unpacked(sequence.grammar.allowed_tokens(), row), -torch.inf)


def _unpacked(bits: NDArray[np.int32], row: Tensor) -> Tensor:
    """One bool for each element of the row, from 32 to a word: [vocabulary]."""
    words = torch.tensor(bits, device=row.device)
    return ((words[:, None] >> torch.arange(32, device=row.device)) & 1).bool().flatten()[: row.shape[0]]
